"""report.html: everything in one file, every number right, nothing of a file's name interpreted."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.prepare.curation import PrepareConfig, prepare
from data.prepare.report import histogram
from data.windows.filter import FilterConfig

MakeMedia = Callable[..., Path]
NASTY = "<script>alert(1)</script> & co.mp4"


class Page(HTMLParser):
    """What a browser would see: tags, addresses of other files, text; it complains about tags that don't match."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def dataset(make_media: MakeMedia, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number in range(4):
        sound = (0.3 if number else 0.0) * np.sin(np.arange(24000) / (5 + number))
        make_media(folder / f"{number}.mp4", times=[i / 24 for i in range(36)], sound=sound, rate=16000)
    make_media(folder / "deaf.mp4", times=[i / 24 for i in range(36)])
    make_media(folder / "blind.mp4", times=None, sound=0.3 * np.sin(np.arange(24000) / 5), rate=16000)
    make_media(folder / NASTY.replace("/", "_"), times=[i / 24 for i in range(3)])
    (folder / "garbage.mp4").write_bytes(b"no film")
    output = tmp_path_factory.mktemp("out") / "set"
    filters = FilterConfig({"silence_ratio": [None, 0.5], "dover": [1, None]}, missing="keep", absent="skip")
    prepare(
        PrepareConfig(
            str(folder),
            str(output),
            frames=17,
            height=32,
            width=48,
            text_dim=64,
            workers=1,
            filters=filters,
            scores=["silence", "motion"],
        )  # fmt: skip
    )
    return output


def test_one_file_holds_everything(dataset: Path) -> None:
    page = (dataset / "report.html").read_text()
    parsed = Page(page)
    assert parsed.open == [] or parsed.open == ["html", "body"]
    assert parsed.addresses and all(address.startswith("data:image/jpeg;base64,") for address in parsed.addresses)
    assert "script" not in parsed.tags and "link" not in parsed.tags and "url(" not in page and "@import" not in page
    text = " ".join(parsed.words)
    assert NASTY.replace("/", "_") in text
    for line in (dataset / "rejected.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["source"] in text and entry["reason"] in text
    assert "Skipped, since nothing brought the score: dover" in text and "passes" in text


def test_its_numbers_are_right(dataset: Path) -> None:
    summary = json.loads((dataset / "prepare.json").read_text())["summary"]
    page = (dataset / "report.html").read_text()
    assert summary["source_seconds"] == pytest.approx(6 * 1.5 + 3 / 24, abs=0.1)  # garbage has no length
    assert (summary["windows"], summary["windows_seen"], summary["windows_rejected"]) == (10, 12, 2)
    assert f"<b>{summary['source_seconds']:.1f} s</b>" in page and f"<b>{10 * 17 / 24:.1f} s</b>" in page
    assert f"<b>{100 * summary['seconds'] / summary['source_seconds']:.1f} %</b>" in page
    (row,) = re.findall(r"<tr><td>silence_ratio &lt;= 0.5</td>.*?</tr>", page)
    assert re.findall(r">([\d.]+ %|\d+)</td>", row) == ["83.3 %", "83.3 %", "2"]  # 10 of 12; deaf.mp4 is not measured
    assert page.count("<figure title=") == 12 and page.count("no sound") == 2 and page.count("no picture") == 2
    assert set(summary["cpu_seconds"]) == {
        "probe", "window", "decode", "score/silence", "score/motion", "filter", "encode", "text", "write"
    }  # fmt: skip


def test_histograms_draw_all_kept_and_thresholds() -> None:
    values = np.float32([0, 0, 1, 10, np.nan])
    figure = histogram("x", values, np.array([True, False, True, True, True]), [5.0])
    heights = [float(number) for number in re.findall(r'height="([\d.]+)" fill="var\(--all\)"', figure)]
    assert heights == [110, 55, 55] and figure.count("--kept") == 3 and figure.count("stroke-dasharray") == 1
    assert 'x1="160.0"' in figure and "4 measured" in figure and "threshold 5" in figure
    assert "0 measured" in histogram("y", np.float32([np.nan]), np.array([True]), [])
    assert "1 measured" in histogram("z", np.float32([3]), np.array([True]), [])
