"""Times in the cells of tables: seconds, or hours:minutes:seconds."""

import math
import re
from datetime import time, timedelta
from typing import Any

from data.errors import DataError

TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)")


def span_of(start: Any, end: Any, seconds: Any) -> tuple[float, float] | None:
    """(start, end) in seconds of a row's cells; None when it has none of them. DataError when they make no segment."""
    begin, last, length = seconds_of(start), seconds_of(end), seconds_of(seconds)
    if begin is None and last is None and length is None:
        return None
    begin = begin or 0.0
    if last is None:
        last = math.inf if length is None else begin + length
    elif length is not None and abs(begin + length - last) > 0.01:
        raise DataError(f"its end {last:g} s and its length {length:g} s from {begin:g} s on contradict each other")
    if begin < 0:
        raise DataError(f"it begins at {begin:g} s, before the file")
    if not last > begin:
        raise DataError(f"it ends at {last:g} s, not after its start at {begin:g} s")
    return begin, last


def seconds_of(value: Any) -> float | None:
    """Seconds of a number or of a time such as 62.5, "1:02.5", "0:01:02.500"; None of an empty cell."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and (match := TIME.fullmatch(value.strip())):
        hours, minutes, rest = match.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(rest)
    if isinstance(value, timedelta):  # of Parquet files
        return value.total_seconds()
    if isinstance(value, time):
        return value.hour * 3600 + value.minute * 60 + value.second + value.microsecond / 1e6
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise DataError(f"{repr(value)[:80]} is not a time; give seconds, or hours:minutes:seconds")
    return seconds
