"""Renders mp4 clips whose picture and sound have exactly synchronous, known events.

    mova synthesize output=clips clips=200

Kinds: a ball that bounces with independent hop durations, two balls that collide with each other and with the walls,
and a ticking pendulum. Pitch follows hue, loudness follows the speed of the impact. `kinds=[juggle]` gives two or three
bouncing balls at once, each with a voice of its own: a colour, a size and a pitch that belong together. Beside
`clip-000000.mp4` lie `clip-000000.json` (the truth: events in seconds with their pitch, kind, colour) and
`clip-000000.txt` (a caption). A clip is a pure function of (settings, seed, its number); finished clips are kept when
the command runs again.
"""

import colorsys
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from omegaconf import MISSING
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.compose import Schema
from core.durable import write_atomically
from core.program import Call, Program
from core.ranges import bounded, seed_field
from data.errors import DataError

KINDS = ("bounce", "collide", "tick", "juggle")
VERSION = 1  # raised whenever the same settings give other clips
GAPS = (0.45, 1.0)  # seconds between events: far enough apart that each is heard alone
EDGES = (0.12, 0.14)  # no event that close to the start or the end: half of it would be cut off
PITCHES = (300.0, 900.0)  # Hz, from hue 0 to HUES; low enough to be learnable from 20 ms audio steps
HUES = 0.8  # of the circle, so that the lowest and the highest pitch have different colours
THUMP = 45.0  # Hz: beside the tone, it makes the sign of the lowest coefficients predictable from the picture
BACKGROUND = np.array([62, 64, 72], dtype=np.float64)
FURNITURE = np.array([150, 150, 158], dtype=np.float64)
# (hue, radius in pixels, Hz) of the balls of a juggled clip; no pitch lies near a multiple of another one
VOICES = ((0.0, 9.0, 300.0), (0.16, 8.0, 420.0), (0.36, 7.0, 560.0), (0.62, 6.0, 760.0))
SOFT = 1.5  # px over which the edge of a ball fades
COLOURS = (
    (0.04, "red"),
    (0.11, "orange"),
    (0.19, "yellow"),
    (0.42, "green"),
    (0.54, "cyan"),
    (0.69, "blue"),
    (1, "purple"),
)


@dataclass
class SynthesizeConfig:
    """The clips to render.

    output: folder of the clips
    clips: number of clips
    seed: seed of all random draws
    frames: frames of a clip
    fps: frames per second
    height: pixels
    width: pixels
    sample_rate: sample rate of the sound: 48000 or 16000
    kinds: bounce, collide, tick, juggle; clips take them in turn
    workers: number of processes; 0: one per core
    """

    output: str = MISSING
    clips: int = bounded(MISSING, "[1, inf)")
    seed: int = seed_field()
    frames: int = bounded(49, "[1, inf)")
    fps: float = bounded(24, "(0, inf)")
    height: int = bounded(64, "[1, inf)")
    width: int = bounded(64, "[1, inf)")
    sample_rate: int = bounded(48000, "[1, inf)")
    kinds: list[str] = field(default_factory=lambda: list(KINDS[:3]))
    workers: int = bounded(0, "[0, inf)")


@dataclass(frozen=True)
class Scene:
    """All that is random of one object, or pair, in a clip; pixels, seconds, radians."""

    kind: str
    hue: float
    colour: tuple[int, int, int]
    pitch: float
    radius: float
    impacts: tuple[float, ...]  # times of all turning points, the first before 0 and the last after the end
    position: float  # bounce: x at time 0; collide: y of the balls; tick: the pendulum's amplitude
    drift: float  # bounce: px/s sideways
    left: float = 0.0  # bounce: the object keeps to `room` pixels from here on
    room: float = 0.0
    volume: float = 1.0  # of its sound

    def events(self, seconds: float) -> list[dict[str, float]]:
        """Events inside the clip: time, pitch (Hz), loudness (0..1, by the speed of the impact)."""
        found = []
        for before, time in zip(self.impacts[:-1], self.impacts[1:], strict=True):
            if 0 <= time < seconds:
                gap = time - before
                # a ball hits the floor with speed g·gap/2; the others cross a fixed distance in that time
                loudness = gap / GAPS[1] if self.kind == "bounce" else GAPS[0] / gap
                found.append({"time": time, "pitch": self.pitch, "loudness": self.volume * loudness})
        return found


