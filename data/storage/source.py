"""An opened file of any storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ByteSource(Protocol):
    """Opened bytes. `whole`: each read costs a request, so that all that is needed is taken in one."""

    whole: bool

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers with the bytes from `offset` on; returns their number, fewer only at the end."""
