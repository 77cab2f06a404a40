"""Imports latents computed by other software as a dataset.

    mova import source=FOLDER output=dataset encoders.video=wan2.1-vae encoders.audio=dac-128 fps=24
    mova import source='tars/*.tar' output=dataset encoders.video=wan2.1-vae fps=24 \
        +members.video=latent.safetensors +members.condition=first.npy +members.caption=txt +members.meta=json

A folder holds a .safetensors a sample (data/latents.py says what is asked of its tensors), with `clip.json` and
`clip.txt` (caption) beside `clip.safetensors`. A tar is a WebDataset shard; `members` says which of its members are
what. docs/import.md has all settings.

Every file, and every sample of a tar, gets one verdict: it is stored, or stands in `output/rejected.jsonl` with the
reason. Everything is written to `output.partial` first, in units: a run that was killed continues with the first
missing unit, and `output` is complete from the moment it exists.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor

from core.compose import Schema
from core.durable import sync_folder, write_atomically
from core.program import Call, Program
from core.ranges import bounded
from core.terminal import escape_letters
from data.dataset.build import assemble
from data.dataset.index import DatasetIndex
from data.dataset.record import PLAIN_NAME
from data.dataset.rows import AV
from data.dataset.scan import PICKLES
from data.dataset.shards import ShardWriter, write_captioners, write_empty_text
from data.errors import DataError
from data.foreign.files import BESIDE, TARS, Foreign, folder_sample, refused, tar_samples, walk
from data.foreign.latents import AXES, LatentsConfig, Maker
from data.foreign.unit import ImportRecord, ImportUnit, clear_from, open_seen, read_record, rejected_path, rows_path
from data.prepare.claim import MARKER, begin, claim, differences
from data.prepare.unit import UNITS
from data.sources.verdict import name_of

RECORD = "import.json"
REJECTED = "rejected.jsonl"
SEEN = "seen.sqlite"  # in the folder of unfinished work
FILES_A_UNIT, TARS_A_UNIT = 1000, 16


@dataclass
class ImportConfig(LatentsConfig):
    """The latents to import, and the dataset to create.

    source: a folder of .safetensors or of tars, with its subfolders; a pattern; or one file
    output: folder of the dataset
    members: of tars: which member is video, audio, condition, text, caption, meta, {video: latent.safetensors}
    empty_text: .safetensors with `text` [L, D]: the empty prompt, where texts are embeddings from elsewhere
    captioner: a name for the source of the captions
    samples_per_shard: number of samples after which a shard is closed; 0: no such limit
    shard_mb: megabytes after which a shard is closed; 0: no such limit
    sample_mb: largest size of a sample in megabytes, in memory too
    """

    source: str = MISSING
    output: str = MISSING
    members: dict[str, str] = field(default_factory=dict)
    empty_text: str = ""
    captioner: str = "builtin"
    samples_per_shard: int = bounded(64, "[0, inf)")
    shard_mb: int = bounded(1000, "[0, inf)")
    sample_mb: int = bounded(2000, "[1, inf)")


def import_latents(config: ImportConfig) -> dict[str, Any]:
    """Make the dataset of `config`, unless it exists. Returns its record (as in output/import.json).

    DataError for bad settings, a source without files, an output that holds something else, and when nothing is stored.
    """
    _check(config)
    maker = Maker(config, _read_empty_text(config.empty_text))
    files = Files(config)
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    settings = json.loads(json.dumps(settings))
    output = Path(config.output)
    if record := _existing(output, settings, files):
        print(f"{output} is already complete, made from the same files with the same settings: nothing to do")
        return record
    partial = output.with_name(output.name + ".partial")
    total, listing, number, cleared = ImportRecord(""), hashlib.sha256(), -1, False
    with claim(partial, shared=False, program="data.import_latents"):
        begin(partial, settings, shared=False)
        with contextlib.closing(open_seen(partial / SEEN)) as seen, _progress() as advance:
            for number, paths in enumerate(files.units()):
                digest = files.digest(paths)
                listing.update(digest.encode())
                unit = read_record(partial, number, digest)
                if unit is None:
                    if not cleared:
                        clear_from(partial, number, total.stop, seen)
                        cleared = True
                    writer = ShardWriter(
                        partial, config.samples_per_shard, config.captioner, shard_bytes=config.shard_mb * 1000**2,
                        first=total.stop,
                    )  # fmt: skip
                    unit = ImportUnit(partial, number, maker, seen).run(
                        files.samples(paths), writer, digest, total.stop, advance
                    )
                total.add(unit)
            if not cleared:
                clear_from(partial, number + 1, total.stop, seen)
        summary = asdict(total)
        del summary["listing"], summary["stop"]
        record = {"settings": settings, "listing": listing.hexdigest(), "summary": summary}
        _finish(config, partial, maker, record, number + 1)
        _print_summary(summary, output)
    return record


class Files:
    """What there is to import, in a fixed order, without a list of all."""

    def __init__(self, config: ImportConfig):
        """DataError when there are none, or both kinds, or `members` doesn't fit."""
        self.config = config
        self.root, find = _find(config.source)
        output = Path(config.output).absolute()
        ours = (f"{output}/", f"{output}.partial/")  # which may lie in the source

        def found() -> Iterator[Path]:
            return (path for path in find() if not str(path.absolute()).startswith(ours))

        self.found = found
        first = [path.name.lower() for path in islice(self.found(), 10_000)]
        both = [any(map(_is_tar, first)), any(name.endswith(".safetensors") for name in first)]
        if both == [False, False]:
            raise DataError(f"source {config.source} holds neither .safetensors nor tars; give a folder or a pattern")
        if both == [True, True]:
            raise DataError(f"source {config.source} holds tars and .safetensors; give a pattern such as 'DIR/*.tar'")
        self.tars = both[0]
        self.members = _check_members(config.members, self.tars)

    def units(self) -> Iterator[list[Path]]:
        """Files that are done together."""
        files = (path for path in self.found() if path.suffix.lower() not in BESIDE)
        while unit := list(islice(files, TARS_A_UNIT if self.tars else FILES_A_UNIT)):
            yield unit

    def digest(self, paths: list[Path]) -> str:
        """Changes when a file comes, goes or changes its size or time."""
        digest = hashlib.sha256()
        for path in paths:
            beside = [path, *(path.with_suffix(ending) for ending in (() if self.tars else BESIDE))]
            for each in beside:
                try:
                    stat = each.stat()
                    what: Any = (stat.st_size, stat.st_mtime_ns)
                except OSError:
                    what = None
                digest.update(repr([os.fsencode(each.relative_to(self.root)), what]).encode())
        return digest.hexdigest()

    def samples(self, paths: list[Path]) -> Iterator[Foreign]:
        """Everything that gets a verdict, file by file."""
        limit = self.config.sample_mb * 1000**2
        for path in paths:
            name = name_of(str(path.relative_to(self.root)))
            if self.tars and not _is_tar(name):
                yield refused(name, "is not a tar")
            elif self.tars:
                yield from tar_samples(path, name, self.members, self.config.tensors, limit)
            else:
                yield folder_sample(path, name, self.config.tensors, limit)


