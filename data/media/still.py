"""Still pictures: PNG, JPEG, WebP, BMP and TIFF, cropped and scaled as the frames of a clip are."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.media.open import as_data_error
from data.media.scale import Scaler

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def read_still(path: Path, height: int, width: int) -> Tensor | None:
    """[3, height, width] in [-1, 1] of a picture as it is shown (turned as its EXIF data says, its alpha dropped); None
    for a file of another format. DataError for a picture that can't be decoded, or is no file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise DataError(f"{path} is no file")
    with as_data_error(path):
        try:
            opened = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            return None
        with opened as image:
            pixels = _rgb(path, ImageOps.exif_transpose(image))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        scaled = Scaler(height, width, 1.0, (1, 0, 0, 1))(frame)
    return torch.from_numpy(scaled).float().div_(127.5).sub_(1)


def _rgb(path: Path, image: Any) -> np.ndarray:
    """[H, W, 3] uint8. DataError for levels without a known range."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = (np.asarray(image).astype(np.float64) / 257).round()
        if not 0 <= grey.min() <= grey.max() <= 255:
            raise DataError(f"{path}: its levels are none of 8 or 16 bits: convert it to an RGB picture")
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: its levels are floating-point numbers: convert it to an RGB picture")
    return np.asarray(image.convert("RGB"))
