"""Adds another captioner's text to a finished dataset, from a table of captions; video shards stay unchanged.

    mova caption dataset=DIR table=captions.parquet captioner=qwen
    mova caption dataset=DIR table=clips.csv captioner=short columns={source: video, caption: text}
    mova caption ... unit=$SLURM_ARRAY_TASK_ID/16        # one of 16 jobs; the last one to end installs the result

A table (CSV, TSV, JSONL, Parquet) has a column `caption` and either `key` (of windows) or `source` (of files, named as
at preparation), with `start` and `end` (or `seconds`) where a row is for a part of the file: it applies to the windows
whose middle lies in [start, end). docs/curation.md explains what happens to rows and windows that do not match.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from rich.progress import Progress

from core.compose import Schema
from core.durable import sync_folder, write_atomically
from core.locks import byte_locked_now, lock_now, lock_when_free
from core.program import Call, Program
from core.terminal import escape_letters
from data.codec import EncoderConfig, TextCodec, check_codec, codecs_of, warn_of_libraries
from data.dataset.build import add_captioner, keep_own
from data.dataset.checksum import sha256
from data.dataset.index import DatasetIndex
from data.dataset.rows import save_rows
from data.dataset.shards import TextTar
from data.errors import DamagedSample, DataError
from data.prepare.claim import MARKER, begin, claim, differences
from data.prepare.finish import RECORD as PREPARED
from data.sources.caption_table import COLUMNS, NEEDED, CaptionMatches, CaptionTable, Counted, copy_table
from data.sources.cells import TableLayout

VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TABLE, TARS, FOUND, ROWS = "table", "tars", "found", "rows"  # folders of the unfinished work
SHARDS, FINISH = ".shards", ".finish"  # files in it that are locked: a byte a shard; by the process that ends the work


@dataclass
class CaptionConfig:
    """A finished dataset, and a table of captions for it.

    dataset: its folder, with parts train/ and valid/ or without
    table: file of captions (CSV, TSV, JSONL, Parquet)
    captioner: a new name, by which training selects these captions: letters, digits and . _ -
    columns: the table's names for key, source, start, end, seconds, caption, if they differ, or positions in a CSV
        file without header
    delimiter: of a CSV file; "": detected
    unit: i/n: only the i-th of n shares of the shards (0/n to n-1/n)
    device: where the text codec of the dataset runs: cpu, cuda or cuda:N
    """

    dataset: str = MISSING
    table: str = MISSING
    captioner: str = MISSING
    columns: dict[str, Any] = field(default_factory=dict)
    delimiter: str = ""
    unit: str = ""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    device: str = "cpu"


@dataclass(frozen=True)
class Work:
    """One captioner's unfinished text. shards: (part, number of the shard in it) of the whole dataset, in order."""

    captioner: str
    text: TextCodec
    root: Path  # of the dataset
    indices: dict[str, DatasetIndex]  # by part
    settings: dict[str, Any]
    folder: Path
    shards: list[tuple[str, int]]

    @property
    def record(self) -> Path:
        """The record of how the captions were made, in the finished dataset."""
        return self.root / f"caption-{self.captioner}.json"

    def path(self, kind: str, part: str, number: int) -> Path:
        """Of a shard: its FOUND, or its ROWS, whose file says that the shard is done."""
        return self.folder / kind / part / f"{number:06d}.npz"


