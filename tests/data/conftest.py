"""What several tests of the data room need."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.prepare.pool import Listener, Pool
from data.prepare.spool import FileResult, WindowResult, read_spool
from data.prepare.worker import run_file
from data.sources import SourceFile

MakeMedia = Callable[..., Path]


class HerePool(Pool):
    """The pool in this very process, where a test can replace what it wants to watch or to break."""

    def run(
        self, sources: Iterable[SourceFile], folder: Path, listener: Listener
    ) -> Iterator[tuple[SourceFile, FileResult, Iterator[WindowResult]]]:
        """As Pool.run, without its guard against files that end the process."""
        torch.set_num_threads(1)
        pipeline = self.make(self.config)
        for number, source in enumerate(sources):
            spool = folder / str(number)
            result = FileResult(source.reason)
            if not source.reason:
                result = run_file(pipeline, source, spool, lambda done, windows: None)
            yield source, result, iter(()) if result.rejected else read_spool(spool)
            listener.file()


@pytest.fixture
def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """data.prepare does all files in the test's process."""
    monkeypatch.setattr("data.prepare.curation.Pool", HerePool)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of natural clips; the test is skipped where there is none."""
    folder = Path(os.environ.get("MOVA_TEST_CLIPS") or Path(__file__).parents[3] / "shared" / "clips")
    if not folder.is_dir():
        pytest.skip(f"no natural clips: set MOVA_TEST_CLIPS to their folder ({folder} does not exist)")
    return folder


@pytest.fixture(scope="session")
def make_media() -> MakeMedia:
    """A function that writes a media file; see write_media."""
    return write_media


def level(number: int) -> int:
    """Grey level of the picture of frame `number`: neighbours differ by more than the codec's noise."""
    return 30 + 37 * number % 200


def write_media(
    path: Path,
    times: Sequence[float] | None = tuple(i / 24 for i in range(60)),
    sound: np.ndarray | None = None,
    sound_start: float = 0.0,
    rate: int = 48000,
    size: tuple[int, int] = (48, 64),
    pictures: Sequence[np.ndarray] | None = None,
    more_pictures: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    bframes: int = 2,
) -> Path:
    """A file with frames at `times` (seconds; None: no picture; plain grey of `level`, or `pictures`) and `sound` from
    sound_start on (None: no sound). more_pictures: size (H, W) of a second video stream, which is black."""
    with av.open(str(path), "w", options=options or {}) as container:
        streams = []
        if times is not None:
            for number, (height, width) in enumerate([size, *([more_pictures] if more_pictures else [])]):
                video = container.add_stream("libx264", rate=1000)
                video.height, video.width, video.pix_fmt = height, width, "yuv420p"
                video.options = {"crf": "6", "preset": "veryfast", "threads": "1", "bf": str(bframes), "g": "12"}
                video.time_base = video.codec_context.time_base = Fraction(1, 1000)
                streams.append((number, video, height, width))
        audio = container.add_stream("aac", rate=rate, layout="mono") if sound is not None else None
        for number, video, height, width in streams:
            assert times is not None
            for i, time in enumerate(times):
                picture = np.full((height, width, 3), 0 if number else level(i), np.uint8)
                if pictures is not None and number == 0:
                    picture = pictures[i]
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None and sound is not None:
            offset = round(sound_start * rate)
            for start in range(0, len(sound), 1024):
                block = np.ascontiguousarray(sound[None, start : start + 1024], dtype=np.float32)
                part = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = rate, offset + start, Fraction(1, rate)
                container.mux(audio.encode(part))
            container.mux(audio.encode(None))
    return path
