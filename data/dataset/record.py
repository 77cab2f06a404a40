"""dataset.json, the head of an index: what it must hold, its own check, and the fingerprints of a dataset.

The last field of the file is `sha256`, the digest of the file as it is without that field. docs/shard-format.md lists
the others.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.clip import encode_json
from data.dataset.checksum import FORMAT, KINDS
from data.errors import DataError

DATASET = "dataset.json"
CAPTIONERS = "captioners.json"  # beside the shards: whose captions belong to the dataset itself, and whose were added
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")  # of files: part of paths, addresses and commands
SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"}\Z')


def seal(record: dict[str, Any]) -> bytes:
    """The bytes of dataset.json: the fields in the order of their names, and last the digest of these."""
    content = encode_json(record)
    return content[:-1] + f', "sha256": "{hashlib.sha256(content).hexdigest()}"}}'.encode()


def unseal(content: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The fields of a dataset.json. `where`: the dataset, and what helps if it is not usable, for messages.

    ValueError (KeyError, TypeError) when it is none. DataError when it has a format that is not known, when its bytes
    are not those that were written, or when its fingerprint is not that of its shards' hashes.
    """
    record = json.loads(content)
    if record["format"] not in KINDS:
        known = " and ".join(map(str, KINDS))
        raise DataError(f"the index of {where} has format {record['format']}, known are {known}; {remedy}")
    check_names(record)
    if record["format"] >= FORMAT:
        found = SEAL.search(content)
        if found is None or hashlib.sha256(content[: found.start()] + b"}").hexdigest() != found[1].decode():
            raise DataError(
                f"index/{DATASET} of {where} is damaged: its bytes are not those that were written; {remedy}"
            )
    if record["fingerprint"] != (expected := fingerprint(record)):
        raise DataError(
            f"index/{DATASET} of {where} states the fingerprint {record['fingerprint']}, its shards' hashes give "
            f"{expected}; {remedy}"
        )
    result: dict[str, Any] = record
    return result


def rebuild(root: Path | str) -> str:
    """What helps where the index of a local dataset is not usable."""
    return f"rebuild it: mova index dir={root}"


def check_names(record: dict[str, Any]) -> None:
    """ValueError when a file name in an index could lead out of its folder or be taken for an option."""
    names = [*record["columns"], *record["captioners"]]
    for shard in record["shards"]:
        names += [shard["name"], *shard["text"].values()]
    for name in names:
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no plain file name")


def own_captioners(record: dict[str, Any]) -> list[str]:
    """The captioners whose captions belong to the dataset itself; those that were added later come after them."""
    return list(record.get("own_captioners", record["captioners"]))


def fingerprint(record: dict[str, Any]) -> str:
    """Hash over the hashes of all av shards, of the dataset's own captions and of the empty prompt.

    Captions that are added later do not change it: the order of the samples and running runs hang on it.
    """
    own = sorted(own_captioners(record))
    hashes: list[Any] = [
        [shard["sha256"], [[name, shard["text_sha256"][name]] for name in own]] for shard in record["shards"]
    ]
    return hashlib.sha256(json.dumps([*hashes, record["empty_text"]["sha256"]]).encode()).hexdigest()


def text_fingerprint(record: dict[str, Any], captioner: str) -> str:
    """Hash over the hashes of one captioner's shards."""
    return hashlib.sha256(
        json.dumps([shard["text_sha256"][captioner] for shard in record["shards"]]).encode()
    ).hexdigest()


def read_captioners(root: Path) -> tuple[list[str], list[str]] | None:
    """Own and added captioners as root/captioners.json states them, None where there is no such file."""
    path = root / CAPTIONERS
    try:
        content = json.loads(path.read_bytes())
        own, added = list(content["own"]), list(content["added"])
        if not all(PLAIN_NAME.fullmatch(name) for name in own + added):
            raise ValueError(f"{own + added} are no plain names")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is unreadable ({error}); it must hold two lists of names, own and added") from error
    return own, added


def encode_captioners(own: Sequence[str], added: Sequence[str]) -> bytes:
    """The bytes of captioners.json."""
    return encode_json({"own": list(own), "added": list(added)})


INDEX = "index"  # folder of the index


EMPTY_TEXT = "empty-text.safetensors"