def caption(config: CaptionConfig) -> dict[str, Any]:
    """Write the captions of `config`, unless they exist. Returns their record (caption-<captioner>.json).

    With config.unit only that share is done; the record is empty until the last one has ended. DataError for bad
    settings, another text codec than the dataset's, a captioner that exists with other captions, an unreadable table.
    """
    unit = _check(config)
    work = _plan(config)
    record = _existing(work)
    if record and not (work.folder / MARKER).exists():  # else a run was killed while it put them in place
        _tidy(work)
        print(f"the captions by {work.captioner} in {work.root} are complete already: nothing to do")
        return record
    _check_codec(work, config)
    with claim(work.folder, unit is not None, "data.caption"):
        begin(work.folder, work.settings, shared=unit is not None)
        table = _open_table(work, Path(config.table), config)
        number, count = unit or (0, 1)
        with _lock(work.folder / f".unit-{number}-of-{count}", f"unit {number}/{count} of {work.folder}"):
            _write_shards(work, table, work.shards[number::count])
        missing = sum(not work.path(ROWS, *shard).exists() for shard in work.shards)
        if missing and work.folder.is_dir():
            print(f"{missing} of {len(work.shards)} shards remain to be done; the last unit to end installs the result")
            return {}
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):  # another unit that ended together with this one was first
                lock = stack.enter_context(open(work.folder / FINISH, "a"))
                lock_when_free(lock)
            if not (work.folder / MARKER).exists():
                content: dict[str, Any] = json.loads(work.record.read_text("utf-8"))
                return content
            record = _finish(work, table)
    _print_summary(work, record["summary"])
    return record


def _check(config: CaptionConfig) -> tuple[int, int] | None:
    """DataError for an impossible setting. Returns (i, n) of unit=i/n."""
    if not NAME.fullmatch(config.captioner):
        raise DataError(f"captioner={config.captioner!r}: use letters, digits, '.', '_', '-', a letter or digit first")
    TableLayout(config.columns, config.delimiter).check(COLUMNS, NEEDED)
    if not Path(config.table).is_file():
        raise DataError(f"table={config.table} is not a file")
    if not config.unit:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", config.unit)
    if match is None or not int(match[1]) < int(match[2]):
        raise DataError(f"unit={config.unit} must be i/n with i from 0 to n-1, for example unit=0/16")
    return int(match[1]), int(match[2])


def _plan(config: CaptionConfig) -> Work:
    root = Path(config.dataset)
    parts = [path.parent.parent.name for path in sorted(root.glob("*/index/dataset.json"))]
    parts = ["."] if (root / "index").is_dir() or not parts else parts
    indices = {part: DatasetIndex.open(root / part, check_files=False) for part in parts}
    text = _codec(config, indices)
    settings = {
        "version": VERSION,
        "table": sha256(Path(config.table)),
        "columns": dict(config.columns),
        "delimiter": config.delimiter,
        "encoder": text.fingerprint,
        "datasets": {part: index.fingerprint for part, index in indices.items()},
    }
    shards = [(part, number) for part, index in indices.items() for number in range(len(index.shards))]
    folder = root / f"caption-{config.captioner}.partial"
    return Work(config.captioner, text, root, indices, settings, folder, shards)


def _existing(work: Work) -> dict[str, Any] | None:
    """The record of these captions when they are complete, None when there is something to do.

    DataError when the captioner has other captions.
    """
    there = [part for part, index in work.indices.items() if work.captioner in index.captioners]
    if not there:
        return None
    another = f"write these under another name (captioner={work.captioner}-2): captions never change under their name"
    if not work.record.is_file():
        raise DataError(f"{work.root} already has captions by {work.captioner!r}; {another}")
    record: dict[str, Any] = json.loads(work.record.read_text("utf-8"))
    if different := differences(record["settings"], work.settings):
        raise DataError(f"{work.root} has other captions by {work.captioner!r} ({different}); {another}")
    return record if len(there) == len(work.indices) else None


def _codec(config: CaptionConfig, indices: dict[str, DatasetIndex]) -> TextCodec:
    """The text codec of the dataset. DataError if it is not available here."""
    index = next(iter(indices.values()))
    if "text" not in index.encoders:
        raise DataError(f"{index.root} does not record how its text was encoded: prepare the dataset again")
    text = {"text": index.encoders["text"]}
    return codecs_of(text, str(index.root), config.encoder, config.device, index.text_dim).text