def draw_scenes(seed: int, number: int, seconds: float, height: int, width: int, kind: str) -> list[Scene]:
    """What moves in clip `number`. DataError when the clip is too short for an event."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, number]))
    if kind != "juggle":
        return [_draw_scene(random, seconds, height, width, kind)]
    unit = min(height, width) / 64
    voices = random.permutation(len(VOICES))[: random.integers(2, 4)]
    room = width / len(voices)
    return [_draw_voice(random, seconds, int(voice), lane * room, room, unit) for lane, voice in enumerate(voices)]


def _draw_voice(
    random: np.random.Generator, seconds: float, voice: int, left: float, room: float, unit: float
) -> Scene:
    hue, radius, pitch = VOICES[voice]
    radius *= unit
    return Scene(
        kind="bounce",
        hue=hue,
        colour=_colour(hue),
        pitch=pitch,
        radius=radius,
        impacts=_draw_impacts(random, seconds, regular=False),
        position=random.uniform(radius, room - radius),
        drift=random.uniform(-8, 8) * unit,
        left=left,
        room=room,
        volume=0.5,  # all at once stay within -1..1, nearly always
    )


def _draw_impacts(random: np.random.Generator, seconds: float, regular: bool) -> tuple[float, ...]:
    """Turning points, evenly spaced or each at its own distance. DataError when the clip is too short."""
    gap = random.uniform(*GAPS)
    for _ in range(1000):
        times = [-gap * random.uniform(0, 1)]
        while times[-1] <= seconds:
            times.append(times[-1] + (gap if regular else random.uniform(*GAPS)))
        if random.uniform(0, 1) < 0.5:  # pendulum and balls then begin the other way round
            times.insert(0, times[0] - gap)
        inside = [time for time in times if 0 <= time <= seconds]
        if inside and inside[0] >= EDGES[0] and inside[-1] <= seconds - EDGES[1]:
            return tuple(times)
    raise DataError(f"clips of {seconds:.2f} s are too short for events {GAPS[0]} s apart; give more frames")


def _colour(hue: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, 0.95)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _draw_scene(random: np.random.Generator, seconds: float, height: int, width: int, kind: str) -> Scene:
    hue = random.uniform(0, HUES)
    unit = min(height, width) / 64
    radius = unit * (random.uniform(9, 11) if kind != "collide" else random.uniform(7.5, 9))
    impacts = _draw_impacts(random, seconds, regular=kind == "tick")
    position = {
        "bounce": random.uniform(radius, width - radius),
        "collide": random.uniform(1.5 * radius, height - 1.5 * radius),
        "tick": random.uniform(0.4, 0.55),
    }[kind]
    return Scene(
        kind=kind,
        hue=hue,
        colour=_colour(hue),
        pitch=PITCHES[0] * (PITCHES[1] / PITCHES[0]) ** (hue / HUES),
        radius=radius,
        impacts=impacts,
        position=position,
        drift=random.uniform(-8, 8) * unit,
        room=width,
    )


def balls_at(scene: Scene, time: float, height: int, width: int) -> list[tuple[float, float]]:
    """Centres (x, y) of the balls at `time`, in pixels from the top left corner."""
    number = int(np.clip(np.searchsorted(scene.impacts, time, side="right"), 1, len(scene.impacts) - 1))
    start, end = scene.impacts[number - 1], scene.impacts[number]
    part = (time - start) / (end - start)
    unit = min(height, width) / 64
    if scene.kind == "bounce":
        reach = height - 2 * scene.radius - 6 * unit  # of the longest hop: all hops have one gravity
        rise = 4 * reach * ((end - start) / GAPS[1]) ** 2 * part * (1 - part)
        room = scene.room - 2 * scene.radius
        x = (scene.position - scene.radius + scene.drift * time) % (2 * room)
        return [
            (scene.left + scene.radius + (x if x <= room else 2 * room - x), height - 3 * unit - scene.radius - rise)
        ]
    if scene.kind == "collide":  # the balls meet at odd impacts and touch the walls at even ones
        part = part if number % 2 else 1 - part
        wall = scene.radius + 2 * unit
        inward = part * (width / 2 - scene.radius - wall)
        return [(wall + inward, scene.position), (width - wall - inward, scene.position)]
    sweep = 1.1  # radians of the free swing that the stops cut off, so that the pendulum turns with a kink
    angle = scene.position * np.sin(sweep * (2 * part - 1)) / np.sin(sweep) * (1 if number % 2 else -1)
    length = height - 2 * scene.radius - 4 * unit
    return [(width / 2 + length * np.sin(angle), 2 * unit + length * np.cos(angle) + scene.radius)]


def draw_frame(scenes: Sequence[Scene], time: float, height: int, width: int) -> np.ndarray:
    """The picture at `time`: [H, W, 3] uint8, edges antialiased."""
    picture = np.broadcast_to(BACKGROUND, (height, width, 3)).copy()
    for scene in scenes:
        _draw(picture, scene, time)
    return np.round(picture).astype(np.uint8)


def _draw(picture: np.ndarray, scene: Scene, time: float) -> None:
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width] + 0.5
    unit = min(height, width) / 64
    centres = balls_at(scene, time, height, width)
    if scene.kind == "bounce":
        _blend(picture, FURNITURE, np.clip(y - (height - 3 * unit) + 0.5, 0, 1))
    elif scene.kind == "collide":
        _blend(picture, FURNITURE, np.clip(np.maximum(2 * unit - x, x - (width - 2 * unit)) + 0.5, 0, 1))
    else:
        dx, dy = centres[0][0] - width / 2, centres[0][1] - 2 * unit
        along = np.clip(((x - width / 2) * dx + (y - 2 * unit) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.hypot(x - width / 2 - along * dx, y - 2 * unit - along * dy)
        _blend(picture, FURNITURE, np.clip(1.2 * unit - distance + 0.5, 0, 1))
    for shade, (centre_x, centre_y) in zip((1.0, 0.75), centres, strict=False):
        distance = np.hypot(x - centre_x, y - centre_y)
        _blend(picture, np.array(scene.colour) * shade, np.clip((scene.radius - distance) / SOFT + 0.5, 0, 1))


def events_of(scenes: Sequence[Scene], seconds: float) -> list[dict[str, float]]:
    """The events of all objects, in the order of time."""
    return sorted((event for scene in scenes for event in scene.events(seconds)), key=lambda event: event["time"])


def make_sound(scenes: Sequence[Scene], seconds: float, sample_rate: int) -> np.ndarray:
    """The sound of the clip: [samples] float32 in [-1, 1], mono."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    sound = np.zeros_like(time)
    for event in events_of(scenes, seconds):
        after = np.maximum(time - event["time"], 0)
        tone = np.sin(2 * np.pi * event["pitch"] * after) * np.exp(-after / 0.10)
        thump = np.sin(2 * np.pi * THUMP * after) * np.exp(-after / 0.07)
        sound += event["loudness"] * (0.4 * tone + 0.5 * thump)
    return sound.clip(-1, 1).astype(np.float32)


