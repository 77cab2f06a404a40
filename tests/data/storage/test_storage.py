"""Datasets that lie elsewhere: whatever fails on the way, the samples are the same, and the cache keeps its bound."""

import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import data.storage.retry
from core.errors import NoRoomError, exit_status, lacks_room
from data.batch import Batch
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.errors import DamagedSample, DataError
from data.loader.state import DataState
from data.loader.stream import Stream
from data.storage.cache import Cache
from data.storage.remote import save
from data.storage.storage import FileSource, Folder, find_storage, is_remote
from tests.data.storage.flaky_server import FlakyServer
from tests.disks import disk
from tests.shards import make_dataset

BOTH = Bucket(frames=3, height=4, width=4, audio_steps=8, fps=24.0, has_video=True, has_audio=True)
SOUND = Bucket(frames=3, height=4, width=4, audio_steps=5, fps=24.0, has_video=False, has_audio=True)
SHARDS = [(BOTH, 8), (SOUND, 6), (BOTH, 9), (BOTH, 7), (SOUND, 8)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return DatasetIndex.open(make_dataset(tmp_path_factory.mktemp("places") / "set", SHARDS))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,) * 12)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


Slot = tuple[int, str, float, int]


def sums(batch: Batch) -> list[Slot]:
    tensors = (batch.video, batch.audio, batch.condition, batch.text)
    bits = [sum(int(t[i].contiguous().view(torch.int16).long().sum()) for t in tensors) for i in range(len(batch.keys))]
    return list(zip(batch.sample_numbers.tolist(), batch.keys, batch.weight.tolist(), bits, strict=True))


def run_rank(index: DatasetIndex, rank: int, world: int, steps: int) -> tuple[list[list[Slot]], DataState]:
    state = DataState.start(index.fingerprint, [8] * len(index.buckets), seed=3, window=2)
    stream: Stream[list[Slot]] = Stream(
        index, state, dp_rank=rank, dp_world=world, micro_batch=2, text_length=4, transform=sums
    )
    with stream:
        return [[slot for slots in next(stream) for slot in slots] for _ in range(steps)], state


def same_samples(mine: DatasetIndex, local: DatasetIndex) -> None:
    assert (mine.fingerprint, len(mine)) == (local.fingerprint, len(local))
    for row in range(len(local)):
        a, b = mine.read_clip(row), local.read_clip(row)
        for x, y in ((a.video, b.video), (a.audio, b.audio), (a.condition, b.condition)):
            assert (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y))
        assert a.meta == b.meta and torch.equal(mine.read_text(row, "plain"), local.read_text(row, "plain"))
    assert torch.equal(mine.empty_text(), local.empty_text())


