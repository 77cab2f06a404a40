"""Checkpoint folders without their commit marker: kept, verified, and committed again if they are complete.

A folder without `COMMITTED` was left by a save that died, or is a checkpoint whose marker was lost afterwards (a purge
of old small files, a partial copy). The two look alike, so neither is deleted: it is renamed until a newer checkpoint
is committed, and a run that is known to have had checkpoints does not start anew.

    python -m train.checkpoint.uncommitted runs/ID/checkpoints/step-00001000     # verify one, and write its marker
    again
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

from core.errors import RunError, missing
from core.run_dir import RunDir
from train.checkpoint.checkpoint import (
    MARKER,
    STATE,
    checksum,
    committed,
    has_marker,
    size_of,
    step_folders,
    step_of,
    write_marker,
)

ASIDE = "uncommitted-"
RECOMMIT = "python -m train.checkpoint.uncommitted"

logger = logging.getLogger(__name__)


def begin_anew(run: RunDir, known: int | None) -> Path | None:
    """Called when no committed checkpoint was found, before anything else is done; first rank only.

    known: the newest step recorded as committed. None if the run has never saved: it may start at step 0. A folder
    that a save completed except for its marker, and that no record names yet, is committed and returned. RunError if
    there were checkpoints: a run that starts at step 0 would bury them.
    """
    folders = step_folders(run.checkpoints)
    whole = [path for path in folders if _looks_whole(path)]
    if known is not None:
        where = "is empty" if not folders else f"holds {', '.join(path.name for path in folders)} without {MARKER}"
        remedy = f"{RECOMMIT} {whole[-1]}" if whole else "mount or restore that folder"
        raise missing(
            f"run {run.root.name!r} had a committed checkpoint of step {known}, but {run.checkpoints} {where}; nothing "
            f"was touched. To go on: {remedy}. To start anew: another run.id, or delete {run.root}"
        )
    for path in reversed(whole):
        if fault := differences(path):
            raise RunError(
                f"{path} holds all files of a checkpoint, but no {MARKER}, and cannot be verified: {fault}. Restore "
                "it from a copy, or delete that folder to start anew"
            )
        write_marker(path)
        logger.warning("checkpoint %s was whole but for its commit marker, which is written again", path)
        return path
    return None


def commit_newer(folder: Path, found: Path) -> bool:
    """Write the markers of checkpoints that are newer than the newest committed one and complete except for the marker,
    judged by file sizes; loading one compares the checksums. First rank only. Returns whether there were any."""
    lost = [path for path in step_folders(folder) if step_of(path) > step_of(found) and _looks_whole(path)]
    lost = [path for path in lost if not differences(path, sums=False)]
    for path in lost:
        write_marker(path)
        logger.warning("checkpoint %s was whole but for its commit marker, which is written again", path)
    return bool(lost)


def _looks_whole(path: Path) -> bool:
    return size_of(path / STATE) is not None and size_of(path / ".metadata") is not None


def set_aside(folder: Path) -> None:
    """Rename what uncommitted saves left. Only while no save is in progress; first rank only."""
    for path in step_folders(folder):
        try:
            left = not has_marker(path)
        except OSError as error:
            logger.warning("checkpoint %s cannot be read (%s) and is left as it is", path, error.strerror)
            continue
        if left:
            aside = path.with_name(path.name.replace("step-", ASIDE))
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning(
                "checkpoint %s was never committed (the run died while it was written): renamed to %s, and deleted "
                "after the next checkpoint", path, aside.name,
            )  # fmt: skip


def delete_older(folder: Path) -> None:
    """Delete what was set aside at or before the newest committed step. First rank only."""
    steps = [step_of(path) for path in committed(folder)]
    for path in folder.glob(f"{ASIDE}*"):
        step = path.name.removeprefix(ASIDE)
        if steps and step.isdigit() and int(step) <= steps[-1]:
            shutil.rmtree(path, ignore_errors=True)


def differences(path: Path, sums: bool = True) -> str:
    """How a folder differs from what its save recorded, or "" if every byte is there. sums: compare checksums, which
    takes as long as reading all files. OSError for a file that exists and cannot be read."""
    try:
        recorded: dict[str, dict[str, int]] | None = json.loads((path / STATE).read_bytes()).get("files")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    if recorded is None:
        return f"{STATE} records no checksums (written by an earlier version)"
    for name, entry in recorded.items():
        size = size_of(path / name)
        if size is None:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if sums and (found := checksum(path / name)) != entry["crc32"]:
            return f"{name} has checksum {found:08x} instead of {entry['crc32']:08x}"
    return ""


def main(arguments: list[str]) -> int:
    """Verify one folder and write its marker. Exit status 1 if it is incomplete."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.strip() if __doc__ else "")
        return int(not {"-h", "--help"} & set(arguments))
    path = Path(arguments[0])
    if has_marker(path):
        print(f"{path} is already committed")
        return 0
    if fault := differences(path):
        print(f"error: {path} is not committed: {fault}; restore it from a copy", file=sys.stderr)
        return 1
    write_marker(path)
    print(f"{path}: all files are unchanged; committed again")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
