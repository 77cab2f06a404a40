"""Runs that are killed again and again, and what is left of them. `make chaos` runs the long form:

    python -m tests.train.chaos FOLDER [KILLS [REPORT.md]]
    python -m tests.train.chaos FOLDER travel           # kills with a change of ranks or engine

A run of `tiny` on two processes is killed with SIGKILL at points chosen by a seeded generator, one rank or both, and
started again until it has died KILLS times and is finished. The same command goes on where it was interrupted. Ranks
that die by the clock are processes started as a user starts them; the others are forked off this one, which has torch
imported already: importing takes ten times as long as what is tested. Run it with OMP_NUM_THREADS=1.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from data.clip import Bucket
from tests.shards import make_dataset
from tests.train import chaos_rank
from tools.bench.record import commit, hardware
from train.parallel.mesh import counted

REPOSITORY = Path(__file__).parents[2]
CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
MUTE = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=False)
SETTING = [
    "model=tiny", "model.text_length=4", "objective=phase2", "optim.warmup=5", "optim.eps=1e-6", "data.batch_size=4",
    "data.micro_batch=2", "data.shuffle_shards=2", "monitor.wandb=disabled", "validation.samples=2",
    "guard.timeout_minutes=1",
]  # fmt: skip
POINTS = {  # where a rank dies: in which room
    "step": "a step", "update": "a step", "updated": "a step", "sums": "a step", "data": "the data thread",
    "copy": "a save", "shards": "a save", "written": "a save", "described": "a save", "marker": "a save",
    "committed": "a save", "prune": "a save", "load": "start-up", "metrics cut": "start-up", "resumed": "start-up",
    "time": "anywhere",
}  # fmt: skip
FIRST_RANK_ONLY = ("described", "marker", "committed", "prune", "metrics cut", "resumed")
ONCE = ("described",)  # in a process: .metadata is made again only when the layout of the tensors changes
RETRY = 75


@dataclass
class Attempt:
    """One start of all ranks. `statuses`: how the ranks ended; `seconds`: from the start to the end of the last one."""

    statuses: list[int]
    seconds: float
    said: list[str] = field(default_factory=list)


def dataset(folder: Path) -> Path:
    """A small dataset for `tiny`, made once."""
    if not (folder / "data" / "index" / "dataset.json").exists():
        make_dataset(folder / "data", [(CLIP, 9), (MUTE, 5), (CLIP, 8)], dim=256)
    return folder / "data"


def start(
    folder: Path,
    run: str,
    world: int,
    *overrides: str,
    die: dict[int, str] | None = None,
    forked: bool = True,
    seconds: float = 1800,
) -> Attempt:
    """Start all ranks of a run and wait for their end; `die`: {rank: point}; `forked`: off this process; `seconds`:
    after which what still runs is killed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        sys.executable, "-m", "tests.train.chaos_rank", *SETTING, f"run.root={folder}", f"run.id={run}",
        f"data.path={folder / 'data'}", f"data.valid_path={folder / 'data'}", *overrides,
    ]  # fmt: skip
    ranks, words, begin = [], [], time.monotonic()
    forked = forked and not any(point.startswith("time:") for point in (die or {}).values())
    for rank in range(world):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
            "CHAOS": (die or {}).get(rank, ""), "CHAOS_LOG": str(folder / f"{run}-{world}-{rank}.consumed"),
        }  # fmt: skip
        said = folder / f"{run}-{rank}.out"
        fork = multiprocessing.get_context("fork").Process
        process = fork(target=_train if forked else _run, args=(command, environment, folder, said))
        process.start()
        ranks.append((process, said))
    for process, said in ranks:
        # Not join(timeout): of a child that has called exec it waits for ever.
        while process.exitcode is None and time.monotonic() < begin + seconds:
            time.sleep(0.02)
        process.kill()
        process.join()
        words.append(said.read_text())
    return Attempt([process.exitcode or 0 for process, _ in ranks], time.monotonic() - begin, words)


def _enter(environment: dict[str, str], folder: Path, said: Path) -> None:
    """In the child."""
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _run(command: list[str], environment: dict[str, str], folder: Path, said: Path) -> None:
    _enter(environment, folder, said)
    os.execv(command[0], command)


def _train(command: list[str], environment: dict[str, str], folder: Path, said: Path) -> None:
    _enter(environment, folder, said)
    sys.argv = ["train", *command[3:]]
    chaos_rank.main()


