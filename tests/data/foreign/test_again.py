"""An import that is interrupted and run again, and one that cannot begin."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import data.foreign.unit
import data.import_latents
from data.errors import DataError
from data.foreign.latents import Encoders, Layouts
from data.import_latents import import_latents
from tests.data.foreign.latents import (
    T,
    equal,
    latents,
    members_of,
    put,
    sample,
    settings,
    stored,
    write_tar,
)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "import.json"
    }


def test_a_killed_import_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for seed in range(11):
        put(source, f"{seed:02d}", sample(seed % 9, frames=T if seed % 9 % 2 else T - 1), f"clip {seed}")
        if seed % 9 % 2 == 0:
            (source / f"{seed:02d}.json").write_text(json.dumps({"fps": 13.0}))
    monkeypatch.setattr(data.import_latents, "FILES_A_UNIT", 3)
    unbroken = import_latents(settings(source, tmp_path / "whole", samples_per_shard=2))
    expected = tree(tmp_path / "whole")
    assert unbroken["summary"]["stored"] == 9 and unbroken["summary"]["rejected"]
    original, count = data.foreign.unit.ImportUnit._judge, 0

    def watched(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count in kills:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(data.foreign.unit.ImportUnit, "_judge", watched)
    config = settings(source, tmp_path / "out", samples_per_shard=2)
    kills = {1, 6, 12}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            import_latents(config)
    assert not (tmp_path / "out").exists()
    kills, before = set(), count
    again = import_latents(config)
    assert count - before == 11 - 6, "units that were done are not done again"
    assert tree(tmp_path / "out") == expected
    assert again["summary"] == unbroken["summary"]
    capsys.readouterr()
    assert import_latents(config) == again and "nothing to do" in capsys.readouterr().out
    put(source, "05", sample(50), "changed")
    with pytest.raises(DataError, match="the source files differ"):
        import_latents(config)
    with pytest.raises(DataError, match=r"samples_per_shard: 2, now 4"):
        import_latents(settings(source, tmp_path / "out", samples_per_shard=4))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_files_that_changed_between_two_attempts_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first unit with another file on; what was there before leaves nothing behind."""
    source = tmp_path / "in"
    for seed in range(8):
        put(source, f"{seed}", sample(seed))
    monkeypatch.setattr(data.import_latents, "FILES_A_UNIT", 2)
    config = settings(source, tmp_path / "out", samples_per_shard=1)
    with monkeypatch.context() as patch:
        patch.setattr(data.import_latents, "write_empty_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_latents(config)
    put(source, "3", sample(30))
    for name in ("6", "7"):
        (source / f"{name}.safetensors").unlink()
    import_latents(config)
    found = stored(tmp_path / "out")
    assert set(found) == {f"{name}.safetensors" for name in range(6)}
    equal(found["3.safetensors"][0], sample(30))
    import_latents(settings(source, tmp_path / "fresh", samples_per_shard=1))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"encoders": Encoders()}, "no encoder is named"),
        ({"encoders": Encoders(video="wan")}, "holds audio, but encoders.audio is not given"),
        ({"encoders": Encoders(video="a", audio="b", text="c")}, "encoders.text needs empty_text"),
        ({"empty_text": "{folder}/absent"}, "absent is not a .safetensors"),
        ({"empty_text": "{folder}/empty.safetensors"}, "encoders.text isn't"),
        ({"layouts": Layouts(video="CTHX")}, "layouts.video=CTHX must have the letters of CTHW"),
        ({"fps": 0.0}, "fps=0.0 must be above 0"),
        ({"audio_rate": -1.0}, "audio_rate=-1.0"),
        ({"text_dim": 7}, "text_dim=7"),
        ({"captioner": "a/b"}, "captioner=a/b"),
        ({"samples_per_shard": 0, "shard_mb": 0}, "needs shard_mb"),
        ({"members": {"video": "npy"}}, "members is for tars"),
        ({"source": "{folder}/absent"}, "does not exist"),
        ({"source": "{folder}/nothing"}, "holds neither"),
        ({"source": "{folder}/both"}, "holds tars and .safetensors"),
        ({"source": "{folder}/tars"}, "say which members"),
        ({"source": "{folder}/tars", "members": {"video": "latent.pth"}}, "may hold pickled objects"),
        ({"source": "{folder}/tars", "members": {"video": "mp4"}}, "is not read"),
        ({"source": "{folder}/tars", "members": {"video": "npy", "picture": "jpg"}}, "members.picture is none of"),
        ({"output": "{folder}/both"}, "is not a dataset of data.import_latents"),
    ],
)
def test_settings_that_cannot_be_met(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    put(tmp_path / "in", "a", sample(1))
    put(tmp_path / "both", "a", sample(1))
    write_tar(tmp_path / "both" / "a.tar", members_of("0", 1))
    write_tar(tmp_path / "tars" / "a.tar", members_of("0", 1))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.mp4").write_text("x")
    save_file({"text": latents(1, 2, 12)}, tmp_path / "empty.safetensors")
    changes = {
        name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(DataError, match=message):
        import_latents(settings(**{"source": tmp_path / "in", "output": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()
