"""Generated clips of bouncing balls for inspection: a picture of what happens when, and a film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from data.media import SAMPLE_RATE, open_media
from data.sync.impacts import impacts_heard, impacts_seen
from data.synthesize import BACKGROUND, VOICES
from tools.sample import write_mp4

INK, SOFT, MARK = "#23262b", "#8a9099", "#d1495b"
ENLARGED = 4  # the film's pixels for one of the clip
PAUSE = 0.4  # seconds of the last frame and silence after each clip of the film


@dataclass(frozen=True)
class GeneratedClip:
    """pixels [3, F, H, W] in -1..1, sound [samples] at SAMPLE_RATE."""

    title: str
    pixels: Tensor
    sound: Tensor
    fps: float


def read_clips(folder: Path, names: Sequence[str]) -> list[GeneratedClip]:
    """The files NAME.mp4 of the folder. DataError when one cannot be read."""
    clips = []
    for name in names:
        with open_media(folder / f"{name}.mp4") as media:
            assert media.frame_times is not None, "tools.sync_score writes clips with a picture"
            count, (start, end) = len(media.frame_times), media.span
            fps = count / (end - start)
            pixels = media.frames(start, count, fps, *media.size)
            sound = media.sound(start, round((end - start) * SAMPLE_RATE))
        clips.append(GeneratedClip(name.replace("-", " "), pixels, sound, fps))
    return clips


def paths(pixels: Tensor) -> np.ndarray:
    """How objects rise and fall: [3, F, H, W] in -1..1 -> [H, F, 3] in 0..1, of each row what differs most from the
    background."""
    picture = (pixels.float().numpy() + 1) / 2
    contrast = np.abs(picture - BACKGROUND.reshape(3, 1, 1, 1) / 255).sum(0)  # [F, H, W]
    column = contrast.argmax(-1)[None, ..., None]  # [1, F, H, 1]
    return np.take_along_axis(picture, column, axis=-1)[..., 0].transpose(2, 1, 0)


def draw_clips(path: Path, columns: Sequence[Sequence[GeneratedClip]], voices: bool) -> None:
    """A column of clips beside the other; of each the height of what moves and the sound, over one axis of time.

    Marked: in the picture where something lands, in the sound where one begins, as data/sync/impacts.py finds them;
    with `voices` in the colour that belongs to the pitch.
    """
    rows = len(columns[0])
    figure = Figure(figsize=(4.2 * len(columns), 2.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 * rows, len(columns), squeeze=False, height_ratios=[1.6, 1] * rows)
    for number, clips in enumerate(columns):
        for row, clip in enumerate(clips):
            _draw_picture(grid[2 * row][number], clip, voices)
            _draw_sound(grid[2 * row + 1][number], clip, voices, last=row == rows - 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_film(path: Path, clips: Sequence[GeneratedClip]) -> None:
    """One mp4 of all clips, one after the other, enlarged."""
    pixels, sounds = [], []
    for clip in clips:
        still = round(PAUSE * clip.fps)
        pixels.append(torch.cat((clip.pixels, clip.pixels[:, -1:].expand(-1, still, -1, -1)), dim=1))
        samples = round(pixels[-1].shape[1] / clip.fps * SAMPLE_RATE)
        sounds.append(torch.nn.functional.pad(clip.sound, (0, samples - len(clip.sound))))
    large = torch.cat(pixels, dim=1).repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)
    write_mp4(path, large, torch.cat(sounds), clips[0].fps, SAMPLE_RATE)


def _draw_picture(axes: Axes, clip: GeneratedClip, voices: bool) -> None:
    seconds = clip.pixels.shape[1] / clip.fps
    axes.imshow(paths(clip.pixels), extent=(0, seconds, 0, 1), aspect="auto", interpolation="nearest")
    for impact in impacts_seen(clip.pixels, clip.fps, voices):
        colour = hsv_to_rgb((VOICES[impact.voice][0], 0.5, 1)) if voices else "white"
        axes.axvline(impact.time, ymax=0.15, color=colour, linewidth=2)
    axes.set_title(clip.title, loc="left", color=INK, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, seconds)


def _draw_sound(axes: Axes, clip: GeneratedClip, voices: bool, last: bool) -> None:
    seconds = clip.pixels.shape[1] / clip.fps
    axes.plot(np.arange(len(clip.sound)) / SAMPLE_RATE, clip.sound.numpy(), color=INK, linewidth=0.4)
    for impact in impacts_heard(clip.sound, voices):
        colour = hsv_to_rgb((VOICES[impact.voice][0], 0.8, 0.8)) if voices else MARK
        axes.axvline(impact.time, color=colour, linewidth=1)
    axes.set_ylim(-1, 1)
    axes.set_xlim(0, seconds)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=7, labelbottom=last)
    if last:
        axes.set_xlabel("seconds", color=SOFT, fontsize=8)
