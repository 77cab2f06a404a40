"""What is not whole, or can't be shown as it was meant, is refused with the reason; what is whole never is."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bench.data.clips import H264, I_AND_P, WITH_B, Case, picture, read_number, write_clip, x264, x265
from data.errors import DataError
from data.media import open_media
from data.media.open import as_data_error

MakeMedia = Callable[..., Path]


def without_packet(source: Path, target: Path, lost: int) -> Path:
    """A copy in which one packet of the picture is missing."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.size and number != lost:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize(
    "case",
    [
        Case("libx264", "mp4", "24", *H264["closed 48, 2 B"]),
        Case("libx264", "ts", "24", *H264["closed 48, 2 B"]),
        Case("mpeg2video", "mkv", "24", "open 12, 2 B", WITH_B),
        Case("mpeg4", "mp4", "24", "12, no B", I_AND_P),
        Case("libvpx", "mkv", "24", "closed 24", {"deadline": "realtime", "cpu-used": "8", "g": "24"}),
        Case("ffv1", "mkv", "24", "12", {"g": "12"}),
    ],
    ids=lambda case: f"{case.codec}-{case.container}",
)
def test_a_lost_picture_costs_the_windows_that_depend_on_it(case: Case, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / case.name, case, 240)
    lost = next(place for place in range(52, 60) if _is_reference(whole, place))
    path = without_packet(whole, tmp_path / f"lost.{case.container}", lost)
    with open_media(path) as media:
        begin = media.span[0]
        with pytest.raises(DataError, match="from 2.* s on is not whole .*missing"):
            media.frames(begin + lost / 24 + 1 / 24, 3, 24, *case.size)
        for start in (0.5, 6.0, 1.0):  # before it, and behind the next place to begin at
            grey = ((media.frames(begin + start, 9, 24, *case.size) + 1) * 127.5).mean(dim=0).numpy()
            assert [read_number(one) for one in grey] == list(range(round(start * 24), round(start * 24) + 9))


@pytest.mark.parametrize(
    "case",
    [
        Case("libx264", "mp4", "24", *x264("closed 24, fixed", g="24", bf="2", **{"x264-params": "b-adapt=0"})),
        Case("libx265", "mkv", "24", *x265("closed 24, fixed", "keyint=24:open-gop=0:bframes=2:b-adapt=0:b-pyramid=0")),
        Case("mpeg2video", "mkv", "24", "open 12, 2 B", WITH_B),
    ],
    ids=lambda case: case.codec,
)
def test_a_lost_picture_that_no_other_needs_costs_the_windows_in_its_time(case: Case, tmp_path: Path) -> None:
    """The one before it would be shown twice; all others are whole."""
    whole = write_clip(tmp_path / case.name, case, 96)
    with av.open(str(whole)) as container:
        order = np.argsort(np.argsort([packet.pts for packet in container.demux(video=0) if packet.size]))
    lost = next(
        place for place in range(50, 96) if not _is_reference(whole, place) and order[place + 1] < order[place - 1]
    )
    path = without_packet(whole, tmp_path / f"lost.{case.container}", lost)
    number = int(order[lost])
    with open_media(path) as media:
        begin = media.span[0]
        for first in (number - 4, number - 2, number):
            with pytest.raises(DataError, match="not whole"):
                media.frames(begin + first / 24, 5, 24, *case.size)
        for first in (number - 30, number - 6):
            grey = ((media.frames(begin + first / 24, 6, 24, *case.size) + 1) * 127.5).mean(dim=0).numpy()
            assert [read_number(one) for one in grey] == list(range(first, first + 6))


def test_a_lost_key_frame_of_h264_costs_what_follows_it(tmp_path: Path) -> None:
    case = Case("libx264", "mp4", "24", *H264["closed 12, no B"])
    path = without_packet(write_clip(tmp_path / case.name, case, 72), tmp_path / "lost.mp4", 36)
    with open_media(path) as media:
        for first in (35, 37, 40):
            with pytest.raises(DataError, match="not whole"):
                media.frames(first / 24, 4, 24, *case.size)
        media.frames(30 / 24, 6, 24, *case.size)
        media.frames(48 / 24, 6, 24, *case.size)


def _is_reference(path: Path, place: int) -> bool:
    with av.open(str(path)) as container:
        frames = {frame.pts: int(frame.pict_type) for frame in container.decode(video=0)}
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return frames[packets[place].pts] != 3 and not packets[place].is_keyframe


