"""Still pictures as first frames: pixels, crop and turn; what is no picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.media import read_still

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def levels(path: Path, height: int = 32, width: int = 48) -> np.ndarray:
    found = read_still(path, height, width)
    assert found is not None and found.dtype == torch.float32 and found.shape == (3, height, width)
    return ((found + 1) * 127.5).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "name without an end"])
def test_pixels_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    keys = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(PIXELS).save(tmp_path / name, format=None if "." in name else "PNG", **keys)
    assert np.abs(levels(tmp_path / name) - PIXELS).max() <= 1


def test_the_centre_is_cropped_and_the_turn_is_that_of_the_camera(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.abs(levels(tmp_path / "a.png", 32, 32) - PIXELS[:, 8:40]).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "b.png", exif=exif)
    assert np.abs(levels(tmp_path / "b.png", 48, 32) - np.rot90(PIXELS, -1)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_other_kinds_of_pixels(tmp_path: Path, mode: str) -> None:
    grey = np.repeat(PIXELS[..., :1], 3, axis=2)
    image = Image.fromarray(grey)
    stored = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    stored.save(tmp_path / "a.png")
    shown = np.asarray(stored.convert("RGB")) if mode == "P" else grey  # a palette holds fewer colours
    assert np.abs(levels(tmp_path / "a.png") - shown).max() <= 1
    if mode == "L":
        Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "a.tiff")
        with pytest.raises(DataError, match="floating-point numbers: convert it"):
            read_still(tmp_path / "a.tiff", 32, 48)


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(100))
    assert read_still(tmp_path / "clip.mp4", 32, 48) is None
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-900])
    with pytest.raises(DataError, match="cut.png can't be decoded"):
        read_still(tmp_path / "cut.png", 32, 48)
    with pytest.raises(DataError, match="nothing.png is no file"):
        read_still(tmp_path / "nothing.png", 32, 48)