def _find(source: str) -> tuple[Path, Callable[[], Iterator[Path]]]:
    path = Path(source)
    if path.is_dir():
        return path, lambda: walk(path)
    if path.is_file():
        return path.parent, lambda: iter([path])
    if glob.has_magic(source):
        files = sorted(Path(found) for found in glob.glob(source, recursive=True) if Path(found).is_file())
        if files:
            return Path(os.path.commonpath([found.parent for found in files])), lambda: iter(files)
    raise DataError(f"source {source} does not exist; give a folder of .safetensors or tars, a pattern, or a file")


def _is_tar(name: str) -> bool:
    return name.lower().endswith(TARS)


def _check_members(members: dict[str, str], tars: bool) -> dict[str, str]:
    """In lower case, without a leading dot. DataError for what can't be read, or holds pickled objects."""
    if not tars and members:
        raise DataError("members is for tars; the tensors of .safetensors are named by tensors.*")
    if tars and not set(members) & {"video", "audio"}:
        raise DataError("say which members of the tars are what, as in +members.video=latent.safetensors")
    found = {}
    for kind, name in members.items():
        ending = name.lower().lstrip(".")
        last = ending.rpartition(".")[2]
        if kind not in (*AXES, "caption", "meta"):
            raise DataError(f"members.{kind} is none of {', '.join([*AXES, 'caption', 'meta'])}")
        if kind in AXES and last not in ("safetensors", "npy"):
            why = "may hold pickled objects, which run code when loaded" if last in PICKLES else "is not read"
            raise DataError(f"members.{kind}={name} {why}; store tensors as .safetensors or .npy")
        found[kind] = ending
    return found


def _check(config: ImportConfig) -> None:
    for name in ("samples_per_shard", "shard_mb"):
        if getattr(config, name) < 0:
            raise DataError(f"{name}={getattr(config, name)} must be at least 0")
    if config.samples_per_shard + config.shard_mb == 0:
        raise DataError("samples_per_shard=0 needs shard_mb above 0")
    if config.sample_mb < 1:
        raise DataError(f"sample_mb={config.sample_mb} must be at least 1")
    if not PLAIN_NAME.fullmatch(config.captioner):
        raise DataError(f"captioner={config.captioner} must have letters, digits and . _ + = - only")


