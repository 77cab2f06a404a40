"""Buckets, against moto's server: signed and anonymous, by ranges, listed; single files of any address."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

import data.storage.remote
import data.storage.retry
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.errors import DataError, ReadError
from data.sources.cells import TableLayout
from data.sources.content import PART, fetched, hash_file, hash_parts, location_of
from data.sources.survey import Survey
from data.storage.cache import Cache
from data.storage.remote import list_remote, open_remote_file, read_remote, store_of
from data.storage.s3 import S3
from data.storage.storage import find_storage
from tests.data.storage.flaky_server import FlakyServer
from tests.shards import make_dataset

BOTH = Bucket(frames=3, height=4, width=4, audio_steps=8, fps=24.0, has_video=True, has_audio=True)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def settings(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower() in ("http_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name)
    for name, text in (
        ("AWS_ACCESS_KEY_ID", "key-id"),
        ("AWS_SECRET_ACCESS_KEY", "hidden"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_ENDPOINT_URL", endpoint),
    ):
        monkeypatch.setenv(name, text)
    store_of.cache_clear()
    yield
    store_of.cache_clear()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return DatasetIndex.open(make_dataset(tmp_path_factory.mktemp("s3") / "set", [(BOTH, 9), (BOTH, 5)], seed=5))


@pytest.fixture
def bucket(endpoint: str, local: DatasetIndex, settings: None) -> Iterator[Any]:
    """A client, with the dataset under clips/set."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="clips")
    root = Path(local.root)
    for path in [*root.glob("*.*"), *root.glob("index/*")]:
        client.upload_file(str(path), "clips", f"set/{path.relative_to(root)}")
    yield client
    for entry in client.list_objects_v2(Bucket="clips")["Contents"]:
        client.delete_object(Bucket="clips", Key=entry["Key"])
    client.delete_bucket(Bucket="clips")


def same_samples(mine: DatasetIndex, local: DatasetIndex) -> None:
    assert (mine.fingerprint, len(mine)) == (local.fingerprint, len(local))
    for row in range(len(local)):
        a, b = mine.read_clip(row), local.read_clip(row)
        for x, y in ((a.video, b.video), (a.audio, b.audio), (a.condition, b.condition)):
            assert x is not None and y is not None and torch.equal(x, y)
        assert a.meta == b.meta and torch.equal(mine.read_text(row, "plain"), local.read_text(row, "plain"))


