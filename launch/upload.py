"""Uploads the checkpoints of a run that were still waiting when it ended, with the command of its config.

    mova upload runs/try1

Exit status 1 if one could not be uploaded: it stays in the list.
"""

from __future__ import annotations

import sys
from pathlib import Path

from core.errors import EXIT_FAILED, EXIT_OK, RunError
from core.program import Command, refuse_options
from core.run_dir import RunDir
from core.secrets import HIDDEN
from train.checkpoint.uploads import forget, start, waiting_uploads


def upload(run: RunDir) -> list[str]:
    """Upload waiting checkpoints; returns a line for each failure. RunError for no run, no command, or a run that
    trains."""
    if not run.config.exists():
        raise RunError(f"{run.root} is not a run: it has no config.yaml")
    if (holder := run.holder()) is not None:
        raise RunError(f"run {run.root.name!r} is being trained by {holder}: it uploads its checkpoints itself")
    command = run.read_config().get("checkpoint", {}).get("upload")
    if not command:
        raise RunError(f"run {run.root.name!r} has no upload command (checkpoint.upload)")
    if any(HIDDEN in word for word in command):
        raise RunError(
            f"the command of run {run.root.name!r} holds a secret, which config.yaml does not keep "
            f"({' '.join(command)}): let the run's next start upload, or the command read it from a file"
        )
    failed = []
    waiting = waiting_uploads(run.checkpoints)
    print(f"run {run.root}: {len(waiting)} checkpoints wait")
    for number, path in enumerate(waiting, 1):
        try:
            child = start(command, path)
            said = child.communicate()[1]
        except OSError as error:
            raise RunError(f"{command[0]} cannot be run ({error.strerror})") from None
        if child.returncode:
            failed.append(f"upload of {path} failed: exit status {child.returncode}: {said.strip()[-500:]}")
            continue
        forget(run.checkpoints, [path])
        print(f"uploaded {path} ({number} of {len(waiting)})")
    return failed


def _main(arguments: list[str]) -> int:
    refuse_options("mova upload", arguments, least=1, most=1)
    failed = upload(RunDir(Path(arguments[0])))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_OK


PROGRAM = Command("upload", __doc__, _main)

if __name__ == "__main__":
    PROGRAM.start()
