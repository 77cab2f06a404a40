"""From a folder of video files to a dataset: fixed windows, encoded, in indexed shards.

    python -m data.prepare source=clips output=dataset
    python -m data.prepare source='raw/*.mp4' output=dataset frames=49 fps=24 height=64 width=64 holdout=0.05

The caption of `clip.mp4` is read from `clip.txt`, else from "caption" in `clip.json`. A file without sound or without
picture gives samples of the other modality alone. What can't be used is set aside in `output/rejected.jsonl`, with the
reason. With holdout above 0, whole files go to `output/valid`, the rest to `output/train`.
Everything is written to `output.partial` first: `output` is complete from the moment it exists.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from data.clip import EncodedClip
from data.codec import audio, text, video
from data.encode import Encoded, Geometry, Source, encode_all, hash_all
from data.errors import DataError
from data.index import DatasetIndex, build_index
from data.shards import ShardWriter, write_atomically, write_empty_text

VERSION = 1  # raised whenever the same source and settings give another dataset
SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
MARKER = ".unfinished"  # only a folder that holds it is deleted
RECORD = "prepare.json"


@dataclass
class PrepareConfig:
    """Settings of the program."""

    source: str = MISSING  # a folder (searched with all its subfolders), a glob pattern, or one file
    output: str = MISSING  # folder of the dataset
    frames: int = 49  # a window: 1 + 4k
    fps: float = 24
    height: int = 64  # pixels, a multiple of 8
    width: int = 64
    samples_per_shard: int = 64
    text_dim: int = 256
    holdout: float = 0.0  # share of the source files that goes to output/valid
    workers: int = 0  # processes; 0 = one a core


@dataclass
class Tally:
    """What became of the source."""

    files: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # files, by reason
    windows_rejected: int = 0
    rest_seconds: float = 0.0  # ends that are shorter than a window
    buckets: Counter[tuple[str, str]] = field(default_factory=Counter)  # windows, by (part, bucket)
    kept_hashes: set[str] = field(default_factory=set)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the dataset of `config`; does nothing when it is there. Returns its record (as in output/prepare.json).

    DataError for bad settings, a source without files, an output that holds something else, and when nothing was kept.
    """
    _check(config)
    output = Path(config.output)
    root, paths = find_files(config.source)
    settings = {name: value for name, value in asdict(config).items() if name not in ("source", "output", "workers")}
    settings["version"] = VERSION
    settings["encoders"] = {part.__name__.split(".")[-1]: part.fingerprint for part in (video, audio, text)}
    listing = [[path.relative_to(root).as_posix(), path.stat().st_size, _caption_hash(path)] for path in paths]
    settings["source"] = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    if record := _existing(output, settings):
        print(f"{output} is complete already, made from the same files with the same settings: nothing to do")
        print_summary(record["summary"], output)
        return record
    partial = output.with_name(output.name + ".partial")
    with _claim(partial):
        sources = hash_all([(path, path.relative_to(root).as_posix()) for path in paths])
        usable = [source.sha256 for source in sources if not source.reason]
        while True:
            _clear(partial)
            valid = choose_valid(usable, config.holdout)
            tally = _write_dataset(config, partial, sources, valid)
            usable_now = [digest for digest in usable if digest in tally.kept_hashes]
            parts = {"valid" if digest in valid else "train" for digest in usable_now}
            if not usable_now or len(parts) == 2 or config.holdout == 0 or len(usable_now) < 2:
                break
            usable = usable_now  # all files of one part were unusable: choose again among those that are
        if not tally.buckets:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in tally.rejected.most_common(3))
            raise DataError(
                f"nothing was kept of {len(paths)} files in {config.source}: {reasons}. All reasons are in "
                f"{partial / 'rejected.jsonl'}"
            )
        for part in sorted({part for part, _ in tally.buckets}):
            write_empty_text(partial / part, text.encode("", config.text_dim))
            build_index(partial / part).close()
        record = {"settings": settings, "summary": _summary(tally, config)}
        write_atomically(partial / RECORD, lambda path: path.write_text(json.dumps(record, indent=1)))
        if output.is_dir():
            output.rmdir()  # _existing has seen that it is empty
        (partial / MARKER).unlink()
        os.rename(partial, output)
    print_summary(record["summary"], output)
    return record


