"""`mova bench matmul`, `attention` and `exchange`: right rates from known times, and a sheet that the reader takes."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch
import yaml

from core.errors import UserError
from tools.bench import attention, exchange, matmul, rates
from tools.mova import benchmarks, load
from train.config import compose_train
from train.parallel.flops import block_flops
from train.plan.gpu import read_sheet

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 21])
def test_the_spread_of_rounds(count):
    values = list(np.random.default_rng(count).uniform(10, 20, count))
    low, middle, high = rates.spread(values)
    assert low == pytest.approx(np.percentile(values, 10), rel=1e-3)
    assert middle == pytest.approx(statistics.median(values), rel=1e-3) and high == pytest.approx(max(values), rel=1e-3)
    low, middle, high = rates.spread(values, times=True)
    assert low == pytest.approx(np.percentile(values, 90), rel=1e-3) and high == pytest.approx(min(values), rel=1e-3)


def test_a_time_is_that_of_one_call(monkeypatch):
    """By a clock that only the action moves on, by 3 ms."""
    now = [0.0]
    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])

    def action():
        now[0] += 0.003

    assert rates.time_of(action, CPU, least=0.01) == pytest.approx(0.003)


def test_the_rate_of_products_is_that_of_the_time_they_take(monkeypatch):
    monkeypatch.setattr(rates, "time_of", lambda action, device, least=0: (action(), 1e-3)[1])
    found = matmul.measure([[4, 8, 16], [32, 64, 128]], rounds=2)
    assert found["[4, 8, 16]"] == pytest.approx([2 * 4 * 8 * 16 / 1e-3 / 1e12] * 2)
    assert found["gemm"] == pytest.approx([(2 * 4 * 8 * 16 + 2 * 32 * 64 * 128) / 2e-3 / 1e12] * 2)
    # A sum reads two and writes one, a product with a number and a copy read one and write one.
    assert found["memory"] == pytest.approx([7 * matmul.TENSORS * 4 * 16 * 4 / 1e-3 / 1e9] * 2)


def test_the_products_are_those_of_a_linear_layer(monkeypatch):
    """Their results against autograd's."""
    results = []
    monkeypatch.setattr(rates, "time_of", lambda action, device, least=0: (results.append(action()), 1.0)[1])
    layer = matmul._Layer(5, 7, 3, CPU)
    layer.seconds()
    x, weight = layer._x.clone().requires_grad_(), layer._weight.clone().requires_grad_()
    out = torch.nn.functional.linear(x, weight)
    wanted = [out, *torch.autograd.grad(out, (x, weight), layer._grad)]
    for found, right in zip(results, wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_the_rate_of_attention_is_that_of_the_time_it_takes(monkeypatch):
    monkeypatch.setattr(rates, "time_of", lambda action, device, least=0: (action(), 1e-3)[1])
    found = attention.measure([16, 32], 2, 8, rounds=1)
    one = 4 * 16 * 16 * 2 * 8  # two products of 2 FLOPs for each of 16 x 16 pairs, 2 heads of width 8
    assert found["forward 16"] == pytest.approx([one / 1e-3 / 1e12])
    assert found["backward 32"] == pytest.approx([2.5 * 4 * one / 1e-3 / 1e12])
    assert found["forward"] == pytest.approx([5 * one / 2e-3 / 1e12])
    assert found["backward"] == pytest.approx([2.5 * 5 * one / 2e-3 / 1e12])


def test_flops_are_those_that_a_step_is_counted_with():
    video = compose_train(["model=small", "run.id=x", "data.path=none"])[0].model.video
    _, wanted = block_flops(video, 832, 832, 0)
    assert attention.flops(832, video.num_heads, video.dim // video.num_heads, "forward") == wanted


def test_the_shapes_are_those_of_the_models():
    for name, shapes, rows, heads, of in (
        ("mova_360p", matmul.GPU_SHAPES, 49 * 22 * 40 // 8, attention.GPU_HEADS, 8),
        ("small", matmul.CPU_SHAPES, 4 * 13 * 8 * 8 // 4, attention.CPU_HEADS, 1),
    ):
        video = compose_train([f"model={name}", "run.id=x", "data.path=none"])[0].model.video
        wide, narrow = video.ffn_dim, video.dim
        assert shapes[:3] == [[rows, narrow, narrow], [rows, narrow, wide], [rows, wide, narrow]]
        assert heads == video.num_heads // of


def test_bytes_that_leave_a_member():
    """As the collectives are: of four members each keeps a quarter, and an all-reduce scatters and gathers."""
    for kind, wanted in {"all-gather": 75, "reduce-scatter": 75, "all-to-all": 75, "all-reduce": 150}.items():
        assert exchange.sent(kind, 100, 4) == wanted


def test_rates_of_two_nodes_of_two():
    """1 MiB in known seconds: of the whole that each gathers, the other node's half enters a node."""
    size = exchange.MIB
    spent = {f"{kind} 1": 1e-3 for kind in exchange.KINDS} | {"latency": 5e-6}
    spent |= {"network all-gather": 2e-3, "network reduce-scatter": 6e-3}
    found = exchange._as_rates(spent, [1], 2, 4)
    assert found["node"] == pytest.approx(size / 2 / 1e-3 / 1e9) and found["latency"] == pytest.approx(5)
    assert found["all-reduce 1"] == pytest.approx(size / 1e-3 / 1e9)
    assert found["network"] == pytest.approx(2 * size / 2 / 8e-3 / 1e9)


def test_merging_keeps_what_is_there(tmp_path, capsys):
    path = tmp_path / "new" / "sheet.yaml"
    rates.merge_sheet(str(path), {"title": "mine", "host_gib": 4.0}, "one", {"host_gib": "assumed: because"})
    assert "gemm_tflops" in capsys.readouterr().out
    rates.merge_sheet(str(path), {"title": "ours"}, "two", {})
    sheet = yaml.safe_load(path.read_text())
    assert (sheet["title"], sheet["host_gib"]) == ("ours", 4.0)
    assert sheet["sources"]["title"].endswith(": two") and sheet["sources"]["host_gib"] == "assumed: because"
    path.write_text("colour: red\n")
    with pytest.raises(UserError, match="there is no key colour"):
        rates.merge_sheet(str(path), {"title": "ours"}, "two", {})
    assert path.read_text() == "colour: red\n"


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that are started
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_three_programs_write_a_sheet_together(tmp_path, on_the_cpu, capsys):
    path = tmp_path / "my-machine.yaml"
    path.write_text("title: mine\nfloat8_tflops: 7.0\n")
    for name, *arguments in (
        ("matmul", "shapes=[[64,32,48]]", "processes=2"),
        ("attention", "lengths=[32,64]", "heads=2", "width=16"),
        ("exchange", "mebibytes=[1]"),
    ):
        assert load(f"tools.bench.{benchmarks()[name]}").run([*arguments, "rounds=2", f"sheet={path}"]) == 0
        assert f"written to {path}" in capsys.readouterr().out
    sheet = read_sheet(path)
    assert sheet.float8_tflops == 7.0 and sheet.title.startswith("CPU ") and sheet.device == "cpu"
    rates = dataclasses.asdict(sheet.at("low"))
    assert rates.pop("float8_gemm_tflops") is None  # which none of the three measures
    assert all(value > 0 for value in rates.values())
    assert sheet.peak_tflops == sheet.gemm_tflops[2] and sheet.sources["network_gb_s"].startswith("assumed: ")
    measured = [key for key in sheet.sources if "mova bench exchange" in sheet.sources[key]]
    assert measured == ["node_gpus", "node_gb_s", "latency_us"]


def test_one_process_exchanges_nothing(on_the_cpu):
    with pytest.raises(UserError, match="needs two processes"):
        exchange.PROGRAM.act(["processes=1"])