def curve(folder: Path, run: str) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def final_tensors(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    path = folder / run / "checkpoints" / f"step-{step:08d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def consumed(folder: Path, run: str) -> dict[int, list[int]]:
    """Sample numbers that each step's last attempt took, over all ranks."""
    attempts: dict[int, dict[str, dict[str, list[int]]]] = {}
    for path in folder.glob(f"{run}-*-*.consumed"):
        _, world, rank = path.stem.rsplit("-", 2)
        for line in path.read_text().splitlines():
            step, numbers = json.loads(line)
            attempts.setdefault(step, {}).setdefault(world, {})[rank] = numbers
    return {
        step: sorted({number for ranks in worlds.values() for numbers in ranks.values() for number in numbers})
        for step, worlds in attempts.items()
    }


def choose(rng: random.Random, kill: int, steps_left: int, kills_left: int) -> tuple[str, dict[int, str]]:
    """(point, {rank: point and count}). Each point in turn, since some are rarely met by chance."""
    point = list(POINTS)[kill % len(POINTS)]
    gain = max(2, round(1.6 * steps_left / max(1, kills_left)))  # steps that this attempt may make
    if point == "time":
        count: float = round(rng.uniform(0.2, 25.0), 2)
    elif POINTS[point] == "start-up" or point in ONCE:
        count = 1
    elif POINTS[point] == "a save":
        count = rng.randint(1, max(1, gain // 5))
    else:
        count = rng.randint(1, gain) * (2 if point == "data" else 1)
    victims = [[0], [1], [0, 1]][rng.randrange(3)]
    if point in FIRST_RANK_ONLY:
        victims = [0]
    return point, {rank: f"{point}:{count}" for rank in victims}


def torment(folder: Path, run: str, steps: int, kills: int, seed: int = 0) -> list[dict]:
    """Start a run until it has died `kills` times and is finished; returns a record of each death. Goes on where an
    earlier call was interrupted."""
    book = folder / f"{run}.kills.jsonl"
    deaths = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    while len(deaths) < kills:
        done = max((line["step"] + 1 for line in curve(folder, run) if "train/loss" in line), default=0) if (
            (folder / run / "metrics.jsonl").exists()) else 0  # fmt: skip
        rng = random.Random(seed * 1000 + len(deaths))
        point, victims = choose(rng, len(deaths), steps - 10 - done, kills - len(deaths))
        attempt = start(folder, run, 2, f"steps={steps}", *SAVES, die=victims)
        if all(status == 0 for status in attempt.statuses):
            if done >= steps - 20:
                raise AssertionError(f"the run was finished after {len(deaths)} of {kills} deaths: give it more steps")
            raise AssertionError(f"{victims} killed nobody: {attempt}")
        survivors = [status for status in attempt.statuses if status != -9]
        assert all(status == RETRY for status in survivors), (point, attempt)
        deaths.append({
            "point": point, "room": POINTS[point], "victims": victims, "statuses": attempt.statuses, "from": done,
            "seconds": round(attempt.seconds, 1),
        })  # fmt: skip
        with open(book, "a") as file:
            file.write(json.dumps(deaths[-1]) + "\n")
    last = start(folder, run, 2, f"steps={steps}", *SAVES)
    assert last.statuses == [0, 0], last
    return deaths


SAVES = ["checkpoint.every=5", "checkpoint.minutes=0", "checkpoint.permanent_every=0", "validation.every=50"]


def compare(folder: Path, steps: int) -> None:
    """Everything of the killed run is that of the unbroken one. AssertionError with the first difference."""
    whole, broken = curve(folder, "whole"), curve(folder, "killed")
    for expected, found in zip(whole, broken, strict=True):
        assert expected == found, f"unbroken: {expected}\nkilled:   {found}"
    assert [line["step"] for line in broken if "train/loss" in line] == list(range(steps))
    assert consumed(folder, "killed") == consumed(folder, "whole")
    numbers = [number for step in range(steps) for number in consumed(folder, "killed")[step]]
    assert numbers == list(range(4 * steps)), "samples were lost or repeated"
    expected, found = (final_tensors(folder, run, steps) for run in ("whole", "killed"))
    assert expected.keys() == found.keys() and len(expected) > 100
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def main(folder: Path, kills: int = 54, report: Path | None = None) -> None:
    """The long form."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset(folder)
    import train.__main__
    import train.loop  # noqa: F401  both before the first fork

    steps = max(40, 4 * kills)
    if not (folder / "whole" / "status.json").exists():
        assert start(folder, "whole", 2, f"steps={steps}", *SAVES).statuses == [0, 0]
    deaths = torment(folder, "killed", steps, kills)
    compare(folder, steps)
    rooms = {room: [death for death in deaths if death["room"] == room] for room in dict.fromkeys(POINTS.values())}
    lines = [
        f"A run of `tiny` on two processes, {steps} steps, a checkpoint every 5, killed {len(deaths)} times and "
        "started again. All losses, gradient norms, validation losses, the samples of every step and all "
        f"{len(final_tensors(folder, 'killed', steps))} tensors of the last checkpoint equal the unbroken run's, bit "
        "for bit; metrics.jsonl has each step once. Every surviving rank ended with status 75.",
        "", "| killed in | times | one rank | both ranks | points |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for room, entries in rooms.items():
        both = sum(len(death["victims"]) == 2 for death in entries)
        points = ", ".join(dict.fromkeys(death["point"] for death in entries))
        lines.append(f"| {room} | {len(entries)} | {len(entries) - both} | {both} | {points} |")
    print("\n".join(lines))
    if report is not None:
        head = ["# Chaos", "", "- command: `make chaos`", f"- hardware: {hardware()}; GPU: not measured"]
        head += [f"- commit: {commit()}, torch {torch.__version__}", f"- date: {time.strftime('%Y-%m-%d')}", ""]
        report.write_text("\n".join([*head, *lines, "", NOTES, ""]))


NOTES = (
    "Ranks die at points that are armed from outside, at random counts, one rank or both; those that die by the clock "
    "are processes of their own, the others are forked off one that has torch imported (tests/train/chaos.py)."
)


JOURNEYS = {  # (ranks, overrides) of each attempt; all but the last one are killed
    "ranks": [(2, []), (1, []), (4, ["parallel.ulysses=2", "data.micro_batch=1"]), (2, [])],
    "engines": [(2, []), (2, ["parallel=zero2"]), (2, [])],
}


def travel(folder: Path, steps: int = 24) -> None:
    """Runs that go on at other numbers of ranks, with sequence parallelism, and under another engine, after a kill each
    time: the samples of each step are the unbroken run's, its losses to 1e-5. AssertionError otherwise."""
    import train.__main__
    import train.loop  # noqa: F401  both before the first fork

    folder.mkdir(parents=True, exist_ok=True)
    dataset(folder)
    often = [*SAVES, "checkpoint.every=3", f"steps={steps}"]
    assert start(folder, "unbroken", 2, *often).statuses == [0, 0]
    whole = curve(folder, "unbroken")
    for run, attempts in JOURNEYS.items():
        for number, (world, overrides) in enumerate(attempts):
            last = number == len(attempts) - 1
            attempt = start(folder, run, world, *often, *overrides, die=None if last else {world - 1: "step:8"})
            killed = [0] * world if last else [RETRY] * (world - 1) + [-9]
            assert attempt.statuses == killed, (run, number, attempt)
            assert number == 0 or "resumed from" in attempt.said[0], (run, number, attempt.said[0])
            assert f": {counted(world, 'rank')} on cpu" in attempt.said[0], (run, number, attempt.said[0])
            assert ("zero2" if "parallel=zero2" in overrides else "fsdp2") in attempt.said[0]
        assert consumed(folder, run) == consumed(folder, "unbroken"), run
        worst = 0.0
        for expected, found in zip(whole, curve(folder, run), strict=True):
            assert expected["step"] == found["step"]
            for key in expected.keys() & {
                "train/loss",
                "train/loss_video",
                "train/loss_audio",
                "valid/loss",
                "valid/video",
                "valid/audio",
            }:
                if expected[key] is None or found[key] is None:
                    assert expected[key] is found[key]
                else:
                    worst = max(worst, abs(found[key] / expected[key] - 1))
        assert worst <= 1e-5, (run, worst)
        print(f"{run}: {len(attempts) - 1} kills, {steps} steps, losses within {worst:.1e}")


if __name__ == "__main__":
    if sys.argv[2:3] == ["travel"]:
        travel(Path(sys.argv[1]).resolve())
        sys.exit()
    main(Path(sys.argv[1]).resolve(), *[int(n) for n in sys.argv[2:3]], *[Path(path) for path in sys.argv[3:4]])
