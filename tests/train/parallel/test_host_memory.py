"""Host memory: one allocation, reckoned before it is needed; ZeRO's whole weights against a device's memory."""

import platform
import resource
import threading
from types import SimpleNamespace

import pytest
import torch
import yaml

from core.errors import RunError
from core.run_dir import RunDir
from launch.slurm.memory import memory_shortage
from model.joint import JointConfig, JointTransformer
from tests.distributed import run_cases
from tests.train.cases import tiny_config
from train.checkpoint import saver
from train.checkpoint.saver import HostCopy
from train.engine.zero_memory import device_memory, refuse_what_cannot_fit, zero_bytes
from train.parallel import host_memory
from train.parallel.host_memory import allocate, available_bytes, host_bytes, keep_freed_memory, shortage
from train.parallel.mesh import ParallelConfig

GIB = 2**30


def test_all_tensors_lie_in_one_allocation_of_their_size_which_is_locked_as_it_is(monkeypatch):
    locked = []
    monkeypatch.setattr(host_memory, "lock_pages", lambda whole: locked.append(whole.nbytes))
    like = {n: torch.zeros(1000 + n, 3, dtype=dtype) for n, dtype in enumerate([torch.float32, torch.bfloat16] * 20)}
    like["number"], like["none"] = torch.zeros((), dtype=torch.int64), torch.zeros(0, 4)
    given = allocate(like, page_locked=True)
    exact = sum(tensor.nbytes for tensor in like.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in given.values()}) == 1
    assert locked == [given["number"].untyped_storage().nbytes()] and exact <= locked[0] < exact + 64 * len(like)
    for number, (key, tensor) in enumerate(given.items()):
        assert tensor.shape == like[key].shape and tensor.dtype == like[key].dtype and tensor.is_contiguous()
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(given.values()))  # no overlap


def test_memory_is_registered_with_cuda_and_given_back_with_its_storage(monkeypatch):
    calls = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append(("register", *args)) or 0,
        cudaHostUnregister=lambda at: calls.append(("unregister", at)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    given = allocate({"a": torch.zeros(100), "b": torch.zeros(100)}, page_locked=True)
    at = given["a"].untyped_storage().data_ptr()
    assert calls == [("register", at, 2 * 448, 0)]
    del given["a"]
    assert len(calls) == 1
    del given
    assert calls[1:] == [("unregister", at)]
    cudart.cudaHostRegister = lambda *args: 2
    with pytest.raises(RuntimeError, match="cannot be page-locked .CUDA error 2"):
        allocate({"a": torch.zeros(100)}, page_locked=True)


def test_a_copy_uses_its_memory_again_and_adds_one_piece_for_what_comes_later(monkeypatch):
    made = []
    real = allocate

    def noted(like, page_locked):
        made.append(sorted(like))
        return real(like, page_locked)

    monkeypatch.setattr(saver, "allocate", noted)
    copy, state = HostCopy(), {"a": torch.ones(5, 2), "b": torch.ones(3)}
    first = copy.take(state)
    state["a"].fill_(2)
    assert first["a"].eq(1).all()
    state["c"] = torch.full((4,), 3.0)
    second = copy.take(state)
    assert made == [["a", "b"], ["c"]] and second["a"].eq(2).all() and second["c"].eq(3).all()
    assert second["a"].data_ptr() == first["a"].data_ptr()


def test_what_a_layout_needs_is_the_size_of_the_first_ranks_shards():
    config = tiny_config()
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in JointTransformer(config).parameters()]
    for world, replicate, engine in ((1, 1, "fsdp2"), (4, 1, "fsdp2"), (4, 2, "fsdp2"), (4, 1, "zero2")):
        shards = world // replicate
        held = sum(torch.empty(shape, device="meta").chunk(shards)[0].numel() * 4 for shape in shapes)
        found = host_bytes(config, ParallelConfig(dp_replicate=replicate, engine=engine), world, average=False)
        assert found["copy for checkpoints"] == 3 * held and found["moments"] == 0
        assert found["ZeRO's gathered state"] == (3 * held if engine == "zero2" else 0)
    more = host_bytes(config, ParallelConfig(optimizer_state="host"), 4, average=True)
    held = sum(torch.empty(shape, device="meta").chunk(4)[0].numel() * 4 for shape in shapes)
    assert more["copy for checkpoints"] == 4 * held and more["moments"] == 2 * held


