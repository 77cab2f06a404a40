"""Latents of others in tars: each sample gets one verdict, and nothing is unpickled."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from data.import_latents import import_latents
from tests.data.foreign.latents import (
    LA,
    MEMBERS,
    equal,
    latents,
    members_of,
    npy,
    sample,
    settings,
    stored,
    verdicts,
    write_tar,
)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_foreign_tars(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    link = tarfile.TarInfo("link.latent.safetensors")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    outside = members_of("../../outside", 7)
    write_tar(source / "a.tar", [*members_of("x/00", 1, "\ufeffcafé"), *members_of("x/01", 2), *outside])
    write_tar(source / "b.tar.gz", members_of("00", 3), "w:gz")
    write_tar(
        source / "c.tar",
        [
            ("link.latent.safetensors", link),
            ("pickled.latent.safetensors", pickle.dumps(Bomb(tmp_path / "mark"))),
            ("objects.first.npy", npy_objects(Bomb(tmp_path / "mark"))),
            ("alone.txt", b"a caption"),
            ("two.sound.npy", npy(latents(1, LA, 128, dtype=torch.float32))),
            ("two.sound.npy", npy(latents(1, LA, 128, dtype=torch.float32))),
            ("whole.sound.npy", npy(torch.zeros(LA, 128, dtype=torch.int64))),
            ("latin.sound.npy", npy(latents(31, LA, 128, dtype=torch.float32))),
            ("latin.txt", b"caf\xe9"),
            ("json.sound.npy", npy(latents(32, LA, 128, dtype=torch.float32))),
            ("json.json", b"{"),
            ("large.sound.npy", npy(latents(33, 9000, 128, dtype=torch.float32))),
            ("sound.sound.npy", npy(latents(34, LA, 128, dtype=torch.float32))),
            *members_of("copy", 1),
        ],
    )
    write_tar(source / "d.tar", [*members_of("00", 4), *members_of("01", 5), *members_of("02", 6)])
    whole = (source / "d.tar").read_bytes()
    (source / "d.tar").write_bytes(whole[: len(whole) // 2])
    (source / "e.tar").write_bytes(b"")
    (source / "f.tar").write_bytes(b"no tar at all" * 100)
    write_tar(source / "g.tar", [])
    (source / "sizes.json").write_text("{}")
    (source / "notes.md").write_text("words")
    record = import_latents(settings(source, output, members=MEMBERS, fps=None, sample_mb=1))
    found = stored(output)
    assert set(found) == {"a.tar/x/00", "a.tar/x/01", "a.tar/../../outside", "b.tar.gz/00", "c.tar/sound", "d.tar/00"}
    for name, seed in (("a.tar/x/00", 1), ("a.tar/x/01", 2), ("b.tar.gz/00", 3), ("d.tar/00", 4)):
        equal(found[name][0], sample(seed, dtype=torch.float32))
    assert found["a.tar/x/00"][1] == "café" and found["c.tar/sound"][1] == ""
    reasons = verdicts(output)
    expected = {
        "c.tar/link": "is a link",
        "c.tar/pickled": "is not a valid .safetensors",
        "c.tar/objects": "no array",
        "c.tar/alone": "has no latents; it has the members txt",
        "c.tar/two": "two members .sound.npy",
        "c.tar/whole": "holds int64",
        "c.tar/latin": "not UTF-8",
        "c.tar/json": "does not parse",
        "c.tar/large": "a sample may have",
        "c.tar/copy": "same content as a.tar/x/00",
        "d.tar/01": "its tar can't be read to its end",
        "d.tar": "can't be read to its end",
        "e.tar": "can't be read to its end",
        "f.tar": "can't be read to its end",
        "g.tar": "holds no members",
        "notes.md": "is not a tar",
    }
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items()), reasons
    assert not (tmp_path / "mark").exists()
    assert record["summary"]["inputs"] == len(found) + len(expected)


def npy_objects(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_one_member_may_hold_several_tensors(tmp_path: Path) -> None:
    tensors = sample(1)
    write_tar(tmp_path / "a.tar", [("k.safetensors", save(tensors)), ("k.json", b'{"caption": "of the json"}')])
    members = {"video": "safetensors", "condition": ".safetensors", "audio": "SAFETENSORS", "meta": "json"}
    import_latents(settings(tmp_path / "a.tar", tmp_path / "out", members=members))
    clip, caption, _ = stored(tmp_path / "out")["a.tar/k"]
    equal(clip, tensors)
    assert caption == "of the json"
