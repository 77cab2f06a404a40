"""Trains a synchronization scorer on clips whose picture and sound are in step, and measures it on held-out ones.

    mova train-sync source=clips output=scorer.safetensors

Every training example is a window of a clip with sounds that begin up to a second earlier or later than its picture
(half of them hardly); the sounds of the other clips in the batch are those that don't belong. Beside the scorer comes
`scorer.json` with the settings and what was measured on clips that were not trained on. Clips must be longer than a
window and the largest shift together, so that a shifted sound is real to its ends; shorter ones shorten the window.
"""

import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from core.durable import write_atomically
from core.ranges import bounded, seed_field
from data.errors import DataError
from data.media import open_media
from data.sync.inputs import SAMPLE_RATE, is_silent
from data.sync.learned import (
    LEAST,
    RATE,
    REACH,
    NetworkConfig,
    SyncNetwork,
    judge,
    pack_network,
    prepare_pictures,
    prepare_sound,
    small_pictures,
)

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
EXCERPT = 8.0  # s of a file that are read at once; of a longer file come several pieces, all on the same side
BETWEEN = 0.2  # s: smallest shift that must be told from none
CLOSE = 0.1  # s within which a lag counts as found


@dataclass
class TrainSyncConfig:
    """Training of a synchronization scorer.

    source: folder of video files, searched to its bottom
    output: file of the scorer, .safetensors
    seed: of weights and of all that is drawn
    steps: training steps
    batch: clips per step; each is paired with the sounds of all
    lags: sounds per clip in a step: the picture, the most expensive part, is used several times
    window: seconds of a training example
    shift: largest shift of a sound in seconds
    learning_rate: highest learning rate
    weight_decay: weight decay of AdamW
    holdout: share of the files that are held out for measuring
    pieces: largest number of pieces; limits the memory (0.4 MB for a piece of 8 s)
    workers: decoding threads; 0: one per core
    threads: training threads; more help only if cores are idle (otherwise they wait for each other)
    device: cpu or cuda
    """

    source: str = MISSING
    output: str = MISSING
    seed: int = seed_field()
    steps: int = bounded(300, "[1, inf)")
    batch: int = bounded(16, "[1, inf)")
    lags: int = bounded(3, "[1, inf)")
    window: float = bounded(2.0, "(0, inf)")
    shift: float = bounded(1.0, "(0, inf)")
    learning_rate: float = bounded(2e-3, "(0, inf)")
    weight_decay: float = bounded(0.01, "[0, inf)")
    holdout: float = bounded(0.2, "(0, 1)")
    pieces: int = bounded(2000, "[1, inf)")
    workers: int = bounded(0, "[0, inf)")
    threads: int = bounded(1, "[1, inf)")
    device: str = "cpu"


@dataclass
class Excerpt:
    """A stretch of one file: pictures [T, size, size] uint8 grey at RATE, sound [n] at 16 kHz; both begin together."""

    name: str
    pictures: Tensor
    sound: Tensor

    @property
    def seconds(self) -> float:
        """Length that both have."""
        return min(len(self.pictures) / RATE, len(self.sound) / SAMPLE_RATE)

    def see(self, first: int, count: int) -> Tensor:
        """[count, size, size] in [-1, 1] from picture `first` on."""
        return self.pictures[first : first + count].float() / 127.5 - 1

    def hear(self, start: float, seconds: float) -> Tensor:
        """[seconds · 16000] from `start` seconds on, which must lie inside."""
        begin, count = round(start * SAMPLE_RATE), round(seconds * SAMPLE_RATE)
        found = self.sound[max(begin, 0) : max(begin, 0) + count]
        return torch.nn.functional.pad(found, (0, count - len(found)))  # a sample at most: rounding


def train_sync(config: TrainSyncConfig) -> dict[str, Any]:
    """Train, measure, write both files; returns what is in the json. DataError for settings or clips that won't do."""
    _check(config)
    began = time.perf_counter()
    network_config = NetworkConfig()
    training, held_out, refused = read_clips(config, network_config.size)
    read = time.perf_counter() - began
    shortest = min(piece.seconds for piece in training + held_out)
    count = int(min(config.window, shortest - config.shift) * RATE + 1e-6)
    print(f"{len(training)} pieces to train on, {len(held_out)} held out; windows of {count / RATE:.2f} s")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        network = fit(training, config, network_config, count)
    finally:
        torch.set_num_threads(threads)
    trained = time.perf_counter() - began - read
    quality = measure(network, held_out, count, config.shift, config.seed)
    record = {
        "settings": {**asdict(config), "network": asdict(network_config), "window_used": count / RATE},
        "clips": {"training": len(training), "held_out": len(held_out), "refused": refused},
        "quality": quality,
        "seconds": {"reading": round(read, 1), "training": round(trained, 1)},
    }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    words = json.dumps(record, indent=1) + "\n"
    write_atomically(output.with_suffix(".json"), words)
    write_atomically(output, pack_network(network, quality))
    print(
        f"held out: AUC {quality['auc_shift']:.3f} against sound shifted by {BETWEEN} s or more, "
        f"{quality['auc_swap']:.3f} against swapped sound; lag within {CLOSE} s in {quality['lag_found']:.0%}\n{output}"
    )
    return record