def _check_codec(work: Work, config: CaptionConfig) -> None:
    """DataError when the text codec here is not the one of the dataset."""
    with contextlib.suppress(FileNotFoundError):  # a dataset that was not made by `mova prepare`
        prepared = json.loads((work.root / PREPARED).read_text("utf-8"))["summary"]
        warn_of_libraries(work.text, prepared.get("libraries", {}), str(work.root))
    for index in work.indices.values():
        check_codec(work.text, index.encoders, str(index.root), config.encoder)
        if not torch.equal(work.text.encode([""])[0].bfloat16(), index.empty_text()):
            raise DataError(f"{index.root} has another encoding of the empty prompt than {work.text.fingerprint} gives")


@contextlib.contextmanager
def _lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    with open(path, "a") as file:
        if wait:
            lock_when_free(file)
        elif not lock_now(file):
            raise DataError(f"another data.caption is at {what}; wait until it has ended")
        yield


def _open_table(work: Work, path: Path, config: CaptionConfig) -> CaptionTable:
    """The table laid out on disk; the first unit does it, others wait."""
    final, unfinished = work.folder / TABLE, work.folder / f"{TABLE}.tmp"
    with _lock(work.folder / f".{TABLE}", f"the table of {work.folder}", wait=True):
        if not final.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            copy_table(path, config.columns, config.delimiter, unfinished)
            os.rename(unfinished, final)
    return CaptionTable(final)


def _write_shards(work: Work, table: CaptionTable, shards: list[tuple[str, int]]) -> None:
    todo = [shard for shard in shards if not work.path(ROWS, *shard).exists()]
    if len(todo) < len(shards):
        print(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
    for kind in (TARS, FOUND, ROWS):
        for part in work.indices:
            (work.folder / kind / part).mkdir(parents=True, exist_ok=True)
    with Progress() as progress, open(work.folder / SHARDS, "ab") as locks:
        task = progress.add_task("shards", total=len(todo))
        for shard in todo:
            with byte_locked_now(locks, work.shards.index(shard)) as mine:  # shares that were cut otherwise may overlap
                if mine and not work.path(ROWS, *shard).exists():
                    _write_shard(work, table, *shard)
            progress.advance(task)


def _write_shard(work: Work, table: CaptionTable, part: str, number: int) -> None:
    """Write the text of one shard, what was found for it, and last its rows for the index."""
    index = work.indices[part]
    rows = range(int(index.shard_start[number]), int(index.shard_start[number + 1]))
    keys = [index.key(row) for row in rows]
    found = _find(index, table, keys, rows)
    tar = TextTar(work.folder / TARS / part, work.captioner, index.shards[number]["name"][3:-4])
    try:
        for key, words in zip(keys, found.captions, strict=True):
            embedding = index.empty_text() if words is None else work.text.encode([words])[0]
            tar.add(key, {"caption": words}, embedding)
    except BaseException:
        tar.abandon()
        raise
    written = tar.close()
    sync_folder(tar.path.parent)
    without = np.array([key for key, words in zip(keys, found.captions, strict=True) if words is None], "S24")

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, used=found.rows[found.rows >= 0], further=found.further, without=without)

    write_atomically(work.path(FOUND, part, number), write)
    save_rows(work.path(ROWS, part, number), written)


def _find(index: DatasetIndex, table: CaptionTable, keys: list[str], rows: range) -> CaptionMatches:
    if table.by == "key":
        return table.find(keys, [0.0] * len(keys))
    names, middles = [], []
    for key, row in zip(keys, rows, strict=True):
        try:
            meta = index.read_meta(row)
        except DamagedSample:  # it is not trained on; its text says nothing
            meta = {"source": "", "start": 0, "seconds": 0}
        try:
            names.append(str(meta["source"]))
            middles.append(float(meta["start"]) + float(meta["seconds"]) / 2)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"window {key} of {index.root} does not record its source, start and seconds: give a table by `key`"
            ) from error
    return table.find(names, middles)


