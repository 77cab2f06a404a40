"""Make clips from the checkpoints of a run while it goes on, in a job of its own, so that training does not wait.

    python -m tools.watch runs/first                                   # every new checkpoint; ends when the run has
    python -m tools.watch runs/first every=5000 kinds=[image,sound] clips=4 sampler.steps=30
    torchrun --nproc-per-node 8 -m tools.watch run=runs/big parallel.ulysses=8 parallel.compute=bfloat16
    python -m launch cluster=slurm ... watch.enabled=true                      # submitted beside the training job

What is given to the model comes from the run's held-out set, the same for each checkpoint, so that they compare: a
caption ("text"), a caption and the first frame ("image"), the picture ("picture": its sound is made) or the sound
("sound": its picture is made). The clips lie in runs/<id>/samples/ and on the report's page (docs/watching.md).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import hydra
import torch
import torch.distributed as dist
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from data.codec import audio as audio_codec
from data.codec import video as video_codec
from data.errors import DataError
from data.index import DatasetIndex
from launch.attempts import is_finished
from model.sampler import SamplerConfig
from tools.command import run_first, said_in_one_line
from tools.measures import Measures
from tools.sample import SampleConfig, check_codecs, clips_of, write_mp4
from train.checkpoint import committed, damage, step_of
from train.errors import RunError
from train.generation import load_model
from train.guard import on_first_rank
from train.mesh import Layout, ParallelConfig, make_layout, start_process_group
from train.run_dir import RunDir
from train.samples import Sample, add_samples, folder_of, held_out_file, read_samples

KINDS = ("text", "image", "picture", "sound")
LOCK = ".watch-lock"
PINNED = ".pinned"  # folder of the checkpoint at work


@dataclass
class WatchConfig:
    """conf/watch.yaml. `every`: steps between checkpoints that are sampled (0: each one; the last one always).

    `kinds`: what is given (text, image, picture, sound), for each of the first `clips` samples of the held-out set;
    `prompts`: further clips from words alone. What lies in samples/ is not made again. `impacts`, `sync_weights`: what
    is measured of each clip besides loudness and motion (tools/measures.py). `poll`: seconds between looks; `patience`:
    minutes without any sign of the run, not finished, after which watching ends (a queued run gives none).
    """

    run: str = MISSING
    every: int = 0
    kinds: list[str] = field(default_factory=lambda: ["image"])
    clips: int = 2
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    impacts: bool = False
    sync_weights: str | None = None
    poll: float = 10.0
    patience: float = 120.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds: {kind!r} is not one of {', '.join(KINDS)}")
        if self.every < 0 or self.clips < 0 or self.poll <= 0 or self.patience <= 0:
            raise ValueError(
                f"every={self.every} clips={self.clips} poll={self.poll} patience={self.patience}: every and clips are "
                "0 or more, poll and patience above 0"
            )
        if not self.prompts and not (self.kinds and self.clips):
            raise ValueError("nothing is to be made: give kinds and clips, or prompts")


@dataclass(frozen=True)
class Order:
    """One clip that each checkpoint makes: `name` of its file, and what is given."""

    name: str
    kind: str
    prompt: str
    source: str = ""
    given: str | None = None  # path of the held-out clip
    geometry: tuple[int, int, int, float] | None = None  # frames, height, width, fps; None: those of the run's data


class Stop:
    """Whether this process was asked to end (SIGINT, SIGTERM): after the clip at work, at once when asked again."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def lock(run: RunDir) -> IO[str]:
    """Keep other watchers of this run out while the file is open. RunError where there is one."""
    folder_of(run.root).mkdir(parents=True, exist_ok=True)
    file = open(folder_of(run.root) / LOCK, "a+")  # noqa: SIM115  the caller holds it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunError(f"run {run.root.name!r} is watched already; stop the other watcher, or leave it to it") from None
    return file


