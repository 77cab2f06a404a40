"""Pixels from first principles: colour matrices, ranges, formats, the display matrix, the crop, and no aliasing."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from data.errors import DataError
from data.media import open_media
from data.media.scale import Scaler, crop_box, turned

WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
COLOURS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.5, 0.25, 0.75)]


def plain(pixels: str, values: list[int], height: int = 64, space: int = 2, limits: int = 0) -> Any:
    """A frame of one colour. values: of each plane; space, limits: colour matrix and range, by libavutil's numbers."""
    frame: Any = av.VideoFrame(64, height, pixels)
    for plane, value in zip(frame.planes, values, strict=True):
        kind = "<u2" if "10" in pixels else "u1"
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, value, kind).tobytes())
    frame.colorspace, frame.color_range = space, limits
    frame.pts, frame.time_base = 0, Fraction(1, 24)
    return frame


def stored(rgb: tuple[float, ...], weights: tuple[float, float], full: bool, bits: int) -> list[int]:
    """Y, Cb, Cr of a colour (ITU-R BT.601, BT.709, BT.2020)."""
    red, green, blue = rgb
    luma = weights[0] * red + (1 - sum(weights)) * green + weights[1] * blue
    differences = [(blue - luma) / (2 - 2 * weights[1]), (red - luma) / (2 - 2 * weights[0])]
    if full:
        top = 2**bits - 1
        return [min(top, round(v)) for v in (luma * top, *(one * top + 2 ** (bits - 1) for one in differences))]
    return [round(v * 2 ** (bits - 8)) for v in (16 + 219 * luma, *(128 + 224 * one for one in differences))]


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuv420p10le", "yuv422p10le", "yuva420p"]
)
@pytest.mark.parametrize(
    ("space", "limits", "height", "weights"),
    [(1, 1, 64, 1), (6, 1, 64, 6), (5, 1, 720, 5), (7, 1, 64, 7), (9, 1, 64, 9), (2, 0, 64, 6), (2, 0, 720, 1),
     (1, 2, 64, 1), (5, 2, 64, 5)],
)  # fmt: skip
def test_colours(pixels: str, space: int, limits: int, height: int, weights: int) -> None:
    full = limits == 2 or (pixels.startswith("yuvj") and limits == 0)
    for colour in COLOURS:
        values = stored(colour, WEIGHTS[weights], full, 10 if "10" in pixels else 8)
        frame = plain(pixels, values + [255] * pixels.startswith("yuva"), height, space, limits)
        if pixels.startswith("yuvj") and limits == 1:
            continue  # contradicts itself
        found = Scaler(16, 16, 1.0, (1, 0, 0, 1))(frame)[:, 8, 8]
        assert np.abs(found - 255 * np.array(colour)).max() < 2.2, (colour, found)


def test_grey_and_rgb() -> None:
    scaler = Scaler(16, 16, 1.0, (1, 0, 0, 1))
    assert scaler(plain("gray", [200]))[:, 8, 8].tolist() == [200] * 3
    assert scaler(plain("gray", [235], limits=1))[:, 8, 8].tolist() == [255] * 3
    assert scaler(plain("gray10le", [800]))[:, 8, 8].tolist() == [200] * 3
    assert scaler(plain("gbrp", [10, 20, 200]))[:, 8, 8].tolist() == [200, 10, 20]
    with pytest.raises(DataError, match="colour matrix 10 is not supported"):
        scaler(plain("yuv420p", [100, 100, 100], space=10))


@pytest.mark.parametrize(
    ("turn", "corner"),
    [((1, 0, 0, 1), (0, 0)), ((-1, 0, 0, -1), (1, 1)), ((0, 1, -1, 0), (0, 1)), ((0, -1, 1, 0), (1, 0)),
     ((-1, 0, 0, 1), (0, 1)), ((0, 1, 1, 0), (0, 0))],
)  # fmt: skip
def test_a_display_matrix_moves_the_first_pixel(turn: tuple[int, int, int, int], corner: tuple[int, int]) -> None:
    """x' = a x + c y, y' = b x + d y: a quarter turn clockwise (0, 1, -1, 0) brings the first pixel to the right."""
    picture = np.zeros((1, 4, 6), np.uint8)
    picture[0, 0, 0] = 1
    found = turned(picture, turn)[0]
    assert found.shape == ((6, 4) if turn[0] == 0 else (4, 6))
    assert found[-corner[0], -corner[1]] == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotated_file_stands_upright(tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "r.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(degrees)
        for number in range(4):
            pixels = np.zeros((64, 96, 3), np.uint8)
            pixels[:32, :48] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        turns = next(container.decode(video=0)).rotation % 360 // 90
    with open_media(path) as media:
        assert media.size == ((96, 64) if degrees % 180 else (64, 96))
        found = media.frames(0.0, 1, 24, *media.size)[:, 0].mean(dim=0) > 0
    expected = np.rot90(pixels[..., 0] > 127, turns)
    assert (found.numpy() == expected).mean() > 0.97 and "display_matrix" in media.treatment


def test_the_crop_keeps_the_centre_and_the_shape() -> None:
    assert crop_box(40, 120, 20, 20, 1.0) == (0, 40, 40, 40)
    assert crop_box(120, 40, 40, 40, 1.0) == (40, 0, 40, 40)
    assert crop_box(40, 60, 40, 40, 2.0) == (0, 20, 40, 20)  # pixels of 2:1: shown as 40 x 120
    assert crop_box(1080, 1920, 352, 640, 1.0) == (12, 0, 1056, 1920)


def test_what_is_too_fine_becomes_grey() -> None:
    frame: Any = av.VideoFrame.from_ndarray(
        np.tile(np.array([[0, 255]], np.uint8), (64, 32))[..., None].repeat(3, 2), "rgb24"
    )
    frame.pts, frame.time_base = 0, Fraction(1, 24)
    assert np.abs(Scaler(16, 16, 1.0, (1, 0, 0, 1))(frame).astype(float) - 127.5).max() < 40


def test_scaling_is_that_of_an_antialiased_bicubic(real_clips: Path) -> None:
    """Against torch, in floating point, of the full-size frame."""
    with av.open(str(real_clips / "ovi_two_men_talk.mp4")) as container:
        frame = next(container.decode(video=0))
    full = torch.from_numpy(Scaler(frame.height, frame.width, 1.0, (1, 0, 0, 1))(frame)).float()
    top, left, height, width = crop_box(frame.height, frame.width, 176, 320, 1.0)
    cropped = full[None, :, top : top + height, left : left + width]
    wanted = torch.nn.functional.interpolate(cropped, (176, 320), mode="bicubic", antialias=True)[0].clamp(0, 255)
    found = torch.from_numpy(Scaler(176, 320, 1.0, (1, 0, 0, 1))(frame)).float()
    difference = (found - wanted).abs()
    assert float(difference.mean()) < 1.0 and float(difference.max()) < 8
