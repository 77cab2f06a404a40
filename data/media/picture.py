"""Reads frames by time: from a point where decoding is exact, forward, watching the decoder's log messages.

A linear decode from the first packet is the reference. Reading continues where the last window ended, or begins at an
entry of the packet table where that saves decoding. After a seek, packets and frames must be those that the table
expects, else the entry before is tried, at last the first packet. A window is refused when, between the entry that one
of its frames depends on and that frame, packets are missing or damaged, or the decoder reports an error or conceals a
part.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.filter
import av.logging
import numpy as np

from data.errors import DataError
from data.media.open import open_container
from data.media.packets import Packets

SEEK_COST = 12  # packets whose decoding costs about as much as a seek
RECENT = 3  # frames that are kept for the next window: its first one, and the one before that for deinterlacing
Frames = Iterator[tuple[int, Any]]  # (time, av.VideoFrame) in presentation order
# what decoders say of pictures that they could not decode as they were meant
DAMAGE = (
    "concealing", "error while decoding", "error at mb", "could not find ref", "error constructing", "crc mismatch",
    "damaged", "bad vlc", "error y=", "end mismatch", "slice end not reached", "illegal mb",
    "reference picture missing", "missing reference", "error parsing obu", "overrun", "invalid mb type",
    "error decoding",
)  # fmt: skip


class SeekMissed(Exception):
    """What came after a seek is not what the table expects."""


class TimesGoBack(DataError):
    """Pictures come out of the decoder in another order than their timestamps."""


class PictureReader:
    """Frames of one picture in presentation order, each with the time that the packet table gives it.

    Needs `listening` around its use: what the decoder logs decides which frames are whole.
    """

    def __init__(self, path: Path, stream: int, packets: Packets, options: dict[str, str] | None = None):
        self.path, self.packets = path, packets
        self.stream, self._options = stream, options or {}
        self._seekable = packets.timed
        self._container: Any = None
        self._run: Frames | None = None
        self._fed = 0  # packets given to the decoder, counted in the order of decoding
        self._recent: deque[tuple[int, Any]] = deque(maxlen=RECENT)
        self._damage = dict(packets.damage)  # words by packet; grows while decoding

    def close(self) -> None:
        """Free the decoder."""
        self._run = None
        self._recent.clear()
        if self._container is not None:
            self._container.close()
            self._container = None

    def entry(self, time: int) -> int:
        """Number of the entry that a read at this time begins at; -1: the first packet."""
        return self.packets.entry_before(time) if self._seekable else -1

    def read(self, time: int, entry: int) -> Frames:
        """Frames from one that is shown at `time`, or before it, on. SeekMissed: begin again with the entry before."""
        begins = int(self.packets.entries[entry]) if entry >= 0 else 0
        ready = self._run is not None and bool(self._recent) and self._recent[0][0] <= time
        if not ready or begins > self._fed + SEEK_COST:
            self._recent.clear()
            self._run = self._decode(entry)
        yield from list(self._recent)
        assert self._run is not None
        try:
            for found in self._run:
                self._recent.append(found)
                yield found
        except Exception:
            self._run = None  # it has ended, though frames are left
            raise

    def decoding_times(self, frames: int) -> bool:
        """Whether the first frames show that what the packets bear are times of decoding, not of showing."""
        try:
            for _ in zip(range(frames), self.read(int(self.packets.pts.min()), -1), strict=False):
                pass
        except TimesGoBack:
            return True
        return False

    def missed(self, entry: int) -> None:
        """After SeekMissed: do not begin at this entry again; when a linear decode misses too, DataError."""
        if entry < 0:
            raise DataError(f"{self.path}: other packets come at each reading; is the file being written?")
        self._run = None
        self.packets.entries = np.delete(self.packets.entries, entry)

    def damage(self, first: int, last: int) -> str | None:
        """What is wrong with one of the frames from time `first` to time `last`, all of which have been decoded."""
        if not self._damage:
            return None
        table = self.packets
        for time in table.shown[np.searchsorted(table.shown, first) : np.searchsorted(table.shown, last, "right")]:
            index, entry = table.index_of(int(time)), table.entry_before(int(time))
            begins, exact = (
                (int(table.entries[entry]), table.pts[table.entries[entry]]) if entry >= 0 else (0, table.shown[0])
            )
            for position, words in self._damage.items():
                if index is not None and begins <= position <= index and table.pts[position] >= exact:
                    return words
        return None

    def _decode(self, entry: int) -> Frames:
        """One run of the decoder, from an entry on."""
        exact = int(self.packets.pts[self.packets.entries[entry]]) if entry >= 0 else None
        number, before = 0, None
        for index, packet in self._packets(entry):
            self._fed = index + 1
            for frame in self._frames_of(packet.stream.codec_context, packet, index):
                time = self._time_of(frame, number)
                number += 1
                if exact is not None and time is not None and time >= exact:
                    if time > exact or not frame.key_frame:
                        raise SeekMissed(f"the frame at {exact} is none to begin with")
                    exact = None
                if exact is None and time is not None:
                    if before is not None and time < before:
                        raise TimesGoBack(
                            f"{self.path}: timestamps are not in the order of the pictures; remux the file"
                        )
                    before = time
                    yield time, frame

    def _open(self, seek: int) -> Any:
        """The stream, at or before an entry as far as the container knows; at -1 opened anew: nothing is left over."""
        if self._container is None or seek < 0:
            if self._container is not None:
                self._container.close()
            self._container = open_container(self.path, only=self.stream)
            self._container.streams[self.stream].codec_context.options = self._options
        stream = self._container.streams[self.stream]
        if seek >= 0:
            time = int(self.packets.pts[self.packets.entries[seek]])
            self._container.seek(time, stream=stream, backward=True)
        return stream

    def _packets(self, entry: int) -> Iterator[tuple[int, Any]]:
        """(index, packet) from the entry on, each the one that the table expects; the last one is the flush packet."""
        table = self.packets
        index = int(table.entries[entry]) if entry >= 0 else 0
        for packet in self._from(entry) if entry >= 0 else self._container_packets(-1):
            if packet.size and entry >= 0 and (index >= len(table.pts) or packet.pts != table.pts[index]):
                raise SeekMissed(f"packet {index} is not the one that was expected")
            yield index, packet
            index += 1
            if packet.size == 0:
                return

    def _from(self, entry: int) -> Iterator[Any]:
        """Packets from an entry's on. A seek that lands behind it is repeated further back, at last from the start."""
        table = self.packets
        wanted = int(table.entries[entry])
        seek, step = entry, 1
        while True:
            packets = self._container_packets(seek)
            for packet in packets:
                if packet.pts == table.pts[wanted] and packet.size:
                    yield packet
                    yield from packets
                    return
                position = table.index_of(packet.pts) if packet.pts is not None else None
                if position is not None and position > wanted:
                    break
            if seek < 0:
                raise SeekMissed(f"packet {wanted} does not come again")
            seek, step = max(-1, seek - step), 2 * step

    def _container_packets(self, seek: int) -> Iterator[Any]:
        stream = self._open(seek)
        yield from self._container.demux(stream)

    def _frames_of(self, codec: Any, packet: Any, index: int) -> list[Any]:
        """What the decoder gives for one packet; what it complains of is remembered."""
        with av.logging.Capture() as lines:
            try:
                frames = codec.decode(packet if packet.size else None)
            except av.FFmpegError as error:
                frames = []
                self._damage.setdefault(index, f"the decoder fails: {error.strerror or type(error).__name__}")
        for _, name, message in lines:
            if name == codec.name and any(words in message.lower() for words in DAMAGE):
                self._damage.setdefault(index, f"the decoder reports: {message.strip()[:80]}")
        if any(frame.is_corrupt for frame in frames):
            self._damage.setdefault(index, "the decoder flags a frame as corrupt")
        values: list[Any] = frames
        return values

    def _time_of(self, frame: Any, number: int) -> int | None:
        if self.packets.timed:
            result: int | None = frame.pts
            return result
        return int(self.packets.pts[number]) if number < len(self.packets.pts) else None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let the decoders log, for code that captures it: by default av silences them, and drops earlier messages."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture():
            yield
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def shown_at(frames: Frames, times: np.ndarray, last: int) -> Iterator[tuple[slice, Any]]:
    """For rising times what is shown: (places of `times`, frame), the first frame for what lies before it.

    last: the time from which on no further frame is needed.
    """
    position, previous = 0, None
    for time, frame in frames:
        end = position
        while end < len(times) and times[end] < time:
            end += 1
        if end > position and previous is not None:
            yield slice(position, end), previous
            position = end
        previous = frame
        if time >= last or position == len(times):
            break
    if position < len(times) and previous is not None:
        yield slice(position, len(times)), previous


def deinterlaced(frames: Frames) -> Frames:
    """One frame for each, the same times; those flagged as interlaced are rebuilt from their fields (bwdif).

    A rebuilt frame depends on its neighbours: the first frame that comes out has to be preceded by one more.
    """
    graph, times = None, deque[int]()
    for time, frame in frames:
        if graph is None:
            graph = _bwdif(frame)
        times.append(time)
        graph.push(frame)
        yield from _pull(graph, times)
    if graph is not None:
        graph.push(None)
        yield from _pull(graph, times)


def _bwdif(frame: Any) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _pull(graph: Any, times: deque[int]) -> Frames:
    while times:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield times.popleft(), frame