def find_files(source: str) -> tuple[Path, list[Path]]:
    """(folder, media files below it, sorted) of a folder, a glob pattern or one file. DataError when there are none."""
    path = Path(source)
    if path.is_dir():
        root, candidates = path, [found for found in path.rglob("*") if found.is_file()]
    elif path.is_file():
        root, candidates = path.parent, [path]
    elif glob.has_magic(source):
        candidates = [Path(found) for found in glob.glob(source, recursive=True) if Path(found).is_file()]
        root = Path(os.path.commonpath([found.parent for found in candidates])) if candidates else Path()
    else:
        raise DataError(
            f"source {source} does not exist; give a folder of video files or a pattern such as 'raw/*.mp4'"
        )
    files = sorted(found for found in candidates if found.suffix.lower() in SUFFIXES and found.name[0] != ".")
    if not files:
        raise DataError(f"source {source} holds no video files ({', '.join(SUFFIXES)})")
    return root, files


def read_caption(path: Path) -> str:
    """Caption beside a media file, "" when there is none. DataError when the file beside it can't be read."""
    plain, record = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if plain.is_file():
            return plain.read_text(encoding="utf-8").strip()
        if record.is_file():
            values = json.loads(record.read_text(encoding="utf-8"))
            return str(values.get("caption") or "").strip() if isinstance(values, dict) else ""
    except (OSError, ValueError) as error:
        raise DataError(f"the caption beside it can't be read ({error}); repair or delete that file") from error
    return ""


def choose_valid(hashes: list[str], share: float) -> set[str]:
    """Content hashes of the files for validation: a file stays on its side when others come or go.

    At least one file a side, where there are two or more.
    """
    ranked = sorted(hashes)
    if share == 0 or len(ranked) < 2:
        return set()
    chosen = {digest for digest in ranked if int(digest[:12], 16) < share * 16**12}
    return (chosen or {ranked[0]}) - ({ranked[-1]} if len(chosen) == len(ranked) else set())


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Lines for the user: files, windows, seconds, buckets, and where everything lies."""
    print(f"files: {summary['files']} found, {summary['kept']} kept, {summary['files'] - summary['kept']} rejected")
    for reason, count in summary["rejected"].items():
        print(f"  rejected {count}: {reason}")
    print(
        f"windows: {summary['windows']} kept ({summary['seconds']:.1f} s), {summary['windows_rejected']} rejected; "
        f"{summary['rest_seconds']:.1f} s were left over at the ends of files"
    )
    for entry in summary["buckets"]:
        print(f"  {entry['samples']} in {output / entry['part']}: {entry['bucket']}")
    if summary["rejected"] or summary["windows_rejected"]:
        print(f"reasons: {output / 'rejected.jsonl'}")
    print(f"dataset: {output}")


def _write_dataset(config: PrepareConfig, partial: Path, sources: list[Source], valid: set[str]) -> Tally:
    """Encode all sources into the shards of one or two parts."""
    tally = Tally(files=len(sources))
    geometry = Geometry(config.frames, config.fps, config.height, config.width)
    parts = ("train", "valid") if config.holdout > 0 else (".",)
    writers = {part: ShardWriter(partial / part, config.samples_per_shard) for part in parts}
    captions: dict[str, str] = {}
    for source in sources:
        if not source.reason:
            try:
                captions[source.name] = read_caption(source.path)
            except DataError as error:
                source.reason = str(error)
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(open(partial / "rejected.jsonl", "w", encoding="utf-8"))
        for writer in writers.values():
            stack.enter_context(writer)
        for source, result in encode_all(sources, geometry, config.workers or os.cpu_count() or 1):
            part = parts[-1] if source.sha256 in valid else parts[0]
            _write_file(tally, source, result, part, writers[part], captions.get(source.name, ""), config, rejected)
        rejected.flush()
        os.fsync(rejected.fileno())
    return tally


def _write_file(
    tally: Tally,
    source: Source,
    result: Encoded,
    part: str,
    writer: ShardWriter,
    caption: str,
    config: PrepareConfig,
    rejected: IO[str],
) -> None:
    """Store the samples of one source file, and what was refused of it."""
    for start, reason in result.rejected:
        rejected.write(json.dumps({"source": source.name, "start": start, "reason": reason}, ensure_ascii=False) + "\n")
    tally.windows_rejected += sum(start is not None for start, _ in result.rejected)
    tally.rest_seconds += result.rest_seconds
    if not result.samples:
        reason = result.rejected[0][1] if result.rejected else "no window"
        tally.rejected[reason.replace(str(source.path), "it")] += 1
        return
    tally.kept += 1
    tally.kept_hashes.add(source.sha256)
    embedding = text.encode(caption, config.text_dim)
    for key, tensors, meta, bucket in result.samples:
        writer.write(EncodedClip.from_members(key, tensors, meta, bucket), bucket, caption, embedding)
        tally.buckets[part, str(bucket)] += 1


def _summary(tally: Tally, config: PrepareConfig) -> dict[str, Any]:
    windows = sum(tally.buckets.values())
    return {
        "files": tally.files,
        "kept": tally.kept,
        "rejected": dict(tally.rejected.most_common()),
        "windows": windows,
        "windows_rejected": tally.windows_rejected,
        "seconds": windows * config.frames / config.fps,
        "rest_seconds": tally.rest_seconds,
        "buckets": [
            {"part": part, "bucket": bucket, "samples": count}
            for (part, bucket), count in sorted(tally.buckets.items())
        ],
    }


def _check(config: PrepareConfig) -> None:
    """DataError that names the first setting that can't be met."""
    rules = [
        ("frames", config.frames > 0 and config.frames % 4 == 1, "must be 1 + a multiple of 4, for example 49"),
        ("fps", 0 < config.fps < math.inf, "must be above 0"),
        ("height", config.height > 0 and config.height % 8 == 0, "must be a multiple of 8"),
        ("width", config.width > 0 and config.width % 8 == 0, "must be a multiple of 8"),
        ("samples_per_shard", config.samples_per_shard > 0, "must be at least 1"),
        ("text_dim", config.text_dim >= 8 and config.text_dim % 2 == 0, "must be even and at least 8"),
        ("holdout", 0 <= config.holdout < 1, "must be at least 0 and below 1"),
        ("workers", config.workers >= 0, "must be at least 0"),
    ]
    for name, fine, rule in rules:
        if not fine:
            raise DataError(f"{name}={getattr(config, name)} {rule}")