def _finish(work: Work, table: CaptionTable) -> dict[str, Any]:
    """Put the finished text in place: the tars get their names, the record is written, the index takes them in."""
    summary = _summary(work, table)
    if summary["without"]["count"] == summary["windows"]:
        raise DataError(
            f"no row of the table meets a window of {work.root}: it names, by {table.by}, {_names(table)}; the dataset "
            f"has {_first_window(work, table.by)}. Nothing was written"
        )
    for part, index in work.indices.items():
        keep_own(work.root / part)
        for shard in index.shards:
            name = f"text-{work.captioner}-{shard['name'][3:]}"
            with contextlib.suppress(FileNotFoundError):  # a run that was killed here has moved it
                os.rename(work.folder / TARS / part / name, work.root / part / name)
        sync_folder(work.root / part)
    record = {"settings": work.settings, "summary": summary}
    write_atomically(
        work.record, lambda path: path.write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")
    )
    for part, index in work.indices.items():
        rows = [work.path(ROWS, part, number) for number in range(len(index.shards))]
        add_captioner(work.root / part, work.captioner, rows)
    _tidy(work)
    return record


def _tidy(work: Work) -> None:
    """Remove the unfinished work; first the marker, by which other units see that all is in place."""
    (work.folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(work.folder, ignore_errors=True)


def _summary(work: Work, table: CaptionTable) -> dict[str, Any]:
    used, further = np.zeros(len(table), bool), np.zeros(len(table), bool)
    without = Counted()
    for shard in work.shards:
        with np.load(work.path(FOUND, *shard), allow_pickle=False) as found:
            used[found["used"]] = further[found["further"]] = True
            for key in found["without"].tolist():
                without.add(key.decode())
    rows = {"unmatched": ~used & ~further, "duplicate": further}
    counts = {name: table.counts[name] for name in ("by", "rows", "empty", "unusable")}
    return {
        **counts,
        "libraries": work.text.libraries,
        **{name: vars(_counted(table, np.flatnonzero(flags))) for name, flags in rows.items()},
        "windows": sum(map(len, work.indices.values())),
        "without": vars(without),
    }


def _names(table: CaptionTable) -> str:
    return ", ".join(table.row(row)["name"] for row in range(min(3, len(table)))) + ", ..."


def _first_window(work: Work, by: str) -> str:
    index = next(index for index in work.indices.values() if len(index))
    if by == "key":
        return f"{index.key(0)}, ..."
    meta = index.read_meta(0)
    return f"{meta['source']} from {meta['start']:g} to {meta['start'] + meta['seconds']:g} s, ..."


def _counted(table: CaptionTable, rows: np.ndarray) -> Counted:
    counted = Counted(len(rows))
    for row in rows[:3].tolist():
        content = table.row(row)
        counted.examples.append(f"row {content['row']} ({content['name']})")
    return counted


def _print_summary(work: Work, summary: dict[str, Any]) -> None:
    windows, without = summary["windows"], summary["without"]["count"]
    print(f"captions by {work.captioner}: {windows - without} of {windows} windows have one")
    kinds = {
        "without": "windows without a caption",
        "unmatched": f"rows whose {summary['by']} no window has",
        "duplicate": "rows for a window that an earlier row captions",
        "empty": "rows without a caption",
        "unusable": "rows that can't be used",
    }
    for name, what in kinds.items():
        if summary[name]["count"]:
            print(f"  {summary[name]['count']} {what}: {', '.join(summary[name]['examples'])}, ...")
    print(f"train on them: data.captioners={{{work.captioner}: 1.0}}; all counts: {work.record}")


def _run(call: Call[CaptionConfig]) -> None:
    caption(call.config)


PROGRAM = Program(
    "caption", __doc__, _run, schema=Schema("caption", CaptionConfig, (("encoder", None),)), before=escape_letters
)

if __name__ == "__main__":
    PROGRAM.start()
