"""Frames to pixels: crop, scale and colour in one step of libswscale.

Colour: the matrix and the range are the frame's own. Without a matrix, BT.709 for pictures of more than 576 rows or at
least 1280 columns, else BT.601; without a range, full for the yuvj formats, grey and RGB, else limited. BT.2020 is
converted by its matrix, constant luminance is refused; primaries are left as they are. Scaling is bicubic and widens
its filter when it shrinks, so that nothing aliases: at most 3 of 255 from an antialiased bicubic in floating point on a
natural frame. Alpha is dropped.
"""

from pathlib import Path
from typing import Any

import av.filter
import numpy as np

from data.errors import DataError

MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics
BEST = "bicubic+accurate_rnd+full_chroma_int"
FAST = "area"


class Scaler:
    """Turns frames into uint8 pictures [3, height, width] of one size: the centre, cropped to their shape.

    turn: 2 x 2 matrix of the display, see `data.media.media`; pixel_aspect: of the frame as it is displayed.
    """

    def __init__(
        self, height: int, width: int, pixel_aspect: float, turn: tuple[int, int, int, int], flags: str = BEST
    ):
        self.height, self.width, self.pixel_aspect, self.turn, self.flags = height, width, pixel_aspect, turn, flags
        self._graph: Any = None
        self._of: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> np.ndarray:
        """DataError for a colour matrix that libswscale doesn't know."""
        of = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range))
        if self._graph is None or of != self._of:
            self._graph, self._of = self._build(frame), of
        self._graph.push(frame)
        scaled = self._graph.pull()
        planes = [
            _plane(scaled.planes[number], scaled.width, scaled.height) for number in (2, 0, 1)
        ]  # stored as G, B, R
        pixels = np.ascontiguousarray(turned(np.stack(planes), self.turn))
        if int(frame.color_range) == 1 and is_grey(frame):  # libswscale takes any grey for full range
            pixels = ((pixels.astype(np.float32) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)
        return pixels

    def _build(self, frame: Any) -> Any:
        sideways = self.turn[0] == 0
        height, width = (self.width, self.height) if sideways else (self.height, self.width)
        aspect = 1 / self.pixel_aspect if sideways else self.pixel_aspect
        crop = crop_box(frame.height, frame.width, height, width, aspect)
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        matrix, limits = matrix_of(frame), range_of(frame)
        steps = [
            graph.add("crop", f"w={crop[3]}:h={crop[2]}:x={crop[1]}:y={crop[0]}:exact=1"),
            graph.add(
                "scale",
                f"w={width}:h={height}:flags={self.flags}:in_color_matrix={matrix}:in_range={limits}:out_range=full",
            ),
            graph.add("format", "gbrp"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(source, *steps)
        graph.configure()
        return graph


def crop_box(
    full_height: int, full_width: int, height: int, width: int, pixel_aspect: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre that has the shape of height x width; on even places, for the chroma."""
    aspect = width / height / pixel_aspect  # in source pixels
    crop_height = min(full_height, max(1, round(full_width / aspect)))
    crop_width = min(full_width, max(1, round(full_height * aspect)))
    return (full_height - crop_height) // 4 * 2, (full_width - crop_width) // 4 * 2, crop_height, crop_width


def matrix_of(frame: Any) -> str:
    """Name of the frame's colour matrix, for libswscale."""
    space = int(frame.colorspace)
    if frame.format.is_rgb or is_grey(frame):
        return "auto"
    if (assumed := assumed_matrix(frame)) is not None:
        return assumed
    if space not in MATRICES:
        raise DataError(f"the picture's colour matrix {space} is not supported; convert the file to BT.709")
    return MATRICES[space]


def assumed_matrix(frame: Any) -> str | None:
    """The matrix that is taken where the frame names none; None where it does, or has no need of one."""
    if frame.format.is_rgb or is_grey(frame) or int(frame.colorspace) not in (0, 2, 3):
        return None
    return "bt709" if frame.height > 576 or frame.width >= 1280 else "smpte170m"


def refuse_hdr(path: Path, frame: Any) -> None:
    """DataError for a frame whose transfer is PQ or HLG: shown as it is, its colours are wrong."""
    if int(frame.color_trc) in HDR:
        raise DataError(
            f"{path} is HDR ({HDR[int(frame.color_trc)]}); convert it first, for example: ffmpeg -i IN -vf "
            "zscale=t=linear,tonemap=hable,zscale=t=bt709:m=bt709:p=bt709:r=tv,format=yuv420p OUT"
        )


def display_turn(frame: Any) -> tuple[int, int, int, int]:
    """The display matrix of a frame as (a, b, c, d), see `turned`, each -1, 0 or 1; (1, 0, 0, 1) without one."""
    data = next((bytes(one) for one in frame.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, _, _, _, _ = np.frombuffer(data, "<i4", 9).tolist()
    if abs(a) >= abs(b):
        return 1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1
    return 0, 1 if b >= 0 else -1, 1 if c >= 0 else -1, 0


def range_of(frame: Any) -> str:
    """full or limited."""
    if int(frame.color_range) in (1, 2):
        return "full" if int(frame.color_range) == 2 else "limited"
    return "full" if frame.format.is_rgb or is_grey(frame) or frame.format.name.startswith("yuvj") else "limited"


def is_grey(frame: Any) -> bool:
    """No colour difference is stored (a palette counts as well: it holds RGB)."""
    answer: bool = frame.format.name.startswith(("gray", "pal", "mono", "ya"))
    return answer


def turned(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """[..., H, W] shown through a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y, y downwards."""
    a, b, c, d = turn
    if a == 0:
        pixels, a, d = np.swapaxes(pixels, -1, -2), c, b
    return pixels[..., :: 1 if d > 0 else -1, :: 1 if a > 0 else -1]


def _plane(plane: Any, width: int, height: int) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width]