def describe(scenes: Sequence[Scene]) -> str:
    """A caption that names kind, colour and pitch."""
    if len(scenes) > 1:
        colours = [colour_name(scene.hue) for scene in scenes]
        named = ", ".join(f"a {colour} one" for colour in colours[:-1]) + f" and a {colours[-1]} one"
        return f"{len(scenes)} balls bounce on the floor, {named}, each with a tone of its own."
    scene = scenes[0]
    colour = colour_name(scene.hue)
    pitch = "low" if scene.pitch < 420 else "high" if scene.pitch > 640 else "middle"
    if scene.kind == "bounce":
        return f"A {colour} ball bounces on the floor, with a thump and a {pitch} tone at each bounce."
    if scene.kind == "collide":
        return f"Two {colour} balls collide with each other and with the walls, with a {pitch} tone at each impact."
    return f"A pendulum with a {colour} bob swings and ticks, with a {pitch} tone at each turn."


def colour_name(hue: float) -> str:
    """What a hue (0..1) is called."""
    return next(name for bound, name in COLOURS if hue <= bound)


def write_clip(folder: Path, number: int, config: SynthesizeConfig) -> bool:
    """Make clip `number` and the two files beside it; False when it is there already."""
    path = folder / f"clip-{number:06d}.mp4"
    if path.exists():
        return False  # written last, so the other two are there too
    seconds = config.frames / config.fps
    kind = config.kinds[number % len(config.kinds)]
    scenes = draw_scenes(config.seed, number, seconds, config.height, config.width, kind)
    caption = describe(scenes)
    truth: dict[str, Any] = {
        "kind": kind,
        "seed": config.seed,
        "number": number,
        "seconds": seconds,
        "fps": config.fps,
        "frames": config.frames,
        "events": events_of(scenes, seconds),
        "objects": [{name: getattr(scene, name) for name in ("colour", "hue", "pitch", "radius")} for scene in scenes],
        "caption": caption,
    }
    frames = [draw_frame(scenes, i / config.fps, config.height, config.width) for i in range(config.frames)]
    sound = make_sound(scenes, seconds, config.sample_rate)
    words = json.dumps(truth, indent=1) + "\n"
    write_atomically(path.with_suffix(".json"), words)
    write_atomically(
        path.with_suffix(".txt"), lambda unfinished: unfinished.write_text(f"{caption}\n", encoding="utf-8")
    )
    write_atomically(path, lambda unfinished: encode_mp4(unfinished, frames, config.fps, sound, config.sample_rate))
    return True


