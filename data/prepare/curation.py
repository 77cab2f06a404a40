"""Curation: the work of `mova prepare` from the files that a source lists to finished shards, unit by unit.

The user's view of it is in data/prepare/__main__.py.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.durable import write_atomically
from core.locks import lock_now, lock_when_free
from core.ranges import bounded
from data.codec import Codecs, EncoderConfig
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.prepare.claim import MARKER, SOURCES_LOCK, begin, claim, differences
from data.prepare.encode_server import EncodeServers, devices_of
from data.prepare.finish import FINISH, RECORD, USABLE, finish, print_summary, tidy, waiting_lines
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.pool import TIMEOUT, Listener, Pool
from data.prepare.unit import UnitConfig, UnitRecord, read_record, run_unit
from data.scores import ScoreConfig
from data.sources.cells import TableLayout
from data.sources.content import is_address
from data.sources.manifest import MEANINGS
from data.sources.survey import Survey
from data.sources.table import HASHED_FIRST, SourceTable, make_table, prepare_table, repair_table
from data.sources.table import NAME as SOURCES
from data.storage.web import hide
from data.windows.filter import FilterConfig
from data.windows.window import Geometry, WindowConfig

VERSION = 3  # raised whenever the same source and settings give another dataset
FILES_A_UNIT = 32
MOST_UNITS = 1000
NO_SETTINGS = (
    "source",
    "columns",
    "delimiter",
    "output",
    "workers",
    "unit",
    "units",
    "external",
    "encoder",
    "device",
)  # what is made of them is


@dataclass
class BucketConfig:
    """Geometry of windows.

    frames: 1 + 4k
    height: pixels, a multiple of 8
    width: pixels, a multiple of 8
    """

    frames: int = bounded(MISSING, "[1, inf)")
    height: int = bounded(MISSING, "[1, inf)")
    width: int = bounded(MISSING, "[1, inf)")


@dataclass
class PrepareConfig:
    """From raw clips to shards.

    source: a folder with all its subfolders, a glob pattern, one file, or a manifest
    output: folder of the dataset
    columns: names of the manifest's columns, {path: video, caption: text}, or positions where it has no header
    delimiter: of a manifest's cells; "": detected
    frames: frames of a window, 1 + 4k
    fps: frames per second of a window
    height: of a window in pixels, a multiple of 8
    width: of a window in pixels, a multiple of 8
    buckets: several geometries [{frames, height, width}], instead of frames, height and width
    scores: scores to measure: data/scores/__init__.py lists the names
    external: Parquet file with scores from elsewhere, joined by `key` (windows) or `source` (files)
    loudness: LUFS to which the sound is normalized; null: unchanged
    samples_per_shard: number of samples after which a shard is closed; 0: no such limit
    shard_mb: megabytes after which a shard is closed; 0: no such limit
    device: where the encoders run: cpu (in the decoding processes), cuda (all GPUs) or cuda:N
    text_dim: width of the built-in text codec's rows, 256 where null
    holdout: share of the source files that goes to output/valid
    workers: number of processes; 0: one per core
    timeout: time limit in seconds for a step of a file (opening, cutting, a window), plus 1 for each megabyte
    units: number of parts that the work is cut into; 0: one for every 32 files, at most 1,000
    unit: i/n: only the i-th of n parts (0/n to n-1/n)
    """

    source: str = MISSING
    output: str = MISSING
    columns: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(MEANINGS))
    delimiter: str = ""  # of a manifest's cells; "" = found out
    frames: int = bounded(49, "[1, inf)")
    fps: float = bounded(24, "(0, inf)")
    height: int = bounded(64, "[1, inf)")
    width: int = bounded(64, "[1, inf)")
    buckets: list[BucketConfig] = field(default_factory=list)
    window: WindowConfig = field(default_factory=WindowConfig)
    scores: list[str] = field(default_factory=list)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    external: str = ""
    loudness: float | None = bounded(None, "(-inf, inf)")
    samples_per_shard: int = bounded(64, "[0, inf)")
    shard_mb: int = bounded(1000, "[0, inf)")
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    device: str = "cpu"
    text_dim: int | None = bounded(None, "[1, inf)")
    holdout: float = bounded(0.0, "[0, 1)")
    workers: int = bounded(0, "[0, inf)")
    timeout: float = bounded(TIMEOUT, "(0, 100000000]")
    units: int = bounded(0, "[0, inf)")
    unit: str = ""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the dataset of `config`, unless it exists. Returns its record (as in output/prepare.json).

    With config.unit only that unit is done, and the dataset is put together when it was the last one; the record is
    empty until then. DataError for bad settings, a source without files, an output that holds something else, and when
    nothing was kept.
    """
    only = _check(config)
    output = Path(config.output)
    if output.is_dir() and any(output.iterdir()):
        return _complete(config, only, output)
    partial = output.with_name(output.name + ".partial")
    with claim(partial, shared=only is not None), contextlib.ExitStack() as stack:
        codecs = Codecs(config.encoder, config.device, config.text_dim)
        path = _list_sources(config, partial, shared=only is not None)
        with SourceTable(path) as listed:
            settings, pipeline = _settings(
                config, codecs, only, listed.digest, listed.columns, listed.summary["segments"]
            )
            hash_all = config.holdout > 0 and not only and listed.files <= HASHED_FIRST
        begin(partial, settings, shared=only is not None)
        with _alone(partial):
            prepare_table(path, settings["units"], hash_all)
        table = stack.enter_context(SourceTable(path))
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        units = UnitConfig(
            partial, table.units, digest, config.samples_per_shard, config.shard_mb * 1000**2, codecs.text,
            ("train", "valid") if config.holdout > 0 else (".",), tuple(pipeline.columns), hash_all,
            codecs.libraries,
        )  # fmt: skip
        workers = min(config.workers or os.cpu_count() or 1, max(files for files, _ in table.sizes()))
        servers = _servers(codecs, config)
        stack.enter_context(servers)
        pool = stack.enter_context(Pool(replace(pipeline.config, servers=servers.addresses), workers, config.timeout))
        if only:
            records = _run_one(units, only[0], table, config, pool)
            if len(records) < units.count:
                print(f"{len(records)} of {units.count} units are done; the last one to end puts {output} together")
                return {}
        else:
            records = _run_all(units, table, config, pool)
        devices = servers.close()
        try:
            lock = stack.enter_context(open(partial / FINISH, "a"))
            lock_when_free(lock)  # of two units that end together one finishes, the other finds it done
        except FileNotFoundError:
            pass
        if not (partial / MARKER).exists():
            content: dict[str, Any] = json.loads((output / RECORD).read_text())
            return content
        record = finish(units, config.source, output, settings, records, pipeline, table, only is not None)
    print_summary(record["summary"], output)
    for line in waiting_lines(record["summary"]["cpu_seconds"], devices):
        print(line)
    return record


