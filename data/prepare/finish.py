"""Assembles the units of data.prepare: tables, report, selections, index; then the folder gets its name."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.durable import sync_folder, write_atomically
from data.dataset.build import assemble
from data.dataset.index import DatasetIndex
from data.dataset.rows import AV
from data.dataset.shards import write_captioners, write_empty_text
from data.errors import DataError
from data.prepare.claim import MARKER, SOURCES_LOCK
from data.prepare.pipeline import Pipeline
from data.prepare.report import SAMPLES, write_report
from data.prepare.unit import (
    CAPTIONER,
    FIRST,
    UNITS,
    UnitConfig,
    UnitRecord,
    rejected_path,
    rows_path,
    table_path,
    thumbnails_path,
)
from data.sources.table import NAME as SOURCES
from data.sources.table import SourceTable
from data.windows.table import SCORES, merge

FINISH = ".finish"  # locked by the process that puts the units together
RECORD = "prepare.json"
REJECTED = "rejected.jsonl"
USABLE = "usable.json"  # in the folder of unfinished work: hashes of the files that gave samples


def finish(
    units: UnitConfig,
    source: str,
    output: Path,
    settings: dict[str, Any],
    records: list[UnitRecord],
    pipeline: Pipeline,
    table: SourceTable,
    only: bool,
) -> dict[str, Any]:
    """Put the units together: tables, report, index; then the folder gets its name. Returns its record.

    table: of the files of `source`; only: single units were done. DataError when nothing was kept, or (only)
    nothing on one side.
    """
    partial = units.root
    numbers = range(units.count)
    write_atomically(partial / REJECTED, lambda path: _concatenate([rejected_path(partial, n) for n in numbers], path))
    merge([table_path(partial, number) for number in numbers], partial / SCORES)
    summary = _summary(records, table.files) | table.summary
    write_report(partial, summary, pipeline.filter, _thumbnails(units))
    if not summary["buckets"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in list(summary["rejected"].items())[:3])
        raise DataError(
            f"nothing was kept of {table.files} files in {source}: {reasons}. All reasons are in {partial / REJECTED}"
        )
    parts = sorted({entry["part"] for entry in summary["buckets"]})
    if only and set(parts) != set(units.parts):  # without unit=, one usable file is allowed to make train alone
        missing = ", ".join(set(units.parts) - set(parts))
        raise DataError(f"all usable files went to one side, {missing} is empty: choose another holdout")
    for part in parts:
        write_empty_text(partial / part, units.text.encode([""])[0])
        write_captioners(partial / part, [CAPTIONER], [])
        if not pipeline.config.filters.drop:
            from data.windows.selections import write_selection

            write_selection(partial, part, pipeline.filter, pipeline.columns)
        _write_index(units, part, sum(entry["samples"] for entry in summary["buckets"] if entry["part"] == part))
    record = {"settings": settings, "summary": summary}
    write_atomically(partial / RECORD, json.dumps(record, indent=1))
    if output.is_dir():
        output.rmdir()  # the caller has seen that it is empty
    os.rename(partial, output)
    sync_folder(output.parent)
    tidy(output)
    return record


def _write_index(units: UnitConfig, part: str, samples: int) -> None:
    """Put the index of a part together from what the units wrote beside their shards. DataError when it lacks some."""
    root = units.root / part
    parts = {
        column: [rows_path(units.root, number, part, column) for number in range(units.count)]
        for column in (AV, f"text-{CAPTIONER}")
    }
    assemble(root, {column: [path for path in paths if path.exists()] for column, paths in parts.items()}, [CAPTIONER])
    index = DatasetIndex.open(root)  # looks at the size of every shard
    index.close()
    if len(index) != samples:
        raise DataError(
            f"{root} has rows of {len(index)} samples, its units wrote {samples}: a file of {units.root / UNITS} is "
            f"gone; rebuild the index: mova index dir={root}"
        )


def _concatenate(paths: Iterable[Path], target: Path) -> None:
    with open(target, "wb") as whole:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, whole, 1 << 20)


def _thumbnails(units: UnitConfig) -> list[dict[str, Any]]:
    """The windows that the report shows: of each kind (kept, not kept) those of the lowest keys."""
    chosen: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for number in range(units.count):
        for one in json.loads(thumbnails_path(units.root, number).read_bytes()):
            chosen[one["stored"]].append(one)
        chosen = {stored: sorted(some, key=lambda one: one["key"])[:SAMPLES] for stored, some in chosen.items()}
    return chosen[True] + chosen[False]


def tidy(output: Path) -> None:
    """Remove what only unfinished work needs; the marker last."""
    shutil.rmtree(output / UNITS, ignore_errors=True)
    for name in (USABLE, "settings.json", FINISH, SOURCES, SOURCES_LOCK, MARKER):
        (output / name).unlink(missing_ok=True)


def _summary(records: list[UnitRecord], files: int) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    cpu: Counter[str] = Counter()
    buckets: Counter[tuple[str, str]] = Counter()
    libraries: dict[str, list[str]] = {}
    for record in records:
        for name, version in record.libraries.items():
            libraries[name] = sorted({*libraries.get(name, []), version})
        rejected.update(record.rejected)
        for kind, names in record.examples.items():
            examples[kind] = [*examples.get(kind, []), *names][:FIRST]
        cpu.update(record.cpu)
        buckets.update({(part, bucket): count for part, bucket, count in record.buckets})
    return {
        "files": files,
        "kept": sum(record.kept for record in records),
        "rejected": dict(rejected.most_common()),
        "rejected_examples": {kind: examples[kind] for kind, _ in rejected.most_common()},
        "windows": sum(buckets.values()),
        "windows_rejected": sum(record.windows_rejected for record in records),
        "windows_seen": sum(record.windows for record in records),
        "seconds": sum(record.stored_seconds for record in records),
        "source_seconds": sum(record.span_seconds for record in records),
        "rest_seconds": sum(record.rest_seconds for record in records),
        "buckets": [
            {"part": part, "bucket": name, "samples": count} for (part, name), count in sorted(buckets.items())
        ],
        "libraries": libraries,
        "cpu_seconds": {stage: round(seconds, 3) for stage, seconds in sorted(cpu.items())},
        "wall_seconds": round(sum(record.wall for record in records), 1),
    }


def listing_lines(summary: dict[str, Any]) -> list[str]:
    """What the listing of the sources noticed: captions, and what was found beside the files that were tried."""
    noticed = [(f"not tried: {kind}", entry) for kind, entry in summary.get("beside", {}).items()]
    for name, words in (("without_caption", "without caption"), ("several_captions", "with several captions")):
        noticed += [(words, summary[name])] if name in summary else []  # older datasets have none
    return [
        f"  {entry['count']} {words}: {', '.join(entry['first'])}" + ", ..." * (entry["count"] > len(entry["first"]))
        for words, entry in noticed
        if entry["count"]
    ]


def waiting_lines(seconds: Mapping[str, float], devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who waited for whom, where devices encode: the workers' and this process's seconds of all units, each device's of
    this call. No lines without devices."""
    if not devices:
        return []
    waits = {name: spent for name, spent in seconds.items() if name.startswith("wait for ")}
    here = {name: seconds.get(name, 0.0) for name in ("text", "write")}
    own = sum(spent for name, spent in seconds.items() if name not in waits and name not in here)
    words = ", ".join(f"{name.split()[2]} {spent:.1f}" for name, spent in waits.items())
    lines = [
        f"workers: decoding and scoring {own:.1f} s (processor), waiting {sum(waits.values()):.1f} s ({words})",
        f"this process: text {here['text']:.1f} s, writing {here['write']:.1f} s (processor)",
    ]
    for one in devices:
        busy = sum(one["busy"].values())
        words = ", ".join(f"{what} {spent:.1f}" for what, spent in one["busy"].items())
        lines.append(
            f"{one['device']}: at work {busy:.1f} of {one['there']:.1f} s ({words}), {one['requests']} requests"
        )
    return lines


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Lines for the user: files, windows, seconds, buckets, and where everything lies."""
    print(f"files: {summary['files']} found, {summary['kept']} kept, {summary['files'] - summary['kept']} rejected")
    for line in listing_lines(summary):
        print(line)
    for reason, count in list(summary["rejected"].items())[:20]:
        names = summary["rejected_examples"][reason]
        print(f"  rejected {count}: {reason} ({', '.join(names)}{', ...' if count > len(names) else ''})")
    print(
        f"windows: {summary['windows']} kept ({summary['seconds']:.1f} s), {summary['windows_rejected']} rejected; "
        f"{summary['rest_seconds']:.1f} s of the files are in no window"
    )
    for entry in summary["buckets"]:
        print(f"  {entry['samples']} in {output / entry['part']}: {entry['bucket']}")
    for name, versions in summary.get("libraries", {}).items():
        if len(versions) > 1:
            words = " and ".join(versions)
            print(f"WARNING: units were encoded with {name} {words}: their latents may differ in the last bits")
    if summary["rejected"] or summary["windows_rejected"]:
        print(f"reasons: {output / REJECTED}")
    print(f"scores of every window: {output / SCORES}; report: {output / 'report.html'}")
    print(f"dataset: {output}")
