"""The sheets of conf/gpu: complete, in order, with sources, and of the same peaks as MFU is counted with."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from omegaconf import MISSING

from core.compose import ConfigError, Schema, compose
from core.errors import UserError
from train.monitor.throughput import peak_of
from train.plan.gpu import MEASURED_BY, GpuConfig, Rates, read_sheet

FOLDER = Path(__file__).parents[3] / "conf" / "gpu"
SHEETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
KEYS = [one.name for one in dataclasses.fields(GpuConfig) if one.name not in ("sources", "device")]


@dataclasses.dataclass
class Asked:
    gpu: GpuConfig = MISSING


def composed(*given: str) -> GpuConfig:
    config = compose(Schema("sheet_of_a_test", Asked, (("gpu", None),)), [*given]).typed()
    assert isinstance(config.gpu, GpuConfig)
    return config.gpu


def test_the_kinds_that_a_user_can_name():
    assert {"a100", "h100", "h100_nvl", "h200", "b200", "gb200", "b300"} <= set(SHEETS)


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet(name):
    sheet = composed(f"gpu={name}")
    assert sheet == read_sheet(FOLDER / f"{name}.yaml"), "a file of one's own is read as Hydra reads it"
    low, middle, high = (dataclasses.asdict(sheet.at(rate)) for rate in ("low", "middle", "high"))
    assert (sheet.float8_gemm_tflops is None) == (sheet.float8_tflops is None)
    for rate in Rates.__dataclass_fields__:
        rising = [low[rate], middle[rate], high[rate]]
        if rate == "float8_gemm_tflops" and sheet.float8_tflops is None:
            continue
        assert len(set(rising)) == 3 and rising == sorted(rising, reverse=rate.endswith("_us")), (name, rate)
    assert list(sheet.sources) == KEYS, "one source for every key, in the order of the keys"
    for key, source in sheet.sources.items():
        assert "https://" in source or "assumed: " in source or source == "torch.cuda.get_device_name", (key, source)
    assert peak_of(sheet.title) == 1e12 * sheet.peak_tflops, "MFU is counted with another peak"
    assert max(sheet.gemm_tflops + sheet.attention_tflops + sheet.attention_backward_tflops) < sheet.peak_tflops
    assert sheet.float8_tflops is None or abs(sheet.float8_tflops / sheet.peak_tflops - 2) < 0.01


def test_the_rates_of_an_h100_are_those_of_the_published_measurements():
    """https://github.com/meta-pytorch/tritonbench pulls 1254 and 1256; 85 % of 3.35 TB/s and of 8 x 400 Gb/s."""
    sheet = composed("gpu=h100")
    assert sheet.gemm_tflops == [620, 680, 740] and sheet.float8_gemm_tflops == [820, 900, 980]
    assert sheet.attention_tflops == [580, 620, 660] and sheet.attention_backward_tflops == [500, 550, 590]
    rates = sheet.at("middle")
    assert rates.memory_gb_s == pytest.approx(0.85 * 3350, rel=2e-3)
    assert rates.network_gb_s == pytest.approx(0.85 * 8 * 400 / 8) and rates.node_gb_s == 330
    assert 3.5 <= rates.launch_us <= 6


def test_what_a_rack_has_it_has_72_times():
    """A node is what the fast links connect: network and host memory are those of all its hosts."""
    for name in ("gb200", "gb300"):
        rack = composed(f"gpu={name}")
        assert rack.node_gpus == 72
        assert rack.host_gib / 72 == pytest.approx(36 * 480e9 / 2**30 / 72, rel=1e-3)
    assert composed("gpu=gb200").network_gb_s[1] / 72 == composed("gpu=h100").network_gb_s[1] / 8


def written(folder: Path, **changes: object) -> Path:
    sheet = yaml.safe_load((FOLDER / "h100.yaml").read_text()) | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in sheet.items() if value != "gone"}))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gemm_tflops": [620, 610, 740]}, "gemm_tflops is [620.0, 610.0, 740.0]; give [low, middle, high]"),
        ({"latency_us": [15, 25, 30]}, "from the longest time to the shortest"),
        ({"gemm_tflops": [620, 740]}, "gemm_tflops is [620.0, 740.0]; give [low, middle, high]"),
        ({"memory_gib": 0}, "memory_gib is 0.0; it must be above 0"),
        ({"memory_gb_s": [1, 2, float("nan")]}, "memory_gb_s[2] is nan"),
        ({"memory_gib": "much"}, "memory_gib"),
        ({"gemm_tflops": "gone"}, "gemm_tflops is missing; mova bench matmul sheet=... measures it"),
        ({"node_gb_s": "gone"}, "node_gb_s is missing; mova bench exchange sheet=... measures it"),
        ({"gemm_tflop": 1}, "there is no key gemm_tflop; did you mean gemm_tflops"),
        ({"sources": {"gem_tflops": "x"}}, "sources.gem_tflops: there is no key gem_tflops; did you mean gemm_tflops"),
    ],
)
def test_a_wrong_sheet_is_one_line(tmp_path, changes, said):
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read_sheet(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"- 1\n- 2\n", b"a: [1\n", b"\xff\xfe\x00", b"text", b""])
def test_what_is_no_sheet_is_one_line(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_sheet(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_rate_in_wrong_order_on_the_command_line():
    with pytest.raises(ConfigError, match="gemm_tflops is .*; give .low, middle, high"):
        composed("gpu=h100", "gpu.gemm_tflops=[3,2,1]")


def test_every_key_without_a_default_is_measured_by_a_program():
    mandatory = {one.name for one in dataclasses.fields(GpuConfig) if one.default == MISSING}
    assert mandatory == set(MEASURED_BY)