def _servers(codecs: Codecs, config: PrepareConfig) -> EncodeServers:
    """Of the devices that encode, none where the decoding processes do it themselves. DataError: see `devices_of`."""
    devices = devices_of(config.device)
    needed = codecs.video.on_device or codecs.audio.on_device
    return EncodeServers(config.encoder, devices if needed else [])


def _list_sources(config: PrepareConfig, partial: Path, shared: bool) -> Path:
    """Where the table of sources lies, which is made by the first to come; the others wait.

    One that is there is taken as it is when others (shared) may be at work with it, else when the sources are the same.
    DataError when something can't be read now that could be read then: that is no reason to begin anew.
    """
    path = partial / SOURCES
    with _alone(partial):
        if path.exists():
            repair_table(path)
            with SourceTable(path) as table:
                if shared:
                    if table.source != _origin(config):
                        raise DataError(f"{partial} was begun with source {table.source}; use the same for all units")
                    return path
                survey = _survey(config)
                for _ in survey:
                    pass
                if survey.digest == table.digest:
                    return path
                if gone := sorted(set(survey.unread) - set(table.unread)):
                    raise DataError(
                        f"{', '.join(gone)} can't be read, but could be when {partial} was begun: make it readable, "
                        f"or delete {partial} to begin anew without it"
                    )
        make_table(path, _survey(config), _origin(config))
    return path


def _survey(config: PrepareConfig) -> Survey:
    return Survey(config.source, TableLayout(config.columns, config.delimiter))