@pytest.mark.parametrize("ranges", [True, False])
def test_four_ranks_stream_from_a_server_that_fails_at_random(
    local: DatasetIndex, tmp_path: Path, ranges: bool
) -> None:
    """Each failing way happens; every rank's samples are those of the local dataset, in order, none damaged."""
    steps = 10
    expected = [run_rank(local, rank, 4, steps)[0] for rank in range(4)]
    results: list[tuple[list[list[Slot]], DataState] | BaseException | None] = [None] * 4

    def work(rank: int, url: str) -> None:
        try:
            index = DatasetIndex.open(url, cache=tmp_path / "cache", timeout=0.25)
            results[rank] = run_rank(index, rank, 4, steps)
        except BaseException as error:
            results[rank] = error

    failure = 0.2 if ranges else 0.4  # whole files are few requests
    with FlakyServer(Path(local.root), failure=failure, ranges=ranges, stall=0.6, seed=1) as server:
        threads = [threading.Thread(target=work, args=(rank, server.url)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = server.counts
    for rank, result in enumerate(results):
        assert isinstance(result, tuple), result
        assert result[0] == expected[rank] and result[1].quarantine == []
    samples = [slot[0] for rank in expected for step in rank for slot in step]
    assert sorted(samples) == list(range(8 * steps))
    assert all(counts[kind] > 0 for kind in ("500", "reset", "stall", "cut")), counts
    if ranges:
        assert counts["206"] > 8 * steps
        assert not any(path.name.endswith(".tar") for path in (tmp_path / "cache" / "files").iterdir())
    else:  # four ranks share one copy of each file
        names = [name for name, *_ in local.recorded_files() if name.endswith(".tar")]
        assert len(list((tmp_path / "cache" / "files").iterdir())) == len(names)
        assert not counts["206"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_stays_broken_stops_the_run_without_damage(
    local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01, 0.01))
    with FlakyServer(Path(local.root), ranges=ranges, stall=1.0) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", timeout=0.5)
        assert server.counts["requests"] < 25
        server.failure = 1.0
        with pytest.raises(DataError, match="after 3 attempts") as caught:
            index.read_clip(0)
        assert not isinstance(caught.value, DamagedSample) and "av-000000.tar" in str(caught.value)
        server.failure = 0.0
        assert index.read_clip(0).key == local.key(0)
        server.gone.add("av-000002.tar")
        with pytest.raises(DataError, match="404"):
            index.read_clip(int(index.shard_start[2]))
    with pytest.raises(DataError, match="after 3 attempts"):
        index.read_clip(1 if ranges else int(index.shard_start[3]))


@pytest.mark.parametrize("ranges", [True, False])
def test_bytes_broken_on_the_way_are_fetched_again_but_broken_at_the_origin_are_damage(
    local: DatasetIndex, tmp_path: Path, ranges: bool
) -> None:
    with FlakyServer(Path(local.root), ranges=ranges) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", timeout=5)
        sound = index.shards[0]["name"]
        index.read_clip(8)
        server.garbled[sound] = 1
        for row in range(8):
            assert index.read_clip(row).key == local.key(row)
        assert server.garbled[sound] == 0
        broken = index.shards[2]["name"]
        server.garbled[broken] = 1000
        found = 0
        for row in range(int(index.shard_start[2]), int(index.shard_start[3])):
            try:
                index.read_clip(row)
            except DamagedSample as damage:
                found += 1
                assert damage.key == local.key(row) and "checksum" in damage.reason
        assert found == (9 if ranges else 1)
        assert any(broken in message for message in index.verify())


def test_remote_shard_of_another_size_is_refused(local: DatasetIndex, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", SHARDS)
    with FlakyServer(root) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", timeout=5)
        with open(root / "av-000000.tar", "ab") as file:
            file.write(b"\0" * 512)
        with pytest.raises(DataError, match="the index recorded"):
            index.read_clip(0)


@pytest.mark.parametrize("answer", ["whole", "wrong", "416"])
def test_a_server_that_stops_giving_ranges_in_mid_run_is_read_by_whole_files(
    local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """No attempt fails, the samples are the same, each file is fetched once, and no range is asked for any more."""
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", ())
    with FlakyServer(Path(local.root)) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", timeout=5)
        assert index.read_clip(0).key == local.key(0) and server.counts["206"] > 0
        server.ranges, server.range_answer = answer != "whole", answer
        begin = len(server.seen)
        same_samples(index, local)
        asked = ["range" in seen for seen in server.seen[begin:]]
        assert asked.count(True) == 1, "a range was asked for again"
        shards = [name for name, *_ in local.recorded_files() if name.endswith(".tar")]
        whole = [seen["path"] for seen in server.seen[begin:] if "range" not in seen and seen["path"].endswith(".tar")]
        assert sorted(whole) == sorted(f"/{name}" for name in shards)
        result = run_rank(index, 0, 2, 4)
        assert result[0] == run_rank(local, 0, 2, 4)[0] and result[1].quarantine == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_begins_to_drip_stops_the_run_in_time_without_damage(
    local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    """Every byte comes within 50 ms of the one before, so that no silence is ever seen."""
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,))
    with FlakyServer(Path(local.root), ranges=ranges) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", timeout=0.8)
        server.drip["late"] = 200.0
        begin = time.monotonic()
        with pytest.raises(DataError, match="after 2 attempts .*bytes came in") as caught:
            index.read_clip(0)
        assert not isinstance(caught.value, DamagedSample) and time.monotonic() - begin < 2 * 3 * 0.8 + 3
        server.drip.clear()
        assert index.read_clip(0).key == local.key(0)


def test_a_command_runs_without_a_shell(local: DatasetIndex, tmp_path: Path) -> None:
    """`$(...)`, `;` and spaces stay what they are."""
    folder = tmp_path / "a b; touch pwned $(touch pwned)"
    folder.symlink_to(local.root)
    index = DatasetIndex.open(f"pipe:cat '{folder}/{{name}}'", cache=tmp_path / "cache")
    same_samples(index, local)
    assert not list(tmp_path.glob("pwned")) and not Path("pwned").exists()
    assert index.verify() == []


def test_commands_that_fail_stall_or_lie(local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,))
    slowly = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo $i; sleep 0.2; done"
    script = tmp_path / "fetch"
    script.write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/fail ]; then echo no such bucket >&2; exit 3; fi\n"
        f"if [ -e {tmp_path}/stall ]; then head -c 2000 {local.root}/$1; sleep 30; fi\n"
        f"if [ -e {tmp_path}/drip ]; then {slowly}; fi\n"
        f"if [ -e {tmp_path}/short ]; then head -c 2000 {local.root}/$1; exit 0; fi\nexec cat {local.root}/$1\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    index = DatasetIndex.open(f"pipe:{script} {{name}}", cache=tmp_path / "cache", timeout=1.0)
    assert index.read_clip(0).key == local.key(0)
    for row, way, message in (
        (8, "fail", "no such bucket"),
        (14, "stall", "nothing came"),
        (23, "short", "2000 bytes"),
        (33, "drip", "bytes came in"),
    ):
        (tmp_path / way).touch()
        begin = time.monotonic()
        with pytest.raises(DataError, match=message) as caught:
            index.read_clip(row)
        assert not isinstance(caught.value, DamagedSample) and time.monotonic() - begin < 15
        (tmp_path / way).unlink()
        assert index.read_clip(row).key == local.key(row)
    assert not list((tmp_path / "cache" / "files").glob("*.part"))
    with pytest.raises(DataError, match="can't be run"):
        DatasetIndex.open("pipe:no-such-program-here {name}", cache=tmp_path / "other")
    with pytest.raises(DataError, match="{name}"):
        DatasetIndex.open("pipe:cat file", cache=tmp_path / "other")


def test_the_cache_keeps_its_bound_and_drops_what_was_used_longest_ago(local: DatasetIndex, tmp_path: Path) -> None:
    names = [shard["name"] for shard in local.shards] + [shard["text"]["plain"] for shard in local.shards]
    sizes = [(Path(local.root) / name).stat().st_size for name in names]
    limit = max(sizes) * 2 + min(sizes)
    files = tmp_path / "cache" / "files"
    with FlakyServer(Path(local.root), ranges=False) as server:
        index = DatasetIndex.open(server.url, cache=tmp_path / "cache", cache_bytes=limit, timeout=5)
        for row in range(len(local)):
            same = index.read_clip(row).video, local.read_clip(row).video
            assert same[0] is None or (same[1] is not None and torch.equal(same[0], same[1]))
            index.read_text(row, "plain")
            assert sum(path.stat().st_size for path in files.iterdir()) <= limit
        before = server.counts["whole"]
        index.read_clip(len(local) - 1)
        assert server.counts["whole"] == before  # used last: still here
        index.read_clip(0)
        assert server.counts["whole"] == before + 1
        small = DatasetIndex.open(server.url, cache=tmp_path / "small", cache_bytes=1000, timeout=5)
        with pytest.raises(DataError, match="raise cache_bytes"):
            small.read_clip(0)


def fill(name: str, size: int, log: Path, seconds: float) -> None:
    def write(target: int) -> None:
        with open(log, "a") as file:
            file.write(f"{name}\n")
        time.sleep(seconds)
        os.write(target, name[:1].encode() * size)

    cache = Cache(log.parent / "cache", 2500)
    for _ in range(3):
        with cache.file(name, size, write) as descriptor:
            content = bytearray(size)
            assert FileSource(descriptor).read_into(0, [memoryview(content)]) == size
            assert bytes(content) == name[:1].encode() * size
            time.sleep(seconds)


def test_processes_share_a_cache_and_files_in_use_stay(tmp_path: Path) -> None:
    """Four processes want two files each of 1,000 bytes out of 2,500: nobody reads wrong bytes or breaks the bound."""
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    jobs = [context.Process(target=fill, args=(name, 1000, log, 0.02)) for name in ("a1", "a1", "b1", "c1")]
    for job in jobs:
        job.start()
    most, watched = 0, Cache(tmp_path / "cache", 2500)
    while any(job.is_alive() for job in jobs):
        with watched.lock("room"), watched.lock("names"):  # nobody makes room, a file or a name meanwhile
            most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache" / "files").iterdir()))
        time.sleep(0.002)
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4 and 0 < most <= 2500
    cache = Cache(tmp_path / "held", 2500)
    with cache.file("x", 2000, lambda target: None):
        blocked = threading.Thread(target=lambda: cache.file("y", 2000, lambda target: None).__enter__())
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive() and (tmp_path / "held" / "files" / "x").exists()
    blocked.join(20)
    assert not blocked.is_alive() and not (tmp_path / "held" / "files" / "x").exists()


def test_a_file_that_gets_its_name_while_room_is_made_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made for a second file of 1,000 bytes out of 1,500 just as the first one gets its name, and is in use."""
    cache, files, iterdir = Cache(tmp_path, 1500), tmp_path / "files", Path.iterdir
    listed, used = threading.Event(), threading.Event()

    def first() -> None:
        with cache.file("first", 1000, lambda target: used.wait(20) and None):
            listed.wait(20)
            time.sleep(0.3)

    def listing(folder: Path) -> Iterator[Path]:
        paths = list(iterdir(folder))
        if folder == files and threading.current_thread() is threading.main_thread() and not used.is_set():
            used.set()  # the download of the first file ends between this list and the looks at its files
            end = time.monotonic() + 0.5
            while not (files / "first").exists() and time.monotonic() < end:
                time.sleep(0.01)
            listed.set()
        return iter(paths)

    holder = threading.Thread(target=first)
    holder.start()
    while not any(iterdir(files)):
        time.sleep(0.01)
    monkeypatch.setattr(Path, "iterdir", listing)
    with cache.file("second", 1000, lambda target: None):
        assert sum(path.stat().st_size for path in iterdir(files)) <= 1500
    holder.join(20)
    assert not holder.is_alive()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2500)
    (tmp_path / "files" / "dead.part").write_bytes(b"x" * 2000)
    with cache.file("new", 1000, lambda target: None):
        assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["new"]

    def fail(target: int) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError), cache.file("broken", 1000, fail):
        pass
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["new"]


def test_a_cache_on_a_full_disk_makes_room_of_its_own_files_or_says_so_at_once() -> None:
    """Its bound is larger than the disk. What is in use stays; nothing half written does."""

    def fetch(cache: Cache, name: str) -> AbstractContextManager[int]:
        return cache.file(name, 1 << 20, lambda target: save(iter([name.encode() * (1 << 20)]), 1 << 20, target))

    with disk("3500k") as small:
        cache = Cache(small.path, 1 << 30)
        for name in "abcd":
            with fetch(cache, name) as descriptor:
                assert os.pread(descriptor, 2 << 20, 0) == name.encode() * (1 << 20)
        assert sorted(path.name for path in cache.files.iterdir()) == ["b", "c", "d"]
        with fetch(cache, "b"), fetch(cache, "c"), fetch(cache, "d"):
            with pytest.raises(NoRoomError, match="choose another cache folder") as caught, fetch(cache, "e"):
                pass
            assert lacks_room(caught.value) and exit_status(caught.value) == 75
            assert sorted(path.name for path in cache.files.iterdir()) == ["b", "c", "d"]
        with fetch(cache, "e"):
            assert not (cache.files / "b").exists()


def test_a_recorded_name_never_leads_out_of_its_folder(local: DatasetIndex, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", [(BOTH, 2)])
    path = root / "index" / "dataset.json"
    good = path.read_text()
    for bad in ("../av-000000.tar", "/etc/passwd", "--endpoint"):
        path.write_text(good.replace('"av-000000.tar"', f'"{bad}"'))
        with pytest.raises(DataError, match="no plain file name"):
            DatasetIndex.open(root)
        with FlakyServer(root) as server, pytest.raises(DataError, match="no plain file name"):
            DatasetIndex.open(server.url, cache=tmp_path / "cache")


def test_what_fsspec_opens(local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of fsspec, with whole files in the cache; one that isn't installed; one that hangs; one of none."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(local.root), "/set", recursive=True)
    try:
        index = DatasetIndex.open("memory://set", cache=tmp_path / "cache")
        same_samples(index, local)
        assert index.verify() == []
        monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,))
        slow = DatasetIndex.open("memory://set", cache=tmp_path / "slow", timeout=0.3)
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), "_open", lambda *args, **options: time.sleep(2))
            with pytest.raises(DataError, match="after 2 attempts .nothing came for 0.3 s"):
                slow.read_clip(0)
        memory.rm("/set/av-000000.tar")
        with pytest.raises(DataError, match=r"memory://set/av-000000.tar can't be read \(FileNotFoundError"):
            slow.read_clip(0)
    finally:
        memory.rm("/set", recursive=True)
    for root, message in (("gs://bucket/dir", "pip install gcsfs"), ("sftp://host/dir", "pip install paramiko")):
        with pytest.raises(DataError, match=message):
            DatasetIndex.open(root, cache=tmp_path / "other")
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        DatasetIndex.open("nosuch://bucket/dir", cache=tmp_path / "other")


def test_what_counts_as_remote() -> None:
    assert all(is_remote(root) for root in ("http://h/d", "https://h/d", "pipe:cat {name}", "gs://b/d", "s3://b/d"))
    assert not any(is_remote(root) for root in ("/data/a:b", "data/x", "file:///data/x", Path("/x")))
    place = find_storage("file:///data/x", None, 1, 1.0)
    assert isinstance(place, Folder) and str(place) == "/data/x"