def orders_of(config: WatchConfig, run: RunDir) -> list[Order]:
    """What each checkpoint is to make; writes the held-out clips that are given. RunError where there are none."""
    orders = [Order(f"prompt-{number}", "text", prompt) for number, prompt in enumerate(config.prompts)]
    if not config.kinds or not config.clips:
        return orders
    place = yaml.safe_load(run.config.read_text())["data"].get("valid_path")
    if place is None:
        raise RunError(f"run {run.root.name!r} has no held-out set (data.valid_path): give kinds=[] and prompts=[...]")
    index = DatasetIndex.open(place)
    try:
        check_codecs(index)
        rows = [row for row in range(len(index)) if index.bucket_of(row).has_video and index.bucket_of(row).has_audio]
        if not rows:
            raise RunError(f"held-out set {place} has no clip with picture and sound: give kinds=[] and prompts=[...]")
        for row in rows[: config.clips]:
            key, caption = index.key(row), caption_of(index, row)
            given = str(_write_given(index, row, held_out_file(run.root, key)))
            bucket = index.bucket_of(row)
            geometry = (1 + 4 * (bucket.frames - 1), 8 * bucket.height, 8 * bucket.width, bucket.fps)
            orders += [Order(f"{kind}-{key}", kind, caption, key, given, geometry) for kind in config.kinds]
    finally:
        index.close()
    return orders


def caption_of(index: DatasetIndex, row: int) -> str:
    """The words of a sample's caption, "" where they can't be had (a dataset that lies elsewhere, no captioner)."""
    if index.place.remote or not index.captioners:
        return ""
    shard = index.shards[index.shard_of(row)]
    try:
        with tarfile.open(Path(index.root) / shard["text"][index.captioners[0]]) as file:
            member = file.extractfile(f"{index.key(row)}.json")
            return str(json.loads(member.read()).get("caption", "")) if member is not None else ""
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return ""


def _write_given(index: DatasetIndex, row: int, path: Path) -> Path:
    """A held-out clip as its latents decode: what the model is given, and what its clips compare with."""
    if not path.exists():
        clip, bucket = index.read_clip(row), index.bucket_of(row)
        assert clip.video is not None and clip.audio is not None
        pixels = video_codec.decode(clip.video.float())
        samples = round(pixels.shape[1] / bucket.fps * audio_codec.SAMPLE_RATE)
        _write_whole(path, pixels, audio_codec.decode(clip.audio.float(), samples), bucket.fps)
    return path


def _write_whole(path: Path, pixels: torch.Tensor, sound: torch.Tensor, fps: float) -> None:
    partial = path.with_name(f".partial-{path.name}")
    write_mp4(partial, pixels, sound, fps)
    os.replace(partial, path)


def geometry_keys(order: Order) -> dict[str, Any]:
    """Keys of SampleConfig."""
    if order.geometry is None:
        return {}
    return dict(zip(("frames", "height", "width", "fps"), order.geometry, strict=True))


def next_checkpoint(run: RunDir, done: int, every: int, finished: bool) -> Path | None:
    """The checkpoint to sample after that of step `done`: the oldest that is `every` steps later, at the end the last.
    What is rotated away before its turn comes is passed over."""
    later = [path for path in committed(run.checkpoints) if step_of(path) > done]
    due = [path for path in later if done < 0 or step_of(path) >= done + every]
    return due[0] if due else (later[-1] if later and finished else None)


def pin(path: Path, run: RunDir) -> Path | None:
    """The checkpoint under another name, by hard links: the run may delete its own meanwhile, no bytes are copied.

    None when it is gone already. Where the file system has no hard links, the checkpoint itself.
    """
    pinned = folder_of(run.root) / PINNED / path.name
    shutil.rmtree(pinned.parent, ignore_errors=True)
    try:
        for file in [file for file in path.rglob("*") if file.is_file()]:
            target = pinned / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    except FileNotFoundError:
        return None
    except OSError:
        return path
    # A folder that was emptied while it was listed gives fewer files, which the marker knows of.
    return pinned if damage(pinned) is None or path.exists() else None


def sample_checkpoint(
    path: Path,
    config: WatchConfig,
    orders: list[Order],
    measures: Measures,
    layout: Layout,
    run: RunDir,
    asked: Callable[[], bool],
) -> None:
    """Make the clips of one checkpoint that are missing, until we are asked to end. All ranks call. RunError: see
    `load_model`."""
    model, trained = load_model(path, config.parallel, layout)
    step, target = step_of(path), folder_of(run.root) / path.name
    made = on_first_rank(lambda: {one.file for one in read_samples(run.root)})
    for order in orders:
        file = f"{path.name}/{order.name}.mp4"
        if file in made:
            continue
        if on_first_rank(asked):
            return
        begin = time.monotonic()
        request = SampleConfig(
            checkpoint=str(path), out="", prompt=order.prompt, seed=config.seed, sampler=config.sampler,
            image=order.given if order.kind == "image" else None,
            picture_of=order.given if order.kind == "picture" else None,
            sound_of=order.given if order.kind == "sound" else None, **geometry_keys(order),
        )  # fmt: skip
        [(pixels, sound)], fps = clips_of(model, trained, request, layout)
        sample = Sample(
            step, file, order.kind, order.prompt, config.seed, order.source, asdict(config.sampler),
            round(time.monotonic() - begin, 2),
        )  # fmt: skip

        def keep(sample: Sample = sample, clip: tuple = (pixels, sound, fps), name: str = order.name) -> None:
            _write_whole(target / f"{name}.mp4", *clip)
            add_samples(run.root, [replace(sample, measures=measures(*clip))])
            print(f"{target / name}.mp4: step {sample.step:,}, {sample.kind}, {sample.seconds:.1f} s", flush=True)

        on_first_rank(keep)


