"""Encoders in a process per device: decoding processes send it decoded clips, and receive latents.

    with EncodeServers(encoder, devices) as servers:        # one process for each device
        ...workers use ServedVideo and ServedAudio, which know a server's address

A decoding process waits for its latents, so that a device has at most as many clips before it as there are processes:
that is the queue and its bound. While a clip is at work on the device, the next ones are received into host memory.
Each request is computed by itself, whatever came before it: what a clip gives does not depend on processes or devices.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from data.codec import AudioCodec, CodecError, Codecs, EncoderConfig, VideoCodec
from data.errors import DataError

START = 900.0  # s that a process may take to read its weights
CLOSE = b"close"
QUEUE, KINDS = "queue", ("video", "condition", "audio")


def devices_of(device: str) -> list[str]:
    """The devices that `device` names: "cpu" gives none (decoding processes encode themselves), "cuda" all that are
    visible, "cuda:1" one. DataError where there is no such device."""
    if device == "cpu":
        return []
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise DataError(f"device={device} must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if count == 0 or (number and int(number) >= count):
        raise DataError(f"device={device}: this machine shows {count} CUDA devices; device=cpu works everywhere")
    return [device] if number else [f"cuda:{index}" for index in range(count)]


class EncodeServers:
    """A process for each device, started on entering and ended on leaving. addresses: of each, where
    its requests are taken."""

    def __init__(self, config: EncoderConfig, devices: Sequence[str]):
        self.config, self.devices = config, list(devices)
        self.folder = Path(tempfile.mkdtemp(prefix="mova-encode-")) if devices else Path()
        self.addresses = [str(self.folder / f"{number}") for number in range(len(self.devices))]
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def __enter__(self) -> EncodeServers:
        context = multiprocessing.get_context("spawn")
        for device, address in zip(self.devices, self.addresses, strict=True):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, address, self.config, device), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        try:
            for device, pipe in zip(self.devices, self._pipes, strict=True):
                self._hear(device, pipe)
        except BaseException:
            self._end()
            raise
        return self

    def _hear(self, device: str, pipe: connection.Connection) -> None:
        """Wait until a process is ready. CodecError with what it says otherwise."""
        if not pipe.poll(START):
            raise CodecError(f"the encoders on {device} were not read within {START:.0f} s")
        try:
            said = pipe.recv_bytes().decode()
        except EOFError:
            raise CodecError(f"the encoder process on {device} ended while it read its weights (memory?)") from None
        if said:
            raise CodecError(f"encoders on {device}: {said}")

    def close(self) -> list[dict[str, Any]]:
        """End the processes; of each device the seconds that it was at work by kind of request ("busy") and that it was
        there, and its requests."""
        found = []
        for device, pipe in zip(self.devices, self._pipes, strict=True):
            with contextlib.suppress(OSError, EOFError):
                pipe.send_bytes(CLOSE)
                found.append({"device": device} | json.loads(pipe.recv_bytes()))
        self._end()
        return found

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self.devices:
            shutil.rmtree(self.folder, ignore_errors=True)


class _Device:
    """The codecs of one process, and how long they were at work."""

    def __init__(self, config: EncoderConfig, device: str):
        self.codecs = Codecs(config, device)
        self.lock = threading.Lock()
        self.busy = dict.fromkeys(KINDS, 0.0)
        self.requests = 0
        self.began = time.monotonic()

    def __call__(self, what: str, tensor: Tensor, number: int) -> tuple[Tensor, float]:
        """One request, alone on the device, and the seconds that it took there."""
        video, audio = self.codecs.video, self.codecs.audio
        calls: dict[str, Callable[[], Tensor]] = {
            "video": lambda: video.encode(tensor),
            "condition": lambda: video.encode_condition(tensor, number),
            "audio": lambda: audio.encode(tensor),
        }
        with self.lock:
            begin = time.monotonic()
            found = calls[what]()
            seconds = time.monotonic() - begin
            self.busy[what] += seconds
            self.requests += 1
            return found, seconds


def _serve(pipe: connection.Connection, address: str, config: EncoderConfig, device: str) -> None:
    os.umask(0o077)  # the socket is for this user alone
    try:
        work = _Device(config, device)
        work("video", torch.zeros(1, 3, 1, 16, 16), 0)  # reads the weights, and says what is wrong with them
        work("audio", torch.zeros(1, work.codecs.audio.hop), 0)
        work.busy = dict.fromkeys(KINDS, 0.0)
        work.requests, work.began = 0, time.monotonic()
        listener = connection.Listener(address, "AF_UNIX", backlog=256)
    except Exception as error:
        pipe.send_bytes((str(error) or type(error).__name__).encode())
        return
    pipe.send_bytes(b"")

    def accept() -> None:
        while True:
            with contextlib.suppress(OSError, EOFError):
                threading.Thread(target=_answer, args=(listener.accept(), work), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.recv_bytes()
        facts = {"busy": work.busy, "there": time.monotonic() - work.began, "requests": work.requests}
        pipe.send_bytes(json.dumps(facts).encode())


def _answer(client: Any, work: _Device) -> None:
    """All requests of one decoding process."""
    with contextlib.suppress(EOFError, OSError), client:
        while True:
            head = json.loads(client.recv_bytes())
            tensor = _receive(client, head["shape"])
            try:
                found, seconds = work(head["what"], tensor, head["number"])
            except Exception as error:  # the process that asked decides what it means
                fatal = not isinstance(error, ValueError)
                client.send_bytes(json.dumps({"error": str(error), "fatal": fatal}).encode())
                continue
            _send(client, {"shape": list(found.shape), "seconds": seconds}, found)


def _send(client: Any, head: dict[str, Any], tensor: Tensor) -> None:
    client.send_bytes(json.dumps(head).encode())
    client.send_bytes(memoryview(tensor.detach().float().contiguous().reshape(-1).view(torch.uint8).numpy().data))


def _receive(client: Any, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape)
    client.recv_bytes_into(tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


class Client:
    """A decoding process's connection to one server. `waited`: wall seconds spent waiting for latents, by kind of
    request while the device works on it, the rest under QUEUE."""

    def __init__(self, address: str):
        self.address = address
        self.waited = dict.fromkeys((QUEUE, *KINDS), 0.0)
        self._client: Any = None

    def ask(self, what: str, tensor: Tensor, number: int = 0) -> Tensor:
        """What the server's codec makes of a tensor. ValueError as its codec; CodecError when the server is gone or its
        device fails: no fault of the clip."""
        begin = time.monotonic()
        try:
            if self._client is None:
                self._client = connection.Client(self.address, "AF_UNIX")
            _send(self._client, {"what": what, "shape": list(tensor.shape), "number": number}, tensor)
            head = json.loads(self._client.recv_bytes())
            if "shape" in head:
                found = _receive(self._client, head["shape"])
                self.waited[what] += head["seconds"]
                self.waited[QUEUE] += time.monotonic() - begin - head["seconds"]
                return found
        except (OSError, EOFError) as error:
            raise CodecError(
                f"the encoder process is gone ({type(error).__name__}): was its memory too small? The same command "
                "resumes the work"
            ) from None
        raise (CodecError if head["fatal"] else ValueError)(head["error"])


def serve(codecs: Codecs, client: Client) -> None:
    """Let those of the codecs that compute on a device compute on the server's."""
    if codecs.video.on_device:
        codecs.video = ServedVideo(client, codecs.video)
    if codecs.audio.on_device:
        codecs.audio = ServedAudio(client, codecs.audio)


class ServedVideo(VideoCodec):
    """A video codec whose device is a server's. local: the same codec, for what needs no weights."""

    def __init__(self, client: Client, local: VideoCodec):
        self._client, self._local = client, local
        self.memory, self.batch = local.memory, local.batch

    @property
    def fingerprint(self) -> str:
        return self._local.fingerprint

    def encode(self, pixels: Tensor) -> Tensor:
        return self._client.ask("video", pixels)

    def encode_condition(self, first: Tensor, frames: int) -> Tensor:
        return self._client.ask("condition", first, frames)

    def decode(self, latents: Tensor) -> Tensor:
        return self._local.decode(latents)


class ServedAudio(AudioCodec):
    """An audio codec whose device is a server's."""

    def __init__(self, client: Client, local: AudioCodec):
        self._client, self._local, self.sample_rate = client, local, local.sample_rate

    @property
    def fingerprint(self) -> str:
        return self._local.fingerprint

    def encode(self, waveforms: Tensor) -> Tensor:
        return self._client.ask("audio", waveforms)

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        return self._local.decode(latents, samples)