def _origin(config: PrepareConfig) -> str:
    """The source and how it is read, in words."""
    source = hide(config.source) if is_address(config.source) else os.path.abspath(config.source)
    return " ".join(
        [
            source,
            *(f"{meaning}={name}" for meaning, name in config.columns.items() if name is not None),
            config.delimiter,
        ]
    )


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold the lock of the table of sources; waits, and says so, for the one that makes it."""
    with open(partial / SOURCES_LOCK, "a") as lock:
        if not lock_now(lock):
            print("another job lists the sources: waiting for it")
            lock_when_free(lock)
        yield


def _settings(
    config: PrepareConfig,
    codecs: Codecs,
    only: tuple[int, int] | None,
    digest: str,
    columns: list[str],
    segments: int,
) -> tuple[dict[str, Any], Pipeline]:
    """All that decides what the dataset is, as it will be read back, and the stages. digest, columns, segments: of the
    sources."""
    pipeline = Pipeline(
        PipelineConfig(
            _geometries(config), config.window, list(config.scores), config.score, config.filters, columns,
            config.external, config.loudness, config.encoder, config.device, codecs.fingerprints,
        )
    )  # fmt: skip
    if pipeline.filter.skipped:
        print(f"filters skipped, since nothing brings their scores: {', '.join(pipeline.filter.skipped)}")
    settings: dict[str, Any] = {name: value for name, value in asdict(config).items() if name not in NO_SETTINGS}
    count = only[1] if only else config.units or min(MOST_UNITS, -(-segments // FILES_A_UNIT))
    settings |= {"version": VERSION, "units": count, "stages": pipeline.versions(), "external": _hash(config.external)}
    settings |= {"encoders": codecs.fingerprints, "text_dim": codecs.text.dim, "source": digest}
    return json.loads(json.dumps(settings)), pipeline


def _complete(config: PrepareConfig, only: tuple[int, int] | None, output: Path) -> dict[str, Any]:
    """The record of the dataset that is there already. DataError when it is another, or none."""
    if not (output / RECORD).is_file():
        raise DataError(f"output {output} exists and is not a dataset of data.prepare; choose another folder")
    survey = _survey(config)
    for _ in survey:
        pass
    codecs = Codecs(config.encoder, config.device, config.text_dim)
    settings, _ = _settings(config, codecs, only, survey.digest, survey.columns, survey.rows)
    record: dict[str, Any] = json.loads((output / RECORD).read_text())
    if different := differences(record["settings"], settings):
        raise DataError(f"output {output} holds another dataset ({different}); choose another folder or delete it")
    for part in {entry["part"] for entry in record["summary"]["buckets"]}:
        DatasetIndex.open(output / part).close()  # raises when a shard was lost
    tidy(output)  # a run that was killed right after the folder had got its name
    print(f"{output} is already complete, made from the same files with the same settings: nothing to do")
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


def _run_one(units: UnitConfig, number: int, table: SourceTable, config: PrepareConfig, pool: Pool) -> list[UnitRecord]:
    """One unit, unless it is done. Returns the records of all that are done."""
    if read_record(units, number):
        print(f"unit {number}/{units.count} is done already")
    else:
        _run_units(units, [number], table, lambda digest: below(digest, config.holdout), pool)
    records = [read_record(units, each) for each in range(units.count)]
    return [record for record in records if record]


def _run_all(units: UnitConfig, table: SourceTable, config: PrepareConfig, pool: Pool) -> list[UnitRecord]:
    """All units that are not done yet.

    With holdout and few files both sides get one: when one side stays empty, files are distributed again among the
    usable ones. Of many files the side of each follows from its content alone, so that none is read beforehand.
    """
    hashes = [table.hashes(number) for number in range(units.count)] if units.kept_hashes else []
    usable = sorted(digest for unit in hashes for digest in unit)
    with contextlib.suppress(FileNotFoundError):
        usable = json.loads((units.root / USABLE).read_text())
    while True:
        valid = choose_valid(usable, config.holdout)
        todo = []
        for number in range(units.count):
            record = read_record(units, number)
            if record is None or (hashes and sorted(record.valid) != sorted(valid.intersection(hashes[number]))):
                todo.append(number)
        if len(todo) < units.count:
            print(f"{units.count - len(todo)} of {units.count} units are done already")
        _run_units(units, todo, table, valid.__contains__ if hashes else lambda one: below(one, config.holdout), pool)
        records = [record for number in range(units.count) if (record := read_record(units, number))]
        kept = {digest for record in records for digest in record.kept_hashes}
        usable_now = [digest for digest in usable if digest in kept]
        if not hashes or len(usable_now) < 2 or len({digest in valid for digest in usable_now}) == 2:
            return records
        usable = usable_now  # all files of one part were unusable: choose again among those that are
        write_atomically(units.root / USABLE, json.dumps(usable))


def _run_units(
    units: UnitConfig, todo: list[int], table: SourceTable, is_valid: Callable[[str], bool], pool: Pool
) -> None:
    sizes = table.sizes()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("time left"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[inside]}", markup=False)) as progress:
        task = progress.add_task("files", total=sum(sizes[number][0] for number in todo), inside="")

        def done() -> None:
            progress.update(task, advance=1, inside="")

        def inside(name: str, done: int, windows: int) -> None:
            progress.update(
                task, inside=f"{name[-40:]}: window {done}/{windows}" if windows else f"{name[-40:]}: opening"
            )

        for number in todo:
            progress.update(task, description=f"unit {number}/{units.count}, files")
            run_unit(units, number, table.unit(number), is_valid, pool, Listener(done, inside))


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
        ("holdout", 0 <= config.holdout < 1, "must be at least 0 and below 1"),
        ("workers", config.workers >= 0, "must be at least 0"),
        ("timeout", config.timeout > 0, "must be above 0 seconds"),
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
