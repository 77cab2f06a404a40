"""From a dataset folder to the stream of a rank: index, order, and the draws made off the training thread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.batch import Batch
from data.index import DatasetIndex
from data.state import DataState
from data.stream import Stream
from train.errors import RunError
from train.mesh import Layout
from train.noise import draw
from train.objective import Draws, Objective


@dataclass
class DataConfig:
    """What is trained on. `batch_size`: clips of a global batch; `micro_batch`: clips a rank takes at a time.

    `window`: shards among which clips are shuffled; `valid_path`: held-out dataset (null: no validation).
    """

    path: str = "???"
    valid_path: str | None = None
    batch_size: int = 8
    micro_batch: int = 1
    window: int = 16
    captioner: str | None = None
    prefetch: int = 2
    quarantine_budget: float = 0.001


@dataclass
class Prepared:
    """One micro-batch with what chance decided for it."""

    batch: Batch
    draws: Draws


def open_dataset(path: str, text_dim: int) -> DatasetIndex:
    """Open a dataset for a model. RunError when its text embeddings have another width than the model reads."""
    index = DatasetIndex.open(Path(path))
    if index.text_dim != text_dim:
        raise RunError(
            f"dataset {path} has text embeddings of width {index.text_dim}, the model reads {text_dim}; "
            f"prepare the data with text_dim={text_dim} or choose a model with text_dim {index.text_dim}"
        )
    return index


def start_state(index: DatasetIndex, config: DataConfig, seed: int) -> DataState:
    """The data state of a new run: one segment from step 0 on, the same batch size in every bucket."""
    return DataState.start(index.fingerprint, [config.batch_size] * len(index.buckets), seed, config.window)


def open_stream(
    index: DatasetIndex,
    state: DataState,
    config: DataConfig,
    layout: Layout,
    objective: Objective,
    seed: int,
    text_length: int,
) -> Stream[Prepared]:
    """The stream of this rank from the state's position on; timesteps and noise come with each micro-batch."""
    return Stream(
        index,
        state,
        dp_rank=layout.dp_rank,
        dp_world=layout.dp_world,
        micro_batch=config.micro_batch,
        text_length=text_length,
        transform=lambda batch: Prepared(batch, draw(batch, objective, seed)),
        captioner=config.captioner,
        prefetch=config.prefetch,
        quarantine_budget=config.quarantine_budget,
    )