def test_the_least_of_kernel_control_group_and_slurm_counts(tmp_path, monkeypatch):
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    group.mkdir()
    meminfo.write_text(f"MemTotal: {900 * 2**20} kB\nMemAvailable:   {600 * 2**20} kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_control_groups", lambda: [group])
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    assert available_bytes() == 600 * GIB
    (group / "memory.max").write_text("max\n")
    assert available_bytes() == 600 * GIB
    (group / "memory.max").write_text(f"{500 * GIB}\n")
    (group / "memory.current").write_text(f"{20 * GIB}\n")
    assert available_bytes() == 480 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(300 * 1024))
    assert available_bytes() == 300 * GIB
    assert shortage(37 * GIB, 8) is None
    told = shortage(38 * GIB, 8) or ""
    assert "8 ranks need 304.0 GiB" in told and "300.0 GiB are available" in told


def test_the_preflight_refuses_a_node_that_lacks_the_memory(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    run = RunDir(tmp_path)
    model = OmegaConf.to_container(OmegaConf.structured(tiny_config()))
    run.config.write_text(yaml.safe_dump({"model": model, "parallel": {"ulysses": 2}, "ema": {"decay": 0.999}}))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert memory_shortage(run, 4) == []
    needed = host_bytes(tiny_config(), ParallelConfig(ulysses=2), 8, average=True)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 4 * sum(needed.values()))
    assert memory_shortage(run, 4) == []
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 4 * sum(needed.values()) - 1)
    (problem,) = memory_shortage(run, 4)
    assert "4 ranks need" in problem and "--mem" in problem


def test_the_checkpoint_thread_stands_on_its_ranks_device(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: seen.setdefault(threading.current_thread().name, at))
    monkeypatch.setattr(saver.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(saver.dist, "get_rank", lambda: 1)
    keeper = saver.Saver(tmp_path, saver.CheckpointConfig(), {}, "")
    job = SimpleNamespace(error=None, path=tmp_path / "x", bytes=1)
    thread = threading.Thread(target=keeper._write, args=(job,), name="writer")
    thread.start()
    thread.join()
    assert seen == {"writer": 5} and job.error is not None  # there is no group to agree in


@pytest.mark.parametrize(
    "stage,world,element,average,expected",
    [
        (1, 64, 2, False, 2 * 100 + 2 * 60 + 12 * 100 / 64),
        (1, 8, 4, False, 4 * 100 + 4 * 60 + 12 * 100 / 8),
        (2, 8, 2, False, 2 * 100 + 4 * 60 / 8 + 12 * 100 / 8),
        (2, 8, 2, True, 2 * 100 + 4 * 60 / 8 + 16 * 100 / 8),
    ],
)
def test_what_zero_holds(stage, world, element, average, expected):
    assert sum(zero_bytes(stage, 100, 60, world, element, average).values()) == expected


def test_zero_1_and_2_with_a_model_that_cannot_fit_are_refused_with_the_sum():
    config: JointConfig = tiny_config()
    with torch.device("meta"):
        parameters = dict(JointTransformer(config).named_parameters())
    whole = sum(p.numel() for p in parameters.values())
    idle = sum(p.numel() for name, p in parameters.items() if name.startswith("video_dit_2."))
    least = 2 * whole + 2 * (whole - idle) + 12 * whole / 8

    def check(stage, memory):
        refuse_what_cannot_fit(stage, config, parameters, 8, torch.bfloat16, False, memory)

    check(1, int(least) + 1)
    check(3, 1)
    check(1, None)
    with pytest.raises(RunError, match=r"zero1 holds all .* on each of 8 ranks: weights .* = .* GB") as caught:
        check(1, int(least) - 1)
    assert "\n" not in str(caught.value) and "fsdp2 or zero3" in str(caught.value)
    with pytest.raises(RunError, match="zero2 holds"):
        check(2, 2 * whole)


def test_a_gpu_says_what_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    assert device_memory(torch.device("cuda", 3)) == 80 * GIB and device_memory(torch.device("cpu")) is None


def page_faults_after_one_was_freed() -> int:
    """Pages that the kernel hands out for a tensor of 8 MB, when one of 16 MB was freed before."""
    assert keep_freed_memory()
    torch.ones(2**22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")
def test_freed_memory_is_used_again_without_the_kernel():
    ((faults,),) = run_cases(1, {"second": (page_faults_after_one_was_freed, ())}).values()
    assert faults < 64  # of 2,048 pages
