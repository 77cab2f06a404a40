"""The starting weights of a run: every rank reads the ranges that it keeps into its shards, and draws the others.

    record = start_weights(engine, init, model, seed)       # all ranks call, before the first step

The record tells where each part came from; every checkpoint of the run carries it.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import RunError, missing
from model.init import bridge_part, initial_part
from model.joint import JointConfig
from model.weights.files import LayoutError, read_json
from model.weights.parts import MODULES, PartSource
from train.checkpoint.checkpoint import has_marker, hold, newest
from train.engine.engine import Engine
from train.parallel.collectives import gather, on_first_rank
from train.start.checkpoint_tensors import read_state
from train.start.config import TRAINING, ZERO, InitConfig
from train.start.sources import Sources, open_sources

PART_OF = {module: part for part, module in MODULES.items()}


class StartingWeights:
    """A `train.parallel.parallelize.Part`. What cannot be read is 0, and `fault` tells why (the first one, and whether
    another attempt may succeed): a rank that raised would leave the others waiting for it."""

    def __init__(self, sources: Sources, model: JointConfig, seed: int) -> None:
        self.fault: tuple[str, bool] | None = None
        self._sources, self._model, self._seed = sources, model, seed

    def __call__(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """[stop - start]: elements of the starting value of one parameter, on the CPU."""
        module, _, own = name.partition(".")
        part = PART_OF[module]
        source = self._sources.parts.get(part)
        if source is not None and own not in source.fresh:
            return self._read(source, own, start, stop)
        made = self._sources.made.get(part)
        if part == "bridge":
            return bridge_part(name, shape, start, stop, self._seed, self._model, made == ZERO)
        depth = self._model.video.num_layers
        return initial_part(name, shape, start, stop, self._seed, depth, self._model.bridge)

    def _read(self, source: PartSource, name: str, start: int, stop: int) -> Tensor:
        try:
            if self.fault is None:
                return source.read(name, start, stop)
        except (OSError, LayoutError, RunError) as error:
            self.fault = f"{source.place}, {name}: {error}", not isinstance(error, LayoutError)
        except Exception as error:  # a damaged file may raise anything
            self.fault = f"{source.place}, {name}: {error or type(error).__name__}", False
        return torch.zeros(stop - start)


def start_weights(engine: Engine, init: InitConfig, model: JointConfig, seed: int) -> dict[str, Any]:
    """Fill an engine with the weights that `init` names; averages begin from them. Returns the record, by part.

    All ranks call. RunError, on all of them, for sources that are missing, do not fit the model, or cannot be read.
    """
    with ExitStack() as held:
        chosen = _choose_checkpoints(init, held)
        sources, fault = None, None
        try:
            sources = open_sources(init, lambda run: chosen[str(run)])
            sources.check(model)
        except RunError as error:
            fault = str(error), error.retry
        raise_any(fault)
        assert sources is not None
        part = StartingWeights(sources, model, seed)
        engine.fill(part)
        raise_any(part.fault)
        return on_first_rank(lambda: record_of(sources, init))


def record_of(sources: Sources, init: InitConfig) -> dict[str, Any]:
    """Where each part comes from: source, layout, numbers of tensors taken and drawn, names of those drawn beside
    taken ones, dtype as it was read (and of the tensors that have another one), fingerprint."""
    record: dict[str, Any] = {part: {"source": made} for part, made in sources.made.items()}
    for part, source in sources.parts.items():
        dtypes = {name: str(source.dtype(name)).removeprefix("torch.") for name in source.names}
        kinds = list(dtypes.values())
        usual = max(set(kinds), key=kinds.count)
        record[part] = {
            "source": source.place,
            "layout": source.layout,
            "taken": len(source.names),
            "fresh": list(source.fresh),
            "dtype": usual,
            "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != usual},
            "fingerprint": source.fingerprint(),
        }
    return {part: record[part] for part in MODULES if part in record}


def stated_encoders(record: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(source, fingerprints of the codecs that it states) of each source of a record; {} where one states none. A
    checkpoint states them itself, an exported folder in its training.json. RunError for one that can't be read."""
    stated: dict[str, dict[str, str]] = {}
    for one in record.values():
        if "taken" not in one or one["source"] in stated:
            continue
        path = Path(one["source"])
        if one["layout"] == "checkpoint":
            content = read_state(path)
        else:
            beside = [folder / TRAINING for folder in (path, *path.parents[:2]) if (folder / TRAINING).is_file()]
            try:
                content = read_json(beside[0]) if beside else {}
            except LayoutError as error:
                raise RunError(str(error)) from None
        encoders = content.get("encoders") or {}
        if not isinstance(encoders, dict) or not all(isinstance(value, str) for value in encoders.values()):
            raise RunError(f"init: {path} states encoders {encoders!r}, expected texts by kind: export it again")
        stated[one["source"]] = encoders
    return list(stated.items())


def told(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record as text: (part, where it came from)."""
    rows = []
    for part, one in record.items():
        if "taken" not in one:
            words = {ZERO: "drawn, with outputs of zero"}.get(one["source"], "drawn")
        else:
            words = f"{one['taken']} tensors of {one['source']} ({one['layout']}, {one['dtype']}, {one['fingerprint']})"
            if one["fresh"]:
                words += f", {len(one['fresh'])} drawn: {', '.join(one['fresh'])}"
        rows.append((part, words))
    return rows


def _choose_checkpoints(init: InitConfig, held: ExitStack) -> dict[str, Path]:
    """The newest intact checkpoint of each named run. The first rank protects them from deletion while they are
    read."""
    chosen: dict[str, Path] = {}
    for key, place in init.places().items():
        path = Path(place)
        is_run, is_checkpoint = on_first_rank(partial(_kind, path))
        if is_checkpoint:
            on_first_rank(partial(_held, path, held))
        if not is_run or place in chosen:
            continue
        found = None
        while found is None or not on_first_rank(partial(_held, found, held)):  # it may be deleted meanwhile
            found = newest(path / "checkpoints")
            if found is None:
                raise missing(f"{key}={path} holds no committed checkpoint")
        chosen[place] = found
    return chosen


def _kind(path: Path) -> tuple[bool, bool]:
    """Whether a path is a run, and whether it is a checkpoint."""
    return (path / "checkpoints").is_dir(), has_marker(path)


def _held(path: Path, held: ExitStack) -> bool:
    file = hold(path)
    return file is not None and held.enter_context(file) is not None


def raise_any(fault: tuple[str, bool] | None) -> None:
    """RunError on all ranks if any has a fault."""
    faults = gather([fault] if fault is not None else [])
    if faults:
        message, retry = next((one for one in faults if not one[1]), faults[0])
        raise RunError(message, retry)