def encode_mp4(
    path: Path,
    frames: list[np.ndarray] | None,
    fps: float,
    sound: np.ndarray | None,
    sample_rate: int,
    comment: str = "",
) -> None:
    """H.264 and AAC in mp4, one thread, so that equal input gives equal bytes.

    frames: [H, W, 3] uint8 each; sound: [samples] float32, mono; both begin at time 0. None: no such stream.
    comment: stands in the file's metadata.
    """
    with av.open(str(path), "w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        if frames is not None:
            video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = "yuv420p"
            video.options = {"crf": "14", "preset": "veryfast", "threads": "1", "bf": "0"}
        if sound is not None:
            audio = container.add_stream("aac", rate=sample_rate, layout="mono")
            audio.bit_rate = 96000
        for i, frame in enumerate(frames or ()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = i
            picture.time_base = 1 / Fraction(fps).limit_denominator(1001)
            container.mux(video.encode(picture))
        if frames is not None:
            container.mux(video.encode(None))
        if sound is not None:
            for start in range(0, len(sound), 1024):
                block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = sample_rate, start, Fraction(1, sample_rate)
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))


def synthesize(config: SynthesizeConfig) -> Path:
    """Make all clips of `config`; returns their folder. DataError for settings that can't be met."""
    if config.clips < 1 or config.frames < 1 or config.fps <= 0:
        raise DataError(f"clips={config.clips} frames={config.frames} fps={config.fps}: each must be above 0")
    if config.height < 16 or config.width < 16 or config.height % 2 or config.width % 2:
        raise DataError(f"height={config.height} width={config.width}: each must be even and at least 16 (H.264)")
    if config.sample_rate not in (16000, 48000):
        raise DataError(f"sample_rate={config.sample_rate}: choose 16000 or 48000")
    unknown = sorted(set(config.kinds) - set(KINDS))
    if unknown or not config.kinds:
        raise DataError(f"kinds={config.kinds}: choose from {', '.join(KINDS)}")
    folder = Path(config.output)
    settings = {name: value for name, value in asdict(config).items() if name not in ("output", "clips", "workers")}
    settings["version"] = VERSION
    record = folder / "synthesize.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise DataError(
            f"{folder} holds clips of other settings ({record}: {record.read_text()}); choose another output"
        )
    for number, kind in enumerate(config.kinds):  # fails early, in this process
        draw_scenes(config.seed, number, config.frames / config.fps, config.height, config.width, kind)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(settings))
    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TextColumn("time left"), TimeRemainingColumn())
    made = 0
    workers = config.workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, Progress(*columns) as progress:
        task = progress.add_task("clips", total=config.clips)
        jobs = [pool.submit(write_clip, folder, number, config) for number in range(config.clips)]
        try:
            for job in as_completed(jobs):
                made += job.result()
                progress.advance(task)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker died, perhaps out of memory; run the same command again with workers=1"
            ) from error
    print(f"{made} clips made, {config.clips - made} existed already: {folder}")
    return folder


def _run(call: Call[SynthesizeConfig]) -> None:
    synthesize(call.config)


def _blend(picture: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> None:
    picture += cover[..., None] * (colour - picture)


PROGRAM = Program("synthesize", __doc__, _run, schema=Schema("synthesize", SynthesizeConfig, ()))

if __name__ == "__main__":
    PROGRAM.start()
