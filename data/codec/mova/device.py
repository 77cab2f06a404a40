"""Runs codecs without gradients, in the requested precision, with reproducible bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.codec import CodecError

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str, key: str) -> torch.dtype:
    """The type of weights and inputs. CodecError for another name. tf32: float32 whose products are rounded."""
    if name not in DTYPES:
        raise CodecError(f"{key}={name}: choose from {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """No gradients; on a GPU the same algorithms every time, and float32 products that are not rounded to TF32 unless
    `precision` says so. CodecError when the device fails or its memory does not suffice: codecs look at their inputs
    before, so that it is no clip's fault, and it ends the work instead of rejecting clip after clip."""
    tf32, before = precision == "tf32", torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32),
        ):
            yield
    except torch.OutOfMemoryError as error:
        raise CodecError(f"{device} has too little memory for the encoders: {_first_line(error)}") from error
    except (RuntimeError, MemoryError) as error:
        raise CodecError(f"the encoders fail on {device}: {_first_line(error)}") from error
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