def test_a_dataset_in_a_bucket_is_read_by_ranges(
    bucket: Any, local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = DatasetIndex.open("s3://clips/set", cache=tmp_path / "cache")
    same_samples(index, local)
    assert index.verify() == []
    assert not list((tmp_path / "cache" / "files").iterdir())
    same_samples(DatasetIndex.open("s3://clips/set/{name}", cache=tmp_path / "other"), local)
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", ())
    bucket.delete_object(Bucket="clips", Key="set/av-000000.tar")
    with pytest.raises(
        DataError, match=r"s3://clips/set/av-000000.tar: the server answers 404 \(NoSuchKey\)"
    ) as caught:
        index.read_clip(0)
    assert "X-Amz" not in str(caught.value) and "key-id" not in str(caught.value)
    with pytest.raises(DataError, match="NoSuchBucket"):
        DatasetIndex.open("s3://absent/set", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="names no bucket"):
        DatasetIndex.open("s3:///set", cache=tmp_path / "cache")


def test_threads_read_a_bucket_together(bucket: Any, local: DatasetIndex, tmp_path: Path) -> None:
    """All begin at once, so that they make the client at once."""
    index = DatasetIndex.open("s3://clips/set", cache=tmp_path / "cache")
    store_of.cache_clear()
    failed: list[BaseException] = []
    start = threading.Barrier(8)
    store = S3(20)

    def work(row: int) -> None:
        try:
            start.wait(20)
            name = f"s3://clips/set/{local.shards[0]['name']}"
            assert b"".join(store.stream(name)) == (Path(local.root) / local.shards[0]["name"]).read_bytes()
            assert index.read_clip(row).key == local.key(row)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_requests_are_signed_where_there_are_credentials_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region that a bucket turns out to lie in is signed for from then on; a session's token goes along."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a b+c.txt").write_bytes(b"words")
    with FlakyServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_SESSION_TOKEN", "session")
        store = S3(5)
        server.answers = [(301, {"x-amz-bucket-region": "eu-west-3"})]
        for _ in range(2):
            assert b"".join(store.stream("s3://bucket/a b+c.txt")) == b"words"
        paths = [seen["path"] for seen in server.seen]
        assert ["us-east-1" in path for path in paths] == [True, False, False]
        assert ["eu-west-3" in path for path in paths] == [False, True, True]
        assert all("X-Amz-Security-Token=session" in path and "X-Amz-Signature=" in path for path in paths)
        server.answers = [(301, {"x-amz-bucket-region": "eu-west-3"})] * 3
        with pytest.raises(DataError, match="301"):
            b"".join(store.stream("s3://bucket/a b+c.txt"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        server.answers = []
        assert b"".join(S3(5).stream("s3://bucket/a b+c.txt")) == b"words"
        assert server.seen[-1]["path"] == "/bucket/a%20b%2Bc.txt"
        monkeypatch.setenv("AWS_PROFILE", "absent")
        with pytest.raises(DataError, match="absent"):
            b"".join(S3(5).stream("s3://bucket/x"))


def test_the_aws_command_by_pipe(
    bucket: Any, endpoint: str, local: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = Path(sys.executable).with_name("aws")
    if not aws.exists():
        pytest.skip("the aws command is not installed")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    place = find_storage(f"pipe:{aws} --endpoint-url {endpoint} s3 cp s3://clips/set/{{name}} -", tmp_path, 1 << 30, 60)
    assert b"".join(place.stream("av-000000.tar")) == (Path(local.root) / "av-000000.tar").read_bytes()
    with pytest.raises(OSError, match="404"):
        b"".join(place.stream("absent.tar"))


def test_folders_of_buckets_are_listed(bucket: Any, local: DatasetIndex) -> None:
    root = Path(local.root)
    expected = sorted(
        (path.relative_to(root).as_posix(), path.stat().st_size) for path in root.rglob("*") if path.is_file()
    )
    bucket.put_object(Bucket="clips", Key="set/", Body=b"")  # some tools make one for the folder itself
    bucket.put_object(Bucket="clips", Key="settings", Body=b"of another folder")
    for address in ("s3://clips/set", "s3://clips/set/"):
        assert sorted(list_remote(address)) == expected
    store = store_of("s3", data.storage.remote.TIMEOUT)
    assert isinstance(store, S3)
    pages: list[None] = []

    def shorten(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 3
        pages.append(None)

    store._boto().meta.events.register("before-parameter-build.s3.ListObjectsV2", shorten)
    assert sorted(list_remote("s3://clips/set")) == expected and len(pages) == -(-(len(expected) + 1) // 3)
    assert list_remote("s3://clips/none") == []
    with pytest.raises(DataError, match="NoSuchBucket"):
        list_remote("s3://absent/set")
    with pytest.raises(DataError, match="doesn't list its files; give a manifest"):
        list_remote("http://127.0.0.1:9/set")


@pytest.fixture
def addresses(bucket: Any, tmp_path: Path) -> Iterator[tuple[list[str], Callable[[bytes], None]]]:
    """The same file at an http, an S3 and an fsspec address; and what replaces it."""
    import fsspec

    folder = tmp_path / "web"
    folder.mkdir()
    memory = fsspec.filesystem("memory")

    def put(content: bytes) -> None:
        (folder / "clip.mp4").write_bytes(content)
        bucket.put_object(Bucket="clips", Key="clip.mp4", Body=content)
        memory.pipe("/folder/clip.mp4", content)

    put(b"first words" * 1000)
    with FlakyServer(folder) as server:
        yield [f"{server.url}/clip.mp4", "s3://clips/clip.mp4", "memory://folder/clip.mp4"], put
    memory.rm("/folder", recursive=True)


def test_single_files_come_into_the_bounded_cache(
    addresses: tuple[list[str], Callable[[bytes], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,))
    urls, put = addresses
    cache = Cache(tmp_path / "cache", 20_000)
    for content in (b"first words" * 1000, b"other words" * 1000):
        put(content)
        for url in urls:
            for store in (cache, Cache(tmp_path / "roomy", 1 << 20)):
                for _ in range(2):
                    with open_remote_file(url, store, timeout=5) as path:
                        assert path.read_bytes() == content and path.suffix == ".mp4"
                        assert sum(file.stat().st_size for file in store.files.iterdir()) <= store.limit
            assert read_remote(url, timeout=5) == content
            with pytest.raises(DataError, match="clip.mp5"), open_remote_file(url[:-1] + "5", cache, timeout=5):
                pass
    put(b"x" * 20_001)
    with pytest.raises(DataError, match="raise cache_bytes"), open_remote_file(urls[0], cache, timeout=5):
        pass


def test_single_files_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,) * 20)
    (tmp_path / "a.mp4").write_bytes(b"x" * 5000)
    with FlakyServer(tmp_path, failure=0.5, stall=0.4) as server:
        cache = Cache(tmp_path / "cache", 20_000)
        for _ in range(4):
            with open_remote_file(f"{server.url}/a.mp4?token=x", cache, timeout=0.2) as path:
                assert path.read_bytes() == b"x" * 5000 and path.suffix == ".mp4"
            assert not list(cache.files.iterdir())  # that server says nothing by which a later file is told from it
        monkeypatch.setattr(data.storage.retry, "REMOTE_WAITS", (0.01,))
        server.failure = 1.0
        with pytest.raises(ReadError, match="a.mp4 can't be read after 2 attempts"):
            read_remote(f"{server.url}/a.mp4?token=x", timeout=0.2)


def test_the_clips_of_a_bucket_are_listed_with_their_sizes_and_read_in_parts(bucket: Any, tmp_path: Path) -> None:
    content = os.urandom(5 * PART)
    for key, body in (
        ("raw/a b.mp4", content),
        ("raw/sub/b.mp4", b"small"),
        ("raw/a b.txt", b"words"),
        ("raw/x.pdf", b"x"),
    ):
        bucket.put_object(Bucket="clips", Key=key, Body=body)
    survey = Survey("s3://clips/raw/", TableLayout())
    assert {entry.name: entry.size for entry in survey} == {b"a b.mp4": len(content), b"sub/b.mp4": 5}
    assert set(survey.beside.kinds) == {
        "text at an address (captions come from a manifest there)", "file with the ending .pdf",
    }  # fmt: skip
    (tmp_path / "a.mp4").write_bytes(content)
    address = location_of(survey.root, "a b.mp4")
    assert hash_parts(address, len(content)) == hash_parts(tmp_path / "a.mp4", len(content))
    assert hash_file(address, len(content))[1] == hashlib.sha256(content).hexdigest()
    with fetched(address, len(content), tmp_path / "copy", lambda: None) as path:
        assert path == tmp_path / "copy" and path.read_bytes() == content
    assert not (tmp_path / "copy").exists()
    with pytest.raises(DataError, match="has 81920 bytes, it had 7 when"):
        hash_file(address, 7)
