"""Writes the folder of an export under a temporary name, and renames it when it is complete.

lines = export(ExportRequest(Path("runs/first"), Path("exported"), None, "mova", None, "bfloat16", None))
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from core.durable import sync_folder
from core.errors import RunError
from core.locks import lock_now
from data.codec import KINDS, Codecs, EncoderConfig, check_codec
from model.joint import JointConfig
from model.weights.configs import bridge_config, diffusers_config, tower_config
from model.weights.files import STEM, LayoutError, read_json
from model.weights.flat import flat_config
from model.weights.mova import ENCODERS, INDEX_FILE, inexpressible, model_index
from model.weights.write import write_json, write_weights
from tools.export.card import card
from tools.export.facts import training_facts
from tools.export.request import ExportRequest
from tools.export.tensors import DIFFUSERS, ExportedTensor, choose, folders, reader
from train.checkpoint.checkpoint import committed, damage, hold, step_of
from train.start.checkpoint_tensors import CheckpointTensors, model_of, read_state
from train.start.config import TRAINING

TRIES = 5  # to take hold of a checkpoint that a run may rotate away
SMALL_FILES = 1 << 20  # bytes, at most, of all that holds no weights


def export(
    order: ExportRequest,
    expect: Callable[[int], None] = lambda total: None,
    done: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Write an export; returns lines for the user, the last one naming what the folder still lacks, if anything.

    `expect` is told the bytes of all tensors, `done` those of each. RunError for a run without such a checkpoint, a
    format that cannot say what the model is, an `out` that exists, a disk without room; DataError for a base of other
    encoders; OSError as it comes.
    """
    if order.out.exists():
        raise RunError(f"out={order.out} already exists; give another folder, an export never overwrites one")
    path, held = _held_checkpoint(order.run, order.step)
    with held:
        state = read_state(path)
        model = model_of(state)
        if order.format != "safetensors" and (lost := inexpressible(model)):
            raise RunError(f"format={order.format} cannot say {', '.join(lost)}: give format=safetensors, which can")
        copied = _copied(order.base)
        facts = training_facts(order.run, path, state, order)
        if order.base is not None and facts["encoders"]:
            facts["base_encoders"] = _base_encoders(order.base, facts["encoders"], path, order.encoder)
        tensors = CheckpointTensors(path)
        chosen = choose(tensors, state, order.weights, order.dtype)
        total = sum(one.bytes for named in chosen.values() for one in named.values())
        _check_room(order.out, total + sum(_size(folder) for folder in copied))
        expect(total)
        lines = _write(order, facts, model, copied, chosen, tensors, done)
    if facts["encoders"] and not state.get("encoders"):
        lines.insert(0, f"{path} names no encoders; those of its data are assumed: {_named(facts['encoders'])}")
    return lines


def _held_checkpoint(run: Path, step: int | None) -> tuple[Path, IO[str]]:
    """The checkpoint, and what keeps its run from deleting it while that is open. RunError as `checkpoint_of`."""
    for _ in range(TRIES):
        path = checkpoint_of(run, step)
        if (held := hold(path)) is not None:
            return path, held
    raise RunError(f"{path} was deleted by its run in the meantime; try again", retry=True)


def checkpoint_of(run: Path, step: int | None) -> Path:
    """The newest committed checkpoint of a run, or that of a step. RunError where there is none that can be used."""
    there = committed(run / "checkpoints")
    if not there:
        raise RunError(f"run={run} has no committed checkpoint")
    found = [path for path in there if step is None or step_of(path) == step]
    if not found:
        steps = ", ".join(str(step_of(path)) for path in there)
        raise RunError(f"step={step}: run {run} has no such checkpoint; available: {steps}")
    if fault := damage(found[-1]):
        raise RunError(f"{found[-1]} cannot be used: {fault}")
    return found[-1]