def _existing(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the dataset in `output` when it is that of `settings`; None when there is nothing."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / RECORD).is_file():
        raise DataError(f"output {output} exists and is no dataset of data.prepare; choose another folder")
    record: dict[str, Any] = json.loads((output / RECORD).read_text())
    found = record["settings"]
    different = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if different:
        details = "; ".join(
            "the source files are others"
            if name == "source"
            else f"{name}: {found.get(name)}, now {settings.get(name)}"
            for name in different
        )
        raise DataError(f"output {output} holds another dataset ({details}); choose another folder or delete it")
    for part in {entry["part"] for entry in record["summary"]["buckets"]}:
        DatasetIndex.open(output / part).close()  # raises when a shard was lost
    return record


@contextlib.contextmanager
def _claim(partial: Path) -> Iterator[None]:
    """Hold the folder of unfinished work for this process; DataError when another holds it or it is somebody's data."""
    if partial.exists() and not (partial / MARKER).is_file():
        raise DataError(f"{partial} exists and is not unfinished work of data.prepare; move it away")
    if partial.exists():
        print(f"{partial} is unfinished work of a run that was stopped: it is done again from the start")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / MARKER, "w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another data.prepare is writing {partial}; wait or choose another output") from error
        yield


def _clear(partial: Path) -> None:
    """Delete everything but the marker, which holds the lock."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


def _caption_hash(path: Path) -> str:
    """Changes with any file that may hold the caption."""
    beside = [path.with_suffix(suffix) for suffix in (".txt", ".json")]
    return hashlib.sha256(repr([file.read_bytes() if file.is_file() else None for file in beside]).encode()).hexdigest()


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)
    _run()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="prepare")
def _run(cfg: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(cfg)
        prepare(config)
    except MissingMandatoryValue as error:
        print(f"error: {error.full_key} is not given: python -m data.prepare source=DIR output=DIR", file=sys.stderr)
        sys.exit(1)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
