"""Looks inside a run: of the steps and ranks that were asked for, by config and by file, and of nothing else."""

import json
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from core.errors import RunError
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from train import loop
from train.monitor import profiler
from train.monitor.kernel_kinds import KERNEL_KINDS, kind_of_kernel, seconds_by_kind
from train.monitor.profiler import ProfilerConfig

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
)  # fmt: skip
GPU_KERNELS = {
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>>": "attention",
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnBwdSm90<...>>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x128_4x1x1_cga1x1x1": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)": "attention",
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k": "gemm",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>": "gemm",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
    "Memcpy HtoD (Pinned -> Device)": "host_copies",
    "Memcpy DtoD (Device -> Device)": "elementwise",
    "Memset (Device)": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": "elementwise",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "elementwise",
    "triton_red_fused_add_mul_native_layer_norm_3": "elementwise",
    "multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor>": "elementwise",
}
ASKED = {  # in step -> what the file says
    6: '{"steps": 2, "ranks": [0]}',
    11: '{"rank": [0]}',
    13: '{"ranks": [0, 7]}',
    15: '{"steps": 1.5}',
    17: "[",
    19: "",
}


@contextmanager
def patched(place, name, value):
    right = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, right)


def looked(root: Path, data: Path, run_id: str, *overrides: str, fails_in: int | None = None) -> dict:
    """A run in which files ask for looks."""
    right, step = loop.forward_backward, -1

    def asking(*arguments):
        nonlocal step
        step += 1
        if step in ASKED and torch.distributed.get_rank() == 0 and "inspect.at" in overrides[0]:
            (root / run_id / "profile").write_text(ASKED[step])
        if step == fails_in:
            raise RunError("planted")
        return right(*arguments)

    with patched(loop, "forward_backward", asking):
        return runs.train(root, data, run_id, "steps=24", "validation.every=0", *overrides)


def unlooked(*arguments) -> dict:
    """A run that meets an error as soon as it does anything for a look."""

    def never(*_, **__):
        raise AssertionError("nobody asked")

    with (
        patched(profiler.Profiler, "take", never),
        patched(profiler, "_Look", never),
        patched(profiler, "threading", SimpleNamespace(Timer=never)),  # a run has other timers
    ):
        return looked(*arguments)


def in_the_way(root: Path, *arguments) -> dict:
    """A run that finds a file where the folder of the looks should be."""
    if torch.distributed.get_rank() == 0:
        (root / "blocked").mkdir()
        (root / "blocked" / "inspect").touch()
    return looked(root, *arguments)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    data = make_dataset(root / "data", [(CLIP, 8), (CLIP, 8)])
    some = ("inspect.at=[3]", "inspect.steps=2", "inspect.ranks=[1]", "inspect.what=[trace,memory,stacks]")
    results = run_cases(
        2,
        {
            "looked": (looked, (root, data, "looked", *some)),
            "plain": (unlooked, (root, data, "plain", "inspect.steps=2")),
            "blocked": (in_the_way, (root, data, "blocked", "inspect.steps=2", "inspect.at=[2,3]", "steps=6")),
            "failed": (failed, (root, data)),
            "no such rank": (runs.train, (root, data, "none", "inspect.ranks=[2]")),
        },
    )
    return root, results


def failed(root: Path, data: Path) -> dict:
    return looked(root, data, "failed", "inspect.steps=9", "inspect.at=[3]", fails_in=5)


@cache
def traced(path: Path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def steps_in(path: Path) -> set[str]:
    return {event["name"] for event in traced(path) if event["name"].startswith("step ")}


def events(root: Path, kind: str) -> list[int]:
    lines = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == kind]


def test_the_steps_and_ranks_that_were_asked_for_are_looked_at_and_no_others(ranks):
    root, results = ranks
    run = root / "looked"
    assert [result.get("ending") for result in results["looked"]] == ["finished"] * 2, results["looked"]
    found = {path.name: steps_in(path) for path in (run / "inspect").iterdir()}
    assert found == {
        "step-00000003-rank1.trace.json": {"step 3", "step 4"},
        "step-00000008-rank0.trace.json": {"step 8", "step 9"},  # the file came in step 6, all ranks heard of it in 7
        "step-00000021-rank1.trace.json": {"step 21", "step 22"},  # an empty file: as the config says
    }
    names = {event["name"] for event in traced(run / "inspect" / "step-00000008-rank0.trace.json")}
    assert {"aten::mm", "gloo:all_reduce"} <= names and any("Backward" in name for name in names)
    assert not (run / "profile").exists()
    assert events(run, "inspected") == [3, 8, 21]


def test_a_profile_of_the_first_rank_gives_seconds_by_kind_of_kernel(ranks):
    """In the row of the step behind it, and no other; those of products and attention are in the trace itself."""
    root = ranks[0] / "looked"
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    kinds = {f"perf/profiled_{kind}_time" for kind in KERNEL_KINDS}
    assert [row["step"] for row in rows if kinds & row.keys()] == [10]
    found = next(row for row in rows if row["step"] == 10)
    spans = [event for event in traced(root / "inspect" / "step-00000008-rank0.trace.json") if event.get("ph") == "X"]
    for kind, names in (("gemm", ("aten::mm", "aten::addmm", "aten::bmm")), ("attention", ATTENTION)):
        named = [event for event in spans if event["name"] in names]
        whole, own = (
            sum(seconds) / 2 / 1e6 for seconds in ((e["dur"] for e in named), (_own(e, spans) for e in named))
        )
        assert 0.5 * own < found[f"perf/profiled_{kind}_time"] <= 1.001 * whole
    assert found["perf/profiled_collectives_time"] > 0 and found["perf/profiled_host_copies_time"] == 0