def _write(
    order: ExportRequest,
    facts: dict[str, Any],
    model: JointConfig,
    copied: list[Path],
    chosen: dict[str, dict[str, ExportedTensor]],
    tensors: CheckpointTensors,
    done: Callable[[int], None],
) -> list[str]:
    partial = order.out.with_name(order.out.name + ".partial")
    with _alone(partial):
        for name, named in folders(order.format, chosen).items():
            folder = partial / name
            folder.mkdir(exist_ok=True)
            stem = STEM if name else "model"
            write_weights(
                folder, {key: one.bytes for key, one in named.items()}, reader(tensors, named), stem, done=done
            )
            write_json(folder / "config.json", _config(order.format, name, model))
        for folder in copied:
            shutil.copytree(folder, partial / folder.name, copy_function=shutil.copyfile)  # modes by the umask
        write_json(partial / TRAINING, facts)
        if order.format == "mova":
            write_json(partial / INDEX_FILE, _index(model, facts["boundary"] / 1000, order.base))
        (partial / "README.md").write_text(card(facts, model, order), encoding="utf-8")
        for folder in (partial, *(one for one in partial.iterdir() if one.is_dir())):
            sync_folder(folder)
        os.rename(partial, order.out)
    sync_folder(order.out.parent)
    lines = [
        f"{order.out}: step {facts['step']} of {order.run}, {facts['weights']} weights, {order.format}, {order.dtype}"
    ]
    lacking = [name for name in ENCODERS if not (order.out / name).is_dir()] if order.format == "mova" else []
    if lacking:
        lines.append(f"missing for MOVA.from_pretrained: {', '.join(lacking)} (base=MOVA_FOLDER copies them)")
    return lines


class _alone:
    """The partial folder, empty, while this process alone writes it. It is deleted where the export fails or is
    interrupted; what one left that was killed is written anew."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial

    def __enter__(self) -> None:
        partial = self._partial
        partial.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(partial.with_name(partial.name + ".lock"), "w")
        if not lock_now(self._lock):
            raise RunError(f"{partial} is being written by another export")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def _config(format: str, folder: str, model: JointConfig) -> dict[str, Any]:
    if not folder:
        return flat_config(model)
    if folder == "dual_tower_bridge":
        return bridge_config(model)
    if folder == "audio_dit":
        return tower_config(model.audio)
    return diffusers_config(model.video) if folder in DIFFUSERS.values() else tower_config(model.video)


def _copied(base: Path | None) -> list[Path]:
    """The folders of a base that are copied. RunError if one is missing."""
    if base is None:
        return []
    lacking = [name for name in ENCODERS if not (base / name).is_dir()]
    if lacking:
        raise RunError(f"base={base} lacks {', '.join(lacking)}; give a complete MOVA folder")
    return [base / name for name in ENCODERS]


def _named(encoders: dict[str, str]) -> str:
    return ", ".join(f"{kind} {one}" for kind, one in sorted(encoders.items()))


def _base_encoders(base: Path, stated: dict[str, str], path: Path, encoder: EncoderConfig) -> dict[str, str]:
    """Fingerprints of the encoders of a base. DataError, naming both, where they are not those of the checkpoint."""
    names: dict[str, Any] = dict.fromkeys(KINDS, "mova") | {f"{kind}_folder": None for kind in KINDS}
    here = replace(encoder, **names, folder=str(base))
    codecs = Codecs(here)
    for codec in (codecs.video, codecs.audio, codecs.text):
        check_codec(codec, stated, f"checkpoint {path}", here)
    return codecs.fingerprints


def _index(model: JointConfig, boundary_ratio: float, base: Path | None) -> dict[str, Any]:
    """model_index.json, with the base's words for what is copied from it."""
    index = model_index(model, boundary_ratio)
    if base is None:
        return index
    try:
        theirs = read_json(base / INDEX_FILE)
    except LayoutError as error:
        raise RunError(f"base={base}: {error}") from None
    known = {name: theirs[name] for name in (*ENCODERS, "audio_vae_type", "_diffusers_version") if name in theirs}
    if known.get("tokenizer", ["", ""])[1] == "T5Tokenizer" and not (base / "tokenizer" / "spiece.model").is_file():
        known.pop("tokenizer")  # before transformers 5 that class needs a file that transformers 5 does not write
    return index | known


def _check_room(out: Path, size: int) -> None:
    place = next(folder for folder in (out.parent, *out.parent.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < size + SMALL_FILES:
        raise RunError(f"out={out} takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