def read_clips(config: TrainSyncConfig, size: int) -> tuple[list[Excerpt], list[Excerpt], dict[str, str]]:
    """(to train on, held out, {file: why it is not used}). The side of a file depends on its name only.

    DataError when there are too few.
    """
    root = Path(config.source)
    if not root.is_dir():
        raise DataError(f"source {root} is not a folder; give a folder of video files")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise DataError(f"source {root} holds no video files ({', '.join(SUFFIXES)})")
    names = {path: path.relative_to(root).as_posix() for path in paths}
    paths.sort(key=lambda path: hashlib.sha256(names[path].encode()).digest())
    least = LEAST / RATE + config.shift
    sides: tuple[list[Excerpt], list[Excerpt]] = ([], [])
    refused: dict[str, str] = {}
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("time left"), TimeRemainingColumn())
    with ThreadPoolExecutor(config.workers or os.cpu_count() or 1) as pool, Progress(*columns) as progress:
        for start in progress.track(range(0, len(paths), 32), description="reading"):
            batch = paths[start : start + 32]  # few at a time, so that the limit is kept
            if sum(map(len, sides)) >= config.pieces:
                break
            for path, result in zip(batch, pool.map(lambda path: _read(path, names[path], least, size), batch)):
                if isinstance(result, str):
                    refused[names[path]] = result
                    continue
                digest = int(hashlib.sha256(names[path].encode()).hexdigest()[-12:], 16)
                sides[digest < config.holdout * 16**12].extend(result)
    for name, reason in list(refused.items())[:5]:
        print(f"not used: {name}: {reason}")
    if len(refused) > 5:
        print(f"not used: {len(refused) - 5} more")
    training, held_out = sides
    if len(training) < config.batch or len({piece.name for piece in held_out}) < 2:
        raise DataError(
            f"{len(training)} pieces to train on and {len(held_out)} held out of {len(paths)} files in {root} "
            f"({len(refused)} not used); at least batch={config.batch} and 2 files are needed: give more clips"
        )
    return training, held_out, refused


def fit(training: list[Excerpt], config: TrainSyncConfig, network_config: NetworkConfig, count: int) -> SyncNetwork:
    """Train a network on windows of `count` pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = SyncNetwork(network_config).to(config.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    columns = (TextColumn("training {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=config.steps)
        for step in range(config.steps):
            random = np.random.Generator(np.random.Philox(key=[config.seed % 2**64, step]))
            chosen = [training[i] for i in random.choice(len(training), config.batch, replace=False)]
            pictures, spectra, lags = draw_batch(chosen, count, config, network_config.mels, random)
            loss = pair_loss(
                network.logits(network.see(pictures.to(config.device)), network.hear(spectra.to(config.device))),
                lags.to(config.device),
            )
            value = loss.item()
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at step {step}; use a smaller learning_rate")
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(step, config.steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, description=f"loss {value:.3f}")
    return network.cpu().eval()


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 5 % warming up, then a half cosine to 0."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_batch(
    chosen: list[Excerpt], count: int, config: TrainSyncConfig, mels: int, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures [B, count, size, size], spectra [B·K, mels, 4·count], lags [B, K] in s) of random windows and lags."""
    pictures, sounds, lags = [], [], []
    for piece in chosen:
        sign = random.choice((-1, 1))  # the same for all sounds of a clip: a clip need not be two shifts longer
        late = [sign * random.uniform(0, 0.03 if random.uniform() < 0.5 else config.shift) for _ in range(config.lags)]
        first = crop_pair(piece, count, late, random)
        seen = piece.see(first, count)
        if random.uniform() < 0.5:
            seen = seen.flip(-1)
        grain = torch.from_numpy(random.standard_normal(seen.shape, dtype=np.float32))
        pictures.append(seen + random.uniform(0, 0.02) * grain)
        sounds += [piece.hear(first / RATE - lag, count / RATE) for lag in late]
        lags.append(late)
    return (
        prepare_pictures(torch.stack(pictures)),
        prepare_sound(torch.stack(sounds), count, mels),
        torch.tensor(lags, dtype=torch.float32),
    )


def crop_pair(piece: Excerpt, count: int, lags: list[float], random: np.random.Generator) -> int:
    """First picture of a window whose sounds, each of `lags` seconds late, all lie inside the piece."""
    room = piece.seconds - count / RATE
    low = math.ceil(RATE * max(0.0, *lags) - 1e-6)
    high = math.floor(RATE * (room + min(0.0, *lags)) + 1e-6)
    return int(random.integers(low, max(low, high) + 1))