def test_a_concealed_picture_costs_its_window(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", Case("libx264", "mp4", "24", *H264["closed 12, no B"]), 240)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    position, size = places[100]
    content[position + size // 2 : position + size // 2 + 8] = bytes(range(90, 98))
    path.write_bytes(content)
    with open_media(path) as media:
        with pytest.raises(DataError, match=r"not whole \(the decoder"):
            media.frames(100 / 24, 4, 24, 64, 192)
        media.frames(1.0, 40, 24, 64, 192)
        media.frames(7.0, 40, 24, 64, 192)


def test_interlaced_pictures_are_rebuilt(tmp_path: Path) -> None:
    """A bright edge that moves by 16 pixels from field to field: woven, its rows alternate."""
    path = tmp_path / "i.ts"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        stream.options = {"flags": "+ildct+ilme", "q:v": "2", "qmin": "1", "qmax": "2", "g": "12", "field_order": "tt"}
        for number in range(50):
            luma = np.full((192, 320), 16, np.uint8)
            for field in range(2):
                luma[field::2, : 16 + (2 * number + field) * 3 % 280] = 235
            grey = np.full((96, 320), 128, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, grey]), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert any(frame.interlaced_frame for frame in container.decode(video=0)), "the encoder flags its frames"
    with open_media(path) as media:
        whole = media.frames(media.span[0], 40, 25, 192, 320)
        assert media.treatment["deinterlaced"] == "bwdif"
        rows = whole.mean(dim=0)[:, 8:-8]
        assert float((rows[:, 1:] - rows[:, :-1]).abs().mean()) < 0.01  # woven: 0.03
        later = media.frames(media.span[0] + 12 / 25, 9, 25, 192, 320)  # the same frames, whatever was read before
        assert float((later - whole[:, 12:21]).abs().max()) == 0


@pytest.mark.parametrize(("transfer", "name"), [("16", "PQ"), ("18", "HLG")])
def test_hdr_is_refused_with_the_way_out(tmp_path: Path, transfer: str, name: str) -> None:
    path = tmp_path / "h.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx265", rate=24)
        stream.width, stream.height, stream.pix_fmt = 192, 64, "yuv420p10le"
        stream.options = {
            "x265-params": f"log-level=error:colorprim=9:transfer={transfer}:colormatrix=9", "preset": "ultrafast",
        }  # fmt: skip
        for number in range(8):
            frame = picture(number, np.zeros((32, 192), np.uint8)).reformat(format="yuv420p10le")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=rf"h\.mp4 is HDR \({name}\); convert it first"):
        open_media(path)


def test_a_playlist_opens_nothing(make_media: MakeMedia, tmp_path: Path) -> None:
    make_media(tmp_path / "real.mp4")
    texts = {
        "ffconcat.mp4": "ffconcat version 1.0\nfile real.mp4\n",
        "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n",
        "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="p"></MPD>',
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            open_media(tmp_path / name)


@pytest.mark.parametrize("error", [MemoryError(), av.error.MemoryError(12, ""), RecursionError(), ValueError("\n")])
def test_every_error_is_the_verdict_of_one_file(error: Exception) -> None:
    with (
        pytest.raises(DataError, match=rf"x\.mp4 can't be decoded \({type(error).__name__}"),
        as_data_error(Path("x.mp4")),
    ):
        raise error
    with pytest.raises(KeyboardInterrupt), as_data_error(Path("x.mp4")):
        raise KeyboardInterrupt


def test_a_cut_begins_where_pictures_can_be_shown(tmp_path: Path) -> None:
    """A copy from the second key frame of an open GOP on: the pictures that lead it refer to what is not there."""
    case = Case("libx264", "mkv", "24", *H264["open 24, pyramid"])
    whole = write_clip(tmp_path / case.name, case, 120)
    cut = tmp_path / "cut.mkv"
    with av.open(str(whole)) as old, av.open(str(cut), "w") as new:
        stream, started = new.add_stream_from_template(old.streams.video[0]), False
        for packet in old.demux(old.streams.video[0]):
            started |= bool(packet.size) and packet.is_keyframe and (packet.pts or 0) > 900
            if started and packet.size:
                packet.stream = stream
                new.mux(packet)
    with open_media(cut) as media:
        start, end = media.span
        first = read_number(((media.frames(start, 1, 24, 64, 192)[:, 0] + 1) * 127.5).mean(dim=0).numpy())
        assert first in (24, 48) and end - start == pytest.approx((120 - first) / 24, abs=0.01)
        for later in (2.0, 0.5, 0.0):
            grey = ((media.frames(start + later, 9, 24, 64, 192) + 1) * 127.5).mean(dim=0).numpy()
            assert [read_number(one) for one in grey] == [first + round(later * 24) + k for k in range(9)]