def _own(event: dict, spans: list[dict]) -> float:
    """Microseconds of an operator without those that it calls: a busy machine may stop a process within one of them."""
    begin, end = event["ts"], event["ts"] + event["dur"]
    called = [
        one for one in spans
        if one is not event and one["tid"] == event["tid"] and begin <= one["ts"] and one["ts"] + one["dur"] <= end
    ]  # fmt: skip
    outer = [one for one in called if not any(_within(one, other) for other in called)]
    return event["dur"] - sum(one["dur"] for one in outer)


def _within(one: dict, other: dict) -> bool:
    return one is not other and other["ts"] <= one["ts"] and one["ts"] + one["dur"] <= other["ts"] + other["dur"]


def test_kernels_of_a_gpu_are_told_apart_by_their_names():
    """Names in the form that cuBLAS, cuDNN, flash-attn, NCCL and torch give them; not recorded on a device."""
    assert {name: kind_of_kernel(name) for name in GPU_KERNELS} == GPU_KERNELS


def recorded(name: str, thread: int, start: int, end: int, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    """An event from one second to another, as the profiler records it."""
    values = {"name": name, "device_type": device, "start_thread_id": thread}
    values |= {"start_ns": start * 10**9, "duration_ns": (end - start) * 10**9}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_seconds_are_those_of_kernels_or_of_operators_without_what_they_call():
    cuda = DeviceType.CUDA
    events = [
        recorded("step 8", 1, 0, 100),
        recorded("aten::linear", 1, 10, 20),  # one second of its own, before what it calls
        recorded("aten::addmm", 1, 11, 20),
        recorded("aten::copy_", 1, 12, 14),  # within the product
        recorded("autograd::engine::evaluate_function: AddmmBackward0", 2, 10, 40),
        recorded("AddmmBackward0", 2, 10, 40),
        recorded("aten::mm", 2, 20, 25),
        recorded("aten::mm", 2, 25, 30),  # begins where the one before it ends
        recorded("gloo:all_reduce", 3, 15, 21),
        recorded("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 7, 10, 18, cuda),
        recorded("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 8, 10, 14, cuda),
        recorded("Memcpy DtoH (Device -> Pinned)", 7, 18, 20, cuda),
    ]
    nothing = dict.fromkeys(KERNEL_KINDS, 0.0)
    for order in (events, events[::-1]):
        assert seconds_by_kind(order, True, 2) == nothing | {"gemm": 4.0, "collectives": 2.0, "host_copies": 1.0}
        assert seconds_by_kind(order, False, 2) == nothing | {"gemm": 8.5, "elementwise": 1.5, "collectives": 3.0}


def test_stacks_are_those_of_the_ranks_asked_for(ranks):
    for rank, steps in ((1, ["3", "4", "21", "22"]), (0, ["8", "9"])):
        text = (ranks[0] / "looked" / "logs" / f"stacks-rank{rank}.txt").read_text()
        told = re.findall(rf"rank {rank}: [\d.]+ s after step (\d+) began", text)
        assert sorted(told, key=int) == steps
        assert "train/loop.py" in text


def test_a_request_that_cannot_be_met_is_said_and_ends_nothing(ranks):
    root, results = ranks
    said = results["looked"][0]["said"]
    for what in (
        "inspect: memory snapshots are of GPUs; this run has none",
        """profile is ignored: '{"rank": [0]}' is not an object of "steps", "ranks", "what\"""",
        "inspect.ranks [7]: this run has ranks 0 to 1",
        "inspect.steps is 1.5; give a number of steps",
        "profile is ignored: Expecting value",
    ):
        assert what in said
    assert results["blocked"][0]["ending"] == "finished"
    assert "rank 0: parts of the profile failed" in results["blocked"][0]["said"]
    assert "step 3: no profile begins while one is in progress" in results["blocked"][0]["said"]
    assert results["no such rank"][1]["error"] == "inspect.ranks [2]: this run has ranks 0 to 1"


def test_a_look_changes_no_number_and_none_costs_nothing(ranks):
    root, results = ranks
    assert results["plain"][0].get("ending") == "finished", results["plain"]
    assert runs.metrics(root, "looked") == runs.metrics(root, "plain")
    assert not (root / "plain" / "inspect").exists()


def test_what_a_look_has_seen_survives_the_error_that_ends_the_run(ranks):
    root, results = ranks
    assert results["failed"][0]["error"] == "planted"
    assert steps_in(root / "failed" / "inspect" / "step-00000003-rank0.trace.json") == {"step 3", "step 4", "step 5"}


def test_memory_of_a_gpu_becomes_a_page(tmp_path, monkeypatch):
    calls = []
    trace = [{"action": "alloc", "addr": 1, "size": 10, "stream": 0, "frames": []}]
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **keys: calls.append(keys))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [], "device_traces": [trace]})
    look = profiler._Look(5, ProfilerConfig(what=["memory"]), torch.device("cuda"), True)
    look.start()
    look.mark(5)
    look.write(tmp_path, "name")
    assert "MemoryViz" in (tmp_path / "name.memory.html").read_text()
    assert [keys.get("enabled", "all") for keys in calls] == ["all", None]  # it is switched off again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "inspect.steps is 0"),
        ({"at": [-1]}, r"inspect.at is \[-1\]"),
        ({"ranks": 0}, "inspect.ranks is 0"),
        ({"what": []}, r"inspect.what is \[\]; give a list of some of trace, memory, stacks"),
        ({"what": ["traces"]}, "inspect.what is"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ProfilerConfig(**values)