def pair_loss(logits: Tensor, lags: Tensor) -> Tensor:
    """Cross entropy of own sounds (their lag, shared by the two nearest steps) plus that of others ("apart").

    logits: [B, B·K, 2·REACH + 2]; lags: [B, K] in seconds.
    """
    clips, sounds = lags.shape
    share = torch.log_softmax(logits, -1).unflatten(1, (clips, sounds))
    own = torch.arange(clips, device=lags.device)
    steps = lags * RATE + REACH
    low = steps.floor().clamp(0, 2 * REACH - 1).long()
    part = steps - low
    both = share[own, own].gather(-1, torch.stack([low, low + 1], -1))  # [B, K, 2]
    hit = torch.logsumexp(both + torch.stack([1 - part, part], -1).clamp(min=1e-6).log(), -1)
    apart = share[..., -1][~torch.eye(clips, dtype=torch.bool, device=lags.device)]
    out: Tensor = -hit.mean() - apart.mean()
    return out


@torch.inference_mode()
def measure(network: SyncNetwork, pieces: list[Excerpt], count: int, shift: float, seed: int) -> dict[str, float]:
    """Quality on pieces that were not trained on: per piece one window in step, two shifted ones, one other sound.

    auc_shift, auc_swap: chance that a window in step scores higher than one shifted by BETWEEN to `shift` seconds, or
    one with the sound of another file; lag_found: share of the windows in step and shifted whose lag is found within
    CLOSE; lag_found_shifted: of the shifted ones alone; windows: how many in step.
    """
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, 2**63]))
    scores: dict[str, list[float]] = {"in step": [], "shifted": [], "swapped": []}
    found: dict[str, list[bool]] = {"in step": [], "shifted": []}
    for piece in pieces:
        others = [other for other in pieces if other.name != piece.name]
        for kind in ("in step", "shifted", "shifted", "swapped"):
            lag = random.uniform(BETWEEN, shift) * random.choice((-1, 1)) if kind == "shifted" else 0.0
            first = crop_pair(piece, count, [lag], random)
            source, start = piece, first / RATE - lag
            if kind == "swapped":
                source = others[int(random.integers(len(others)))]
                start = random.uniform(0, source.seconds - count / RATE)
            sound = source.hear(start, count / RATE)
            if is_silent(sound):
                continue
            seen = network.see(prepare_pictures(piece.see(first, count))[None])
            heard = network.hear(prepare_sound(sound, count, network.config.mels)[None])
            in_step, guess = judge(network.logits(seen, heard)[0, 0])
            scores[kind].append(float(in_step))
            if kind != "swapped":
                found[kind].append(abs(float(guess) - lag) <= CLOSE)
    return {
        "auc_shift": area_under_curve(scores["in step"], scores["shifted"]),
        "auc_swap": area_under_curve(scores["in step"], scores["swapped"]),
        "lag_found": float(np.mean(found["in step"] + found["shifted"])),
        "lag_found_shifted": float(np.mean(found["shifted"])),
        "windows": len(scores["in step"]),
    }


def area_under_curve(positive: list[float], negative: list[float]) -> float:
    """Chance that a positive scores higher than a negative; ties count half. NaN where one side is empty."""
    if not positive or not negative:
        return math.nan
    difference = np.subtract.outer(np.array(positive), np.array(negative))
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _read(path: Path, name: str, least: float, size: int) -> list[Excerpt] | str:
    """The pieces of one file, or why it has none."""
    try:
        with open_media(path) as media:
            if media.frame_times is None or media.sound_span is None:
                return "has no picture" if media.frame_times is None else "has no sound"
            start = max(media.span[0], media.sound_span[0])
            end = min(media.span[1], media.sound_span[1])
            found = []
            while end - start >= least - 0.5 / RATE:
                count = int(min(EXCERPT, end - start) * RATE + 0.5)
                frames = media.frames(start, count, RATE, size, size).transpose(0, 1)
                grey = ((small_pictures(frames, RATE, size) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                sound = media.sound(start, round(count / RATE * SAMPLE_RATE))
                if not is_silent(sound):
                    found.append(Excerpt(name, grey, sound))
                start += count / RATE
            return found or f"is shorter than {least:.2f} s (a second and the largest shift) or silent"
    except DataError as error:
        return str(error)


def _check(config: TrainSyncConfig) -> None:
    """DataError that names the first setting that can't be met."""
    most = REACH / RATE - CLOSE
    rules = [
        ("output", config.output.endswith(".safetensors"), "must end with .safetensors"),
        ("steps", config.steps > 0, "must be at least 1"),
        ("batch", config.batch > 1, "must be at least 2: other sounds come from the batch"),
        ("window", config.window >= LEAST / RATE, f"must be at least {LEAST / RATE:g}"),
        ("shift", BETWEEN < config.shift <= most, f"must be above {BETWEEN} and at most {most:.2f}"),
        ("lags", config.lags > 0, "must be at least 1"),
        ("threads", config.threads > 0, "must be at least 1"),
        ("learning_rate", config.learning_rate > 0, "must be above 0"),
        ("holdout", 0 < config.holdout < 1, "must be above 0 and below 1"),
        ("pieces", config.pieces > 0, "must be at least 1"),
        ("workers", config.workers >= 0, "must be at least 0"),
        ("device", config.device == "cpu" or torch.cuda.is_available(), "is not there; choose cpu"),
    ]
    for name, fine, rule in rules:
        if not fine:
            raise DataError(f"{name}={getattr(config, name)} {rule}")