def watch(config: WatchConfig, layout: Layout, stop: Stop) -> str:
    """Until the run has finished and its last checkpoint is sampled; all ranks call. Returns why it ended, in words."""
    run = RunDir(Path(config.run))
    try:
        measures = Measures(config.impacts, config.sync_weights)
    except DataError as error:
        raise RunError(f"sync_weights: {error}") from None
    held = None

    def enter() -> list[Order]:
        nonlocal held
        if not run.config.exists():
            raise RunError(f"{run.root} is no run: it holds no config.yaml; give runs/ID")
        held = lock(run)
        try:
            return orders_of(config, run)
        except DataError as error:
            raise RunError(f"held-out set of the run: {error}") from None

    try:
        orders = on_first_rank(enter)
        names = {f"{order.name}.mp4" for order in orders}
        done = on_first_rank(lambda: _done(run, names))
        while True:
            finished, path, gone = on_first_rank(lambda: _look(run, done, config))  # noqa: B023  called at once
            if on_first_rank(lambda: stop.asked):
                return "asked to end"
            if path is not None:
                pinned = on_first_rank(lambda: pin(path, run))  # noqa: B023  called at once
                if pinned is not None:
                    done = step_of(path)
                    try:
                        sample_checkpoint(pinned, config, orders, measures, layout, run, lambda: stop.asked)
                    except (RunError, CheckpointException) as error:  # no reason to miss the next ones
                        if layout.first:
                            print(f"passed over: {error}", file=sys.stderr, flush=True)
                continue
            if finished:
                return "the run has finished, and its last checkpoint is sampled"
            if gone:
                return f"no sign of the run for {config.patience:g} minutes (patience); once it goes on, call it again"
            _wait(config.poll, stop)
    finally:
        if held is not None:
            shutil.rmtree(folder_of(run.root) / PINNED, ignore_errors=True)
            held.close()


def _look(run: RunDir, done: int, config: WatchConfig) -> tuple[bool, Path | None, bool]:
    """(whether the run has finished, the checkpoint to sample now, whether the run gave no sign for too long)."""
    finished = is_finished(run)  # before the folder is looked at: a last checkpoint is never missed
    signs = [path.stat().st_mtime for path in (run.status, run.metrics, run.config) if path.exists()]
    gone = run.holder() is None and time.time() - max(signs, default=0.0) > 60 * config.patience
    return finished, next_checkpoint(run, done, config.every, finished), gone


def _done(run: RunDir, names: set[str]) -> int:
    """Step of the newest checkpoint from which all of these clips were made, -1 where there is none."""
    made: dict[int, set[str]] = {}
    for sample in read_samples(run.root):
        made.setdefault(sample.step, set()).add(Path(sample.file).name)
    return max((step for step, files in made.items() if names <= files), default=-1)


def _wait(seconds: float, stop: Stop) -> None:
    """All ranks wait as long; a request to end is heard at once by the first, which the others wait for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.asked:
        time.sleep(min(0.2, seconds))


@hydra.main(version_base=None, config_path="pkg://conf", config_name="watch")
def _run(config: DictConfig) -> None:
    with said_in_one_line("python -m tools.watch runs/ID"):
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, WatchConfig)
        stop = Stop()
        device = start_process_group()
        try:
            layout = make_layout(typed.parallel, device)
            ending = watch(typed, layout, stop)
            if layout.first:
                print(f"watching {typed.run} ends: {ending}")
        finally:
            dist.destroy_process_group()


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="watch_schema", node=WatchConfig)
    sys.argv[1:] = run_first(sys.argv[1:])
    _run()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
