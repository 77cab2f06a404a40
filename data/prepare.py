"""From raw video files to a dataset: cut into windows, scored, filtered, encoded, in indexed shards, with a report.

    python -m data.prepare source=clips output=dataset
    python -m data.prepare source='raw/*.mp4' output=dataset frames=49 fps=24 height=64 width=64 holdout=0.05
    python -m data.prepare source=manifest.csv output=dataset data/buckets=360p data/window=mova data/filters=phase1 \
        scores='[silence,bandwidth,speech,dnsmos,shots]' external=scores-from-elsewhere.parquet

A source is a folder, a pattern, a file or a manifest (data/source.py). The caption of `clip.mp4` is read from
`clip.txt`, else from "caption" in `clip.json`. A file without sound or without picture gives samples of the other
modality alone. What can't be used is set aside in `output/rejected.jsonl`, with the reason; every window with all its
scores stands in `output/scores.parquet`. With holdout above 0, whole files go to `output/valid`, the rest to
`output/train`.

Everything is written to `output.partial` first, unit by unit: `output` is complete from the moment it exists, and a run
that was killed goes on with the units that are missing. On a cluster each job does one unit, `unit=3/16`; the last one
to end puts the dataset together.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.codec import audio, text, video
from data.errors import DataError
from data.filter import FilterConfig
from data.index import DatasetIndex, build_index
from data.pipeline import Pipeline, PipelineConfig
from data.pool import Pool
from data.report import write_report
from data.scores import ScoreConfig
from data.shards import write_atomically, write_empty_text
from data.source import Source, list_sources, listing_hash
from data.table import SCORES, merge
from data.unit import (
    UNITS,
    UnitConfig,
    UnitRecord,
    hash_sources,
    read_record,
    rejected_lines,
    run_unit,
    table_path,
    unit_of,
)
from data.window import Geometry, WindowConfig

VERSION = 2  # raised whenever the same source and settings give another dataset
MARKER = ".unfinished"  # only a folder that holds it is deleted
FINISH = ".finish"  # locked by the process that puts the units together
RECORD = "prepare.json"
USABLE = "usable.json"  # in the folder of unfinished work: hashes of the files that gave samples
FILES_A_UNIT = 32
MOST_UNITS = 1000


@dataclass
class BucketConfig:
    """Geometry of windows: frames (1 + 4k), pixels (multiples of 8)."""

    frames: int = MISSING
    height: int = MISSING
    width: int = MISSING


@dataclass
class PrepareConfig:
    """Settings of the program."""

    source: str = MISSING  # a folder (with all its subfolders), a glob pattern, one file, or a manifest
    output: str = MISSING  # folder of the dataset
    frames: int = 49  # a window: 1 + 4k
    fps: float = 24
    height: int = 64  # pixels, a multiple of 8
    width: int = 64
    buckets: list[BucketConfig] = field(default_factory=list)  # several geometries, instead of frames, height and width
    window: WindowConfig = field(default_factory=WindowConfig)
    scores: list[str] = field(default_factory=list)  # what to measure: data/scores/__init__.py lists the names
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    external: str = ""  # Parquet file with scores from elsewhere, joined by `key` (windows) or `source` (files)
    loudness: float | None = None  # LUFS that the sound is brought to; null leaves it as it is
    samples_per_shard: int = 64  # 0: no such limit
    shard_mb: int = 1000  # megabytes after which a shard is closed; 0: no such limit
    text_dim: int = 256
    holdout: float = 0.0  # share of the source files that goes to output/valid
    workers: int = 0  # processes; 0 = one a core
    units: int = 0  # parts the work is cut into; 0 = one for every 32 files, 1,000 at most
    unit: str = ""  # i/n: do the i-th of n parts only (0/n to n-1/n)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the dataset of `config`; does nothing when it is there. Returns its record (as in output/prepare.json).

    With config.unit only that unit is done, and the dataset is put together when it was the last one; the record is
    empty until then. DataError for bad settings, a source without files, an output that holds something else, and when
    nothing was kept.
    """
    only = _check(config)
    output = Path(config.output)
    sources = list_sources(config.source)
    count = only[1] if only else config.units or min(MOST_UNITS, -(-len(sources) // FILES_A_UNIT))
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("source", "output", "workers", "unit", "units", "external")
    }
    manifest_columns = sorted({column for source in sources for column in source.scores})
    pipeline_config = PipelineConfig(
        _geometries(config), config.window, list(config.scores), config.score, config.filters, manifest_columns,
        config.external, config.loudness,
    )  # fmt: skip
    pipeline = Pipeline(pipeline_config)
    if pipeline.filter.skipped:
        print(f"filters skipped, since nothing brings their scores: {', '.join(pipeline.filter.skipped)}")
    settings |= {"version": VERSION, "units": count, "stages": pipeline.versions(), "external": _hash(config.external)}
    settings["encoders"] = {part.__name__.split(".")[-1]: part.fingerprint for part in (video, audio, text)}
    settings["source"] = listing_hash(sources)
    settings = json.loads(json.dumps(settings))  # as it will be read back
    if record := _existing(output, settings):
        print(f"{output} is complete already, made from the same files with the same settings: nothing to do")
        print_summary(record["summary"], output)
        return record
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    partial = output.with_name(output.name + ".partial")
    units = UnitConfig(
        partial, count, digest, config.samples_per_shard, config.shard_mb * 1000**2, config.text_dim,
        ("train", "valid") if config.holdout > 0 else (".",), tuple(pipeline.columns),
    )  # fmt: skip
    shares: list[list[Source]] = [[] for _ in range(count)]
    for source in sources:
        shares[unit_of(source, count)].append(source)
    pool = Pool(pipeline_config, min(config.workers or os.cpu_count() or 1, max(map(len, shares))))
    with _claim(partial, settings, shared=only is not None), pool:
        if only:
            number = only[0]
            if read_record(units, number):
                print(f"unit {number}/{count} is done already")
            else:
                _run_units(units, {number: shares[number]}, lambda digest: below(digest, config.holdout), pool)
            records = [read_record(units, each) for each in range(count)]
            done = [record for record in records if record]
            if len(done) < count:
                print(f"{len(done)} of {count} units are done; the last one to end puts {output} together")
                return {}
        else:
            done = _run_all(units, shares, config, pool)
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(partial / FINISH, "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # of two units that end together one finishes, the other finds it done
            except FileNotFoundError:
                pass
            if not (partial / MARKER).exists():
                return json.loads((output / RECORD).read_text())
            record = _finish(config, units, settings, done, pipeline, len(sources), only is not None)
    print_summary(record["summary"], output)
    return record


def choose_valid(hashes: list[str], share: float) -> set[str]:
    """Content hashes of the files for validation: a file stays on its side when others come or go.

    At least one file a side, where there are two or more.
    """
    ranked = sorted(hashes)
    if share == 0 or len(ranked) < 2:
        return set()
    chosen = {digest for digest in ranked if below(digest, share)}
    return (chosen or {ranked[0]}) - ({ranked[-1]} if len(chosen) == len(ranked) else set())


def below(digest: str, share: float) -> bool:
    """Whether a content hash lies in the lowest `share` of all hashes."""
    return int(digest[:12], 16) < share * 16**12


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Lines for the user: files, windows, seconds, buckets, and where everything lies."""
    print(f"files: {summary['files']} found, {summary['kept']} kept, {summary['files'] - summary['kept']} rejected")
    for reason, count in list(summary["rejected"].items())[:20]:
        print(f"  rejected {count}: {reason}")
    print(
        f"windows: {summary['windows']} kept ({summary['seconds']:.1f} s), {summary['windows_rejected']} rejected; "
        f"{summary['rest_seconds']:.1f} s of the files are in no window"
    )
    for entry in summary["buckets"]:
        print(f"  {entry['samples']} in {output / entry['part']}: {entry['bucket']}")
    if summary["rejected"] or summary["windows_rejected"]:
        print(f"reasons: {output / 'rejected.jsonl'}")
    print(f"scores of every window: {output / SCORES}; report: {output / 'report.html'}")
    print(f"dataset: {output}")


def _run_all(units: UnitConfig, shares: list[list[Source]], config: PrepareConfig, pool: Pool) -> list[UnitRecord]:
    """All units that are not done yet. When one part stays empty, files are distributed again among the usable ones."""
    usable: list[str] = []
    if config.holdout > 0:  # both sides shall have a file, so all are read first
        old = [read_record(units, number) for number in range(units.count)]
        known = {name: digest for record in old if record for name, digest in record.hashes.items()}
        for share in shares:
            hash_sources(share, known)
        usable = [source.sha256 for share in shares for source in share if not source.reason]
        with contextlib.suppress(FileNotFoundError):
            usable = json.loads((units.root / USABLE).read_text())
    while True:
        valid = choose_valid(usable, config.holdout)
        todo = {}
        for number, share in enumerate(shares):
            record = read_record(units, number)
            if record is None or record.valid != sorted(one.sha256 for one in share if one.sha256 in valid):
                todo[number] = share
        if len(todo) < units.count:
            print(f"{units.count - len(todo)} of {units.count} units are done already")
        _run_units(units, todo, valid.__contains__, pool)
        records = [record for number in range(units.count) if (record := read_record(units, number))]
        kept = {digest for record in records for digest in record.kept_hashes}
        usable_now = [digest for digest in usable if digest in kept]
        if config.holdout == 0 or len(usable_now) < 2 or len({digest in valid for digest in usable_now}) == 2:
            return records
        usable = usable_now  # all files of one part were unusable: choose again among those that are
        write_atomically(units.root / USABLE, functools.partial(Path.write_text, data=json.dumps(usable)))


def _run_units(units: UnitConfig, todo: dict[int, list[Source]], is_valid: Callable[[str], bool], pool: Pool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("time left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("files", total=sum(map(len, todo.values())))
        for number, share in todo.items():
            progress.update(task, description=f"unit {number}/{units.count}, files")
            hash_sources(share, {source.name: source.sha256 for source in share})
            valid = {source.sha256 for source in share if is_valid(source.sha256)}
            run_unit(units, number, share, valid, pool, lambda: progress.advance(task))


def _finish(
    config: PrepareConfig,
    units: UnitConfig,
    settings: dict[str, Any],
    records: list[UnitRecord],
    pipeline: Pipeline,
    files: int,
    only: bool,
) -> dict[str, Any]:
    """Put the units together: tables, report, index; then the folder gets its name."""
    partial, output = units.root, Path(config.output)
    numbers = range(units.count)
    write_atomically(
        partial / "rejected.jsonl",
        lambda path: path.write_text("".join(rejected_lines(partial, each) for each in numbers), encoding="utf-8"),
    )
    merge([table_path(partial, number) for number in numbers], partial / SCORES)
    summary = _summary(records, files)
    write_report(partial, summary, pipeline.filter, [one for record in records for one in record.thumbnails])
    if not summary["buckets"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in list(summary["rejected"].items())[:3])
        raise DataError(
            f"nothing was kept of {files} files in {config.source}: {reasons}. All reasons are in "
            f"{partial / 'rejected.jsonl'}"
        )
    parts = sorted({entry["part"] for entry in summary["buckets"]})
    if only and set(parts) != set(units.parts):  # without unit=, one usable file is allowed to make train alone
        missing = ", ".join(set(units.parts) - set(parts))
        raise DataError(f"all usable files went to one side, {missing} is empty: choose another holdout")
    for part in parts:
        write_empty_text(partial / part, text.encode("", config.text_dim))
        if not config.filters.drop:
            from data.refilter import write_selection

            write_selection(partial, part, pipeline.filter, pipeline.columns)
        build_index(partial / part).close()
    record = {"settings": settings, "summary": summary}
    write_atomically(partial / RECORD, lambda path: path.write_text(json.dumps(record, indent=1)))
    if output.is_dir():
        output.rmdir()  # _existing has seen that it is empty
    os.rename(partial, output)
    _tidy(output)
    return record


def _tidy(output: Path) -> None:
    """Remove what only unfinished work needs; the marker last."""
    shutil.rmtree(output / UNITS, ignore_errors=True)
    for name in (USABLE, "settings.json", FINISH, MARKER):
        (output / name).unlink(missing_ok=True)


def _summary(records: list[UnitRecord], files: int) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    buckets: Counter[tuple[str, str]] = Counter()
    for record in records:
        rejected.update(record.rejected)
        cpu.update(record.cpu)
        buckets.update({(part, bucket): count for part, bucket, count in record.buckets})
    return {
        "files": files,
        "kept": sum(record.kept for record in records),
        "rejected": dict(rejected.most_common()),
        "windows": sum(buckets.values()),
        "windows_rejected": sum(record.windows_rejected for record in records),
        "windows_seen": sum(record.windows for record in records),
        "seconds": sum(record.stored_seconds for record in records),
        "source_seconds": sum(record.span_seconds for record in records),
        "rest_seconds": sum(record.rest_seconds for record in records),
        "buckets": [
            {"part": part, "bucket": name, "samples": count} for (part, name), count in sorted(buckets.items())
        ],
        "cpu_seconds": {stage: round(seconds, 3) for stage, seconds in sorted(cpu.items())},
        "wall_seconds": round(sum(record.wall for record in records), 1),
    }


def _check(config: PrepareConfig) -> tuple[int, int] | None:
    """DataError that names the first setting that can't be met. Returns (i, n) of unit=i/n."""
    rules: list[tuple[str, bool, str]] = []
    for bucket in _geometries(config):
        rules += [
            ("frames", bucket.frames > 0 and bucket.frames % 4 == 1, "must be 1 + a multiple of 4, for example 49"),
            ("height", bucket.height > 0 and bucket.height % 8 == 0, "must be a multiple of 8"),
            ("width", bucket.width > 0 and bucket.width % 8 == 0, "must be a multiple of 8"),
        ]
        for name, fine, rule in rules[-3:]:
            if not fine:
                raise DataError(f"{name}={getattr(bucket, name)} {rule}")
    rules = [
        ("fps", 0 < config.fps < math.inf, "must be above 0"),
        ("samples_per_shard", config.samples_per_shard >= 0, "must be at least 0"),
        ("samples_per_shard", config.samples_per_shard + config.shard_mb > 0, "must be at least 1 when shard_mb is 0"),
        ("shard_mb", config.shard_mb >= 0, "must be at least 0"),
        ("text_dim", config.text_dim >= 8 and config.text_dim % 2 == 0, "must be even and at least 8"),
        ("holdout", 0 <= config.holdout < 1, "must be at least 0 and below 1"),
        ("workers", config.workers >= 0, "must be at least 0"),
        ("units", config.units >= 0, "must be at least 0"),
    ]
    for name, fine, rule in rules:
        if not fine:
            raise DataError(f"{name}={getattr(config, name)} {rule}")
    if not config.unit:
        return None
    number, _, count = config.unit.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise DataError(f"unit={config.unit} must be i/n with i from 0 to n - 1, for example 0/16")
    if config.units not in (0, int(count)):
        raise DataError(f"unit={config.unit} and units={config.units} contradict each other; leave out units")
    return int(number), int(count)


def _geometries(config: PrepareConfig) -> list[Geometry]:
    sizes = [(one.frames, one.height, one.width) for one in config.buckets]
    sizes = sizes or [(config.frames, config.height, config.width)]
    return [Geometry(frames, config.fps, height, width) for frames, height, width in sizes]


def _hash(path: str) -> str:
    """SHA-256 of a file, "" for none."""
    if not path:
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _existing(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the dataset in `output` when it is that of `settings`; None when there is nothing."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / RECORD).is_file():
        raise DataError(f"output {output} exists and is no dataset of data.prepare; choose another folder")
    record: dict[str, Any] = json.loads((output / RECORD).read_text())
    different = _differences(record["settings"], settings)
    if different:
        raise DataError(f"output {output} holds another dataset ({different}); choose another folder or delete it")
    for part in {entry["part"] for entry in record["summary"]["buckets"]}:
        DatasetIndex.open(output / part).close()  # raises when a shard was lost
    _tidy(output)  # a run that was killed right after the folder had got its name
    return record


def _differences(found: dict[str, Any], settings: dict[str, Any]) -> str:
    """Both values of every setting that differs, for a message."""
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    return "; ".join(
        "the source files are others" if name == "source" else f"{name}: {found.get(name)}, now {settings.get(name)}"
        for name in names
    )


@contextlib.contextmanager
def _claim(partial: Path, settings: dict[str, Any], shared: bool) -> Iterator[None]:
    """Hold the folder of unfinished work, for this process or (shared) for all that do single units.

    Work of other settings is thrown away, unless others may be at it. DataError when another process holds the folder,
    or when it is somebody's data.
    """
    if partial.exists() and not (partial / MARKER).is_file():
        raise DataError(f"{partial} exists and is not unfinished work of data.prepare; move it away")
    begun = partial.exists()
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / MARKER, "a") as marker:
        try:
            fcntl.flock(marker, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another data.prepare is writing {partial}; wait or choose another output") from error
        path = partial / "settings.json"
        found = json.loads(path.read_text()) if path.is_file() else None
        if found is not None and found != settings and shared:
            raise DataError(
                f"{partial} was begun with other settings ({_differences(found, settings)}); use the same for all "
                "units, or delete it"
            )
        if begun and found != settings and not shared:
            print(f"{partial} is unfinished work with other settings: it is done again from the start")
            _clear(partial)
        elif begun and not shared:
            print(f"{partial} is unfinished work of a run that was stopped: it goes on")
        (partial / UNITS).mkdir(exist_ok=True)
        if found != settings:
            content = json.dumps(settings)
            temporary = partial / f".settings.{os.getpid()}"  # units that start together write the same
            temporary.write_text(content)
            os.replace(temporary, path)
        yield


def _clear(partial: Path) -> None:
    """Delete everything but the marker, which holds the lock."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


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
