"""FLOPs of a clip in Wan 2.1's VAE: those of its products, from the network's shapes (2 per multiply-add).

The first frame goes through by itself, each further four together (a latent frame); what changes the frame rate is
left out for the first one.
"""

from __future__ import annotations

BASE = 96  # channels of the released VAE at full size
LATENT = 16
LEVELS = (1, 2, 4, 4)  # channels over BASE at full, 1/2, 1/4 and 1/8 of the size


def encode_flops(frames: int, height: int, width: int, base: int = BASE) -> float:
    """Of encoding one clip of 1 + 4k frames."""
    rest = (frames - 1) // 4
    return _encode_chunk(1, height, width, base) + rest * _encode_chunk(4, height, width, base)


def decode_flops(frames: int, height: int, width: int, base: int = BASE) -> float:
    """Of decoding one clip of 1 + 4k frames."""
    rest = (frames - 1) // 4
    return _decode_chunk(True, height, width, base) + rest * _decode_chunk(False, height, width, base)


def condition_flops(frames: int, height: int, width: int, memory: int, base: int = BASE) -> float:
    """Of encoding a first frame and zeros as far as the codec's memory of `memory` latent frames."""
    return encode_flops(min(frames, 1 + 4 * memory), height, width, base)


def _encode_chunk(frames: int, height: int, width: int, base: int) -> float:
    """1 frame (the first) or 4."""
    dims = [base * level for level in (1, *LEVELS)]
    places = frames * height * width
    total = _conv(3, base, 27, places)
    for level, (before, after) in enumerate(zip(dims, dims[1:], strict=False)):
        total += _resnet(before, after, places) + _resnet(after, after, places)
        if level < len(LEVELS) - 1:
            places //= 4
            total += _conv(after, after, 9, places)
            if level > 0 and frames > 1:  # halves the frames
                places //= 2
                total += _conv(after, after, 3, places)
    top = dims[-1]
    return (
        total + _middle(top, places, 1) + _conv(top, 2 * LATENT, 27, places) + _conv(2 * LATENT, 2 * LATENT, 1, places)
    )


def _decode_chunk(first: bool, height: int, width: int, base: int) -> float:
    """One latent frame: the first gives one frame, another four."""
    dims = [base * level for level in (LEVELS[-1], *reversed(LEVELS))]
    places = height // 8 * width // 8
    total = _conv(LATENT, LATENT, 1, places) + _conv(LATENT, dims[0], 27, places) + _middle(dims[0], places, 1)
    for level, (before, after) in enumerate(zip(dims, dims[1:], strict=False)):
        entering = before // 2 if level > 0 else before
        total += _resnet(entering, after, places) + 2 * _resnet(after, after, places)
        if level < len(LEVELS) - 1:
            if level < 2 and not first:  # doubles the frames
                total += _conv(after, 2 * after, 3, places)
                places *= 2
            places *= 4
            total += _conv(after, after // 2, 9, places)
    return total + _conv(dims[-1], 3, 27, places)


def _conv(before: int, after: int, taps: int, places: int) -> float:
    return 2.0 * before * after * taps * places


def _resnet(before: int, after: int, places: int) -> float:
    shortcut = _conv(before, after, 1, places) if before != after else 0.0
    return _conv(before, after, 27, places) + _conv(after, after, 27, places) + shortcut


def _middle(channels: int, places: int, frames: int) -> float:
    """Two residual blocks, and attention of one head over each frame between them."""
    of_frame = places // frames
    attention = frames * 4.0 * of_frame**2 * channels
    return 2 * _resnet(channels, channels, places) + _conv(channels, 4 * channels, 1, places) + attention
