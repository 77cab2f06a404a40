"""The picture of the losses: what is read from a run, and that a picture comes of it."""

import json
from pathlib import Path

import pytest
import yaml

from tools.curves import CurvesError, draw, read_curves, save


def make_run(root: Path) -> Path:
    """A run of 20 steps, stopped and resumed after step 7, with one step that was not finite and a half line."""
    (root / "checkpoints").mkdir(parents=True)
    for step in (7, 10, 20):
        (root / "checkpoints" / f"step-{step:08d}").mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump({"checkpoint": {"every": 10}}))
    lines: list[dict[str, object]] = [{"step": 0, "valid/loss": 2.0, "valid/video": 1.7, "valid/audio": 1.5}]
    for step in range(20):
        loss = None if step == 4 else 2.0 - 0.05 * step
        expert = ("high", "low")[step % 2]
        lines.append(
            {
                "step": step,
                "train/loss": loss,
                "train/loss_video": loss,
                "train/loss_audio": 1.0,
                "train/expert": expert,
            }
        )
    lines.append({"step": 20, "valid/loss": 1.0, "valid/video": 0.85, "valid/audio": 0.75})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "metrics.jsonl").write_text(text + '{"step": 20, "lo')
    return root


def test_reads_both_modalities_experts_and_the_stop(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path / "run"))
    assert [step for step, _ in curves.train["video"]["high"]] == [0, 2, 6, 8, 10, 12, 14, 16, 18]
    assert curves.train["audio"]["low"] == [(step, 1.0) for step in range(1, 20, 2)]
    assert curves.valid["video"] == [(0, 1.7), (20, 0.85)]
    assert curves.resumed == [7]
    assert curves.last_step == 20


def test_draws_what_was_read(tmp_path: Path) -> None:
    figure = draw(read_curves(make_run(tmp_path / "run")), "run")
    video, audio = figure.axes
    assert (video.get_title("left"), audio.get_title("left")) == ("Video loss", "Audio loss")
    labels = video.get_legend_handles_labels()[1]
    assert labels == ["training, high-noise expert", "training, low-noise expert", "validation at fixed noise"]
    assert {"resumed", "\N{MINUS SIGN}50 %"} <= {text.get_text() for text in video.texts}
    save(figure, tmp_path / "new" / "losses.png")
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["losses.png"]


def test_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CurvesError, match="does not exist"):
        read_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "valid/loss": 2.0}\n')
    with pytest.raises(CurvesError, match="no training step"):
        read_curves(tmp_path)
    with pytest.raises(CurvesError, match=r"\.png"):
        save(draw(read_curves(make_run(tmp_path / "run")), "run"), tmp_path / "losses.doc")


def test_the_last_point_is_smoothed_like_the_others(tmp_path):
    """One outlier at the right edge, five times as high as the 49 before it: the line must not jump there."""
    run = tmp_path / "run"
    run.mkdir()
    losses = [1.0] * 49 + [5.0]
    lines = [
        json.dumps({"step": step, "train/loss": loss, "train/loss_video": loss, "train/expert": "high"})
        for step, loss in enumerate(losses)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (axes,) = draw(read_curves(run), "run").axes
    faint, smoothed = [line.get_ydata() for line in axes.lines]
    assert list(faint) == losses
    assert smoothed[-1] == pytest.approx(2.0)  # the mean of 1, 1, 1, 5: the window reaches 3 points back
