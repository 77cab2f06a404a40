"""What the README, the docs and `experiment=` offer for many GPUs is complete, and passes the checks of a start.

The machines are fake ones of the right size. Whether the memory of a GPU is enough is planned; what is planned is
compared with whole simulated runs in tests/train/plan/test_memory.py.
"""

import multiprocessing
import re
import shlex
from pathlib import Path

import pytest

from core.errors import RunError
from data.clip import Bucket
from launch.compose import Launch, compose_launch
from tests.gpu.fakecuda import fake_cuda
from tests.shards import make_dataset
from train.dataloader import largest_workload, open_data
from train.parallel.mesh import make_layout
from train.parallel.traffic import layout_rows
from train.plan.plan import GIB, plan_run
from train.plan.question import Question, clip_of, find_sheet

ROOT = Path(__file__).parents[2]
GPU_GIB = 74  # of 80 GB, with a gigabyte of CUDA's own
CLIPS = {"mova_360p": (49, 44, 80), "mova_720p": (49, 90, 160)}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("mova_*.yaml"))
PHASES = {
    "mova_phase1_360p": 128,
    "mova_phase2_360p": 128,
    "mova_phase3_720p": 64,
}  # clips of a step, as the paper says
LAYOUTS = {"mova_16": 16, "mova_64": 64, "mova_1024": 1024}


def commands(text: str) -> list[str]:
    """The launches that a page shows, whole."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if "mova launch " in line and "..." not in line]


def large() -> dict[str, str]:
    """Shown launches of a large model, and one for each phase and layout. Those from given weights have a test of their
    own (tests/tools/test_pretrain_page.py)."""
    shown = [command for page in PAGES for command in commands(page.read_text()) if "experiment=mova_" in command]
    shown = [command for command in shown if "init." not in command]
    asked = [("mova_360p_8", "", 8), *((name, "", 1024) for name in PHASES)]
    asked += [
        (name, f"parallel={layout}", gpus)
        for name in ("mova_phase1_360p", "mova_phase3_720p")  # the second one is laid out as the first
        for layout, gpus in LAYOUTS.items()
    ]
    made = [
        f"mova launch cluster=slurm cluster.nodes={gpus // 8} cluster.gpus=8 run.id=x experiment={name} {layout} "
        "data.path=here"
        for name, layout, gpus in asked
    ]
    return {re.sub(r".*mova launch ", "", command): command for command in shown + made}


LARGE = large()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for name, grid in CLIPS.items():
        bucket = Bucket(*grid, audio_steps=403, fps=24.0, has_video=True, has_audio=True)
        make_dataset(root / name, [(bucket, 1)], dim=4096)
    return root


def composed(command: str, place: Path) -> Launch:
    """The launch, on clips of the model's size."""
    arguments = shlex.split(re.sub(r"\s#.*", "", command).partition("mova launch ")[2])
    grid = "mova_720p" if "720p" in command else "mova_360p"
    data = [f"{key}={place / grid}" for key in ("data.path", "data.valid_path") if f"{key}=" in command]
    arguments = [argument for argument in arguments if not argument.startswith(("data.path=", "data.valid_path="))]
    return compose_launch([*arguments, *data, f"run.root={place / 'runs'}"])


def start(launch: Launch) -> dict[str, str]:
    """The table that the run would print, on a fake machine of its size. In a process of its own."""
    config = launch.train
    with fake_cuda(launch.cluster.world) as device:
        layout = make_layout(config.parallel, device)
        workload = largest_workload(open_data(config.data, config.model.video.text_dim), config.data, layout)
        return dict(layout_rows(config.model, config.parallel, layout, workload))


@pytest.mark.parametrize("name", LARGE)
def test_an_example_for_many_gpus_is_complete_and_starts(place, name):
    launch = composed(LARGE[name], place)
    config, world = launch.train, launch.cluster.world
    parallel = config.parallel
    assert launch.cluster.on_gpus and world > 1
    assert parallel.compute_dtype == "bfloat16" and parallel.recompute != "none" and parallel.ulysses > 1
    groups = world // (parallel.ulysses * parallel.ring)
    assert config.data.micro_batch == 1 and config.data.batch_size % groups == 0  # no group waits for others
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        table = pool.apply(start, (launch,))
    assert table["ranks"].startswith(f"{world} on cuda, fsdp2, compute in bfloat16")
    assert planned_peak(launch) < GPU_GIB


def planned_peak(launch: Launch) -> float:
    """GiB of a GPU that `mova plan` counts for the launch."""
    cluster, overrides = launch.cluster, launch.overrides
    clip, _ = clip_of(launch.train, overrides)
    plan = plan_run(Question(launch.train, cluster.world, 8, find_sheet("h100"), clip))
    return sum(plan.memory.values()) / GIB


def test_the_documents_show_a_large_launch():
    assert {"mova_360p_8", *PHASES} == set(PRESETS)
    assert any("mova_" in command for page in PAGES for command in commands(page.read_text()))


@pytest.mark.parametrize("given", ["parallel.compute_dtype=float32", "parallel.compute_dtype=float64"])
def test_float32_with_shared_tokens_is_refused_before_anything_starts(place, given):
    name = next(command for command in LARGE.values() if "mova_360p_8 " in command)
    with pytest.raises(
        RunError, match=f"^{given} with .* = 8 on GPUs: .* set parallel.compute_dtype=bfloat16"
    ) as caught:
        composed(f"{name} {given}", place)
    assert "\n" not in str(caught.value)
    composed(f"{name} {given} parallel.ulysses=1", place)
