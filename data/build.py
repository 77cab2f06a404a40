"""Builds the index of a dataset from its shards: the program behind `python -m data.index dir=DIR`."""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from data.clip import encode_json
from data.errors import DataError
from data.index import EMPTY_TEXT, FORMAT, PLAIN_NAME, DatasetIndex
from data.scan import Members, bucket_of, read_members, scores_of
from data.tensors import load_tensors


@dataclass
class IndexConfig:
    """`dir`: folder of finished shards."""

    dir: str = "???"


def write_index(root: Path) -> None:
    """Scan the shards in `root` and write `root/index` (atomically, replacing an old one).

    DataError when there are no shards, a tar doesn't parse or holds anything unsafe (see data.scan), the columns of
    text don't hold the same keys in the same order, a shard mixes buckets, or a key occurs twice.
    """
    numbers = sorted(path.name[3:-4] for path in root.glob("av-*.tar") if path.name[3:-4].isdigit())
    if not numbers:
        raise DataError(f"{root} holds no shards (av-000000.tar, ...); make them with `python -m data.prepare`")
    first = numbers[0]
    captioners = sorted(path.name[5 : -5 - len(first)] for path in root.glob(f"text-*-{first}.tar"))
    empty = root / EMPTY_TEXT
    if not empty.is_file():
        raise DataError(f"{empty} is missing; prepare the dataset again")
    try:
        text_dim = load_tensors(empty.read_bytes())["text"].shape[-1]
    except (ValueError, KeyError) as error:
        raise DataError(f"{empty} holds no text ({error}); prepare the dataset again") from error
    parts: list[dict[str, np.ndarray]] = []
    buckets: list[dict[str, Any]] = []
    encoders: dict[str, str] = {}
    shards: list[dict[str, Any]] = []
    for number, name in enumerate(numbers):
        av = root / f"av-{name}.tar"
        members = read_members(av)
        bucket = bucket_of(av, members.jsons)
        if bucket not in buckets:
            buckets.append(bucket)
        _same_encoders(av, members.jsons, encoders)
        columns = {
            "key": np.array([key.encode() for key in members.keys], "S24"),
            "shard": np.full(len(members.keys), number, np.uint32),
            **_places("av", members, "safetensors"),
            **_places("json", members, "json"),
            **_scores(av, members.jsons),
        }
        texts = {captioner: f"text-{captioner}-{name}.tar" for captioner in captioners}
        for captioner, file in texts.items():
            captions = read_members(root / file)
            if captions.keys != members.keys:
                raise DataError(f"{root / file} does not hold the keys of {av} in the same order; caption it again")
            columns |= _places(f"text-{captioner}", captions, "safetensors")
        parts.append(columns)
        shards.append(
            {
                "name": av.name,
                "samples": len(members.keys),
                "bucket": buckets.index(bucket),
                "bytes": av.stat().st_size,
                "sha256": sha256(av),
                "text": texts,
                "text_bytes": {captioner: (root / text).stat().st_size for captioner, text in texts.items()},
                "text_sha256": {captioner: sha256(root / text) for captioner, text in texts.items()},
            }
        )
    columns = _join(parts)
    _refuse_twice(root, columns["key"])
    empty_record = {"bytes": empty.stat().st_size, "sha256": sha256(empty)}
    hashes = [[shard["sha256"], sorted(shard["text_sha256"].items())] for shard in shards] + [empty_record["sha256"]]
    record = {
        "format": FORMAT,
        "samples": len(columns["key"]),
        "buckets": buckets,
        "captioners": captioners,
        "text_dim": text_dim,
        "encoders": encoders,
        "empty_text": empty_record,
        "shards": shards,
        "columns": sorted(columns),
        "fingerprint": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
    }
    _write(root, columns, record)


def _places(column: str, members: Members, kind: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {
        f"{column}_offset": np.array(members.offsets[kind], np.uint64),
        f"{column}_size": np.array(members.sizes[kind], np.uint64),
        f"{column}_crc": np.array(members.crcs[kind], np.uint32),
    }
    if kind == "safetensors":
        found[f"{column}_finite"] = np.array(members.finite, np.uint8)
    return found


def _scores(path: Path, metas: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    found = scores_of(metas)
    for name in found:
        if not PLAIN_NAME.fullmatch(name):
            raise DataError(f"{path} has a score named {name!r}: use letters, digits and . _ + = -")
    return {f"score-{name}": values for name, values in found.items()}


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of all shards; a shard without a score has NaN there."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    missing = [np.full(len(part["key"]), np.nan, np.float32) for part in parts]
    return {name: np.concatenate([part.get(name, nan) for part, nan in zip(parts, missing)]) for name in names}


def _same_encoders(path: Path, metas: list[dict[str, Any]], encoders: dict[str, str]) -> None:
    for meta in metas:
        for kind, fingerprint in meta.get("encoders", {}).items():
            if encoders.setdefault(kind, fingerprint) != fingerprint:
                raise DataError(
                    f"{path} has {kind} encoder {fingerprint}, others {encoders[kind]}; prepare it again with one"
                )


def _refuse_twice(root: Path, keys: np.ndarray) -> None:
    if len(np.unique(keys)) != len(keys):
        twice = sorted(key.decode() for key, count in Counter(keys.tolist()).items() if count > 1)[:3]
        raise DataError(f"{root}: keys occur more than once: {', '.join(twice)}; prepare the dataset again")


def _write(root: Path, columns: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    final, temporary = root / "index", root / "index.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, values in columns.items():
        with open(temporary / f"{name}.npy", "wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    record["column_sha256"] = {name: sha256(temporary / f"{name}.npy") for name in columns}
    with open(temporary / "dataset.json", "wb") as file:
        file.write(encode_json(record))
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)  # a kill between here and the rename loses an index that the tars give back
    os.rename(temporary, final)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="index_schema", node=IndexConfig)
    _run()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="index")
def _run(cfg: DictConfig) -> None:
    try:
        root = Path(OmegaConf.to_object(cfg).dir)  # type: ignore[union-attr]
        write_index(root)
        index = DatasetIndex.open(root)
        scores = f", scores {', '.join(index.scores)}" if index.scores else ""
        print(f"{root}: {len(index)} samples in {len(index.shards)} shards{scores}; fingerprint {index.fingerprint}")
    except MissingMandatoryValue:
        print("error: dir is not given: python -m data.index dir=DIR", file=sys.stderr)
        sys.exit(1)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