def _read_empty_text(path: str) -> Tensor | None:
    if not path:
        return None
    try:
        text = load_file(path)["text"]
    except Exception as error:  # safetensors raises its own class, a missing tensor KeyError
        message = f"empty_text={path} is not a .safetensors with a tensor text ({type(error).__name__}: {error})"
        raise DataError(message) from error
    text = text[0] if text.ndim == 3 and len(text) == 1 else text
    if text.ndim != 2 or 0 in text.shape or not text.is_floating_point() or not bool(text.isfinite().all()):
        raise DataError(f"empty_text={path} holds text of shape {tuple(text.shape)}; expected finite numbers [L, D]")
    return text.bfloat16()


def _existing(output: Path, settings: dict[str, Any], files: Files) -> dict[str, Any] | None:
    """The record of the dataset in `output` when it is that of `settings`; None when there is nothing."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / RECORD).is_file():
        raise DataError(f"output {output} exists and is not a dataset of data.import_latents; choose another folder")
    record: dict[str, Any] = json.loads((output / RECORD).read_text("utf-8"))
    different = differences(record["settings"], settings)
    listing = hashlib.sha256("".join(files.digest(paths) for paths in files.units()).encode()).hexdigest()
    if different or listing != record["listing"]:
        what = different or "the source files differ"
        raise DataError(f"output {output} holds another dataset ({what}); choose another folder or delete it")
    DatasetIndex.open(output).close()  # raises when a shard was lost
    _tidy(output)
    return record


def _finish(config: ImportConfig, partial: Path, maker: Maker, record: dict[str, Any], units: int) -> None:
    """Index and verdicts; then the folder gets its name. DataError when nothing is stored."""

    def gather(path: Path) -> None:
        with open(path, "wb") as target:
            for number in range(units):
                with open(rejected_path(partial, number), "rb") as source:
                    shutil.copyfileobj(source, target)

    write_atomically(partial / REJECTED, gather)
    summary, output = record["summary"], Path(config.output)
    if not summary["stored"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in _most(summary["rejected"])[:3])
        raise DataError(
            f"nothing of {summary['inputs']} in {config.source} can be stored: {reasons}. All reasons are in "
            f"{partial / REJECTED}"
        )
    write_empty_text(partial, maker.empty_text)
    write_captioners(partial, [config.captioner], [])
    _write_index(config, partial, units, summary["stored"])
    write_atomically(partial / RECORD, json.dumps(record, indent=1))
    if output.is_dir():
        output.rmdir()  # it was empty
    os.rename(partial, output)
    sync_folder(output.parent)
    _tidy(output)


def _write_index(config: ImportConfig, partial: Path, units: int, samples: int) -> None:
    """Put the index together from what the units wrote beside their shards. DataError when it lacks some."""
    parts = {}
    for column in (AV, f"text-{config.captioner}"):
        paths = (rows_path(partial, number, column) for number in range(units))
        parts[column] = [path for path in paths if path.exists()]
    assemble(partial, parts, [config.captioner])
    index = DatasetIndex.open(partial)  # looks at the size of every shard
    index.close()
    if len(index) != samples:
        raise DataError(
            f"{partial} has rows of {len(index)} samples, its units wrote {samples}; delete it, begin again"
        )


def _tidy(output: Path) -> None:
    """Remove what only unfinished work needs; the marker last."""
    shutil.rmtree(output / UNITS, ignore_errors=True)
    for name in (SEEN, "settings.json", MARKER):
        (output / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[], None]]:
    with Progress(TextColumn("samples: {task.completed}"), TimeElapsedColumn()) as progress:
        task = progress.add_task("samples", total=None)
        yield lambda: progress.advance(task)


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    rejected = sum(summary["rejected"].values())
    print(f"samples: {summary['inputs']} found, {summary['stored']} stored, {rejected} rejected")
    for reason, count in _most(summary["rejected"])[:20]:
        print(f"  rejected {count}: {reason} ({', '.join(summary['examples'][reason])})")
    for bucket, count in _most(summary["buckets"])[:20]:
        print(f"  {count} of {bucket}")
    for kind, count in _most(summary["converted"]):
        print(f"  {count} with tensors of {kind}, which became bfloat16")
    if summary["without_caption"]:
        print(f"  {summary['without_caption']} without a caption")
    if rejected:
        print(f"reasons: {output / REJECTED}")
    print(f"dataset: {output}, {summary['seconds'] / 3600:.2f} h")


def _run(call: Call[ImportConfig]) -> None:
    import_latents(call.config)


PROGRAM = Program("import", __doc__, _run, schema=Schema("import", ImportConfig, ()), before=escape_letters)

if __name__ == "__main__":
    PROGRAM.start()
