"""What a dataset holds, and whether its bytes are those that were written.

    python -m data.inspect DIR                  # buckets, hours, captioners, scores; every shard's size and members
    python -m data.inspect DIR verify=true      # the SHA-256 of every file too
    python -m data.inspect https://host/dir     # a remote dataset, see data.places

Exits with 1 and one line for every difference from what the index recorded.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from data.errors import DataError
from data.index import DatasetIndex
from data.places import CACHE_BYTES
from data.scan import scan


@dataclass
class InspectConfig:
    """`dir`: folder, address or command (see data.places); `verify`: read every file and compare its SHA-256.

    `members`: look at the names of all members of local shards; `samples`: how many to list; `cache`, `cache_bytes`:
    for what comes from elsewhere.
    """

    dir: str = "???"
    verify: bool = False
    members: bool = True
    samples: int = 3
    cache: str | None = None
    cache_bytes: int = CACHE_BYTES


def describe(index: DatasetIndex, samples: int) -> list[str]:
    """Lines that say what a dataset holds."""
    total = sum(size for _, size, _ in index.recorded_files())
    lines = [
        f"dataset      {index.place}",
        f"samples      {len(index)} in {len(index.shards)} shards, {total / 1e9:.3f} GB",
        f"fingerprint  {index.fingerprint}",
        f"captioners   {', '.join(index.captioners) or 'none'}; embeddings of width {index.text_dim}",
        *(f"encoder      {kind}: {fingerprint}" for kind, fingerprint in sorted(index.encoders.items())),
    ]
    counts, hours = np.diff(index.shard_start), 0.0
    for number, bucket in enumerate(index.buckets):
        shards = np.flatnonzero(index.shard_bucket == number)
        if len(shards) == 0:
            continue
        meta = index.read_meta(int(index.shard_start[shards[0]]))
        seconds = float(meta.get("seconds") or (4 * (bucket.frames - 1) + 1) / bucket.fps)  # one geometry, one length
        here = int(counts[shards].sum())
        hours += here * seconds / 3600
        lines.append(
            f"bucket {number}     {bucket}: {here} samples in {len(shards)} shards, {here * seconds / 3600:.4f} h "
            f"({seconds:.3f} s each)"
        )
    lines.append(f"hours        {hours:.4f}")
    for name in index.scores:
        values = index.score(name)
        found = values[~np.isnan(values)]
        spread = f"{found.min():.4g} .. {np.median(found):.4g} .. {found.max():.4g}" if len(found) else "none"
        lines.append(f"score        {name}: {spread} (least, median, largest); {len(values) - len(found)} not measured")
    for row in range(min(samples, len(index))):
        meta = {name: value for name, value in index.read_meta(row).items() if isinstance(value, (str, int, float))}
        lines.append(f"sample       {index.key(row)}: {json.dumps(meta, ensure_ascii=False)[:160]}")
    return lines


def member_differences(index: DatasetIndex) -> list[str]:
    """One message for every local shard that is not readable, holds anything unsafe, or other members than recorded."""
    messages = []
    root = Path(index.root)
    for number, shard in enumerate(index.shards):
        rows = range(int(index.shard_start[number]), int(index.shard_start[number + 1]))
        columns = {"av": shard["name"], **{f"text-{name}": file for name, file in shard["text"].items()}}
        for column, file in columns.items():
            try:
                found = scan(root / file)
            except DataError as error:
                messages.append(f"{file}: {error}")
                continue
            recorded = [
                (
                    index.key(row),
                    (int(index.columns[f"{column}_offset"][row]), int(index.columns[f"{column}_size"][row])),
                )
                for row in rows
            ]
            if [(key, kinds["safetensors"]) for key, kinds in found.items()] != recorded:
                messages.append(f"{file}: its members are not those of the index, which was built from another file")
    return messages


def inspect(config: InspectConfig) -> list[str]:
    """Print what is there; returns a message for every difference."""
    index = DatasetIndex.open(
        config.dir, cache=config.cache, cache_bytes=config.cache_bytes, check_files=False
    )  # all differences are wanted, not the first one
    messages = [] if index.place.remote else index.size_differences()
    if config.verify:
        messages += index.verify()
    if config.members and not index.place.remote:
        messages += member_differences(index)
    try:
        print("\n".join(describe(index, config.samples)))
    except DataError as error:
        messages.append(str(error))
    return list(dict.fromkeys(messages))


def positional(arguments: list[str]) -> list[str]:
    """`DIR` alone means `dir=DIR`, quoted for Hydra."""
    if arguments and (arguments[0].startswith("pipe:") or ("=" not in arguments[0] and arguments[0][:1] != "-")):
        escaped = arguments[0].replace("'", "\\'")
        return [f"dir='{escaped}'", *arguments[1:]]
    return arguments


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="inspect_schema", node=InspectConfig)
    sys.argv[1:] = positional(sys.argv[1:])
    _run()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="inspect")
def _run(cfg: DictConfig) -> None:
    try:
        messages = inspect(OmegaConf.to_object(cfg))  # type: ignore[arg-type]
    except MissingMandatoryValue:
        print("error: no dataset is given: python -m data.inspect DIR", file=sys.stderr)
        sys.exit(1)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for message in messages:
        print(f"difference: {message}", file=sys.stderr)
    if messages:
        print(f"error: {len(messages)} differences; restore these files or prepare the dataset again", file=sys.stderr)
        sys.exit(1)
    print("no differences found" + ("" if cfg.verify else " (sizes and members; verify=true reads every byte)"))


if __name__ == "__main__":
    main()
