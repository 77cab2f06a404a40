"""The order of files where several workers share them (`make test`): long ones first, none of them at the end. And a
check that no file changes the environment for those that its worker runs later.

Workers run at the same time. A test that looks at the machine's processes therefore looks for what only it can have
started, and a bound in seconds is of the product, with room for a machine that is busy with the other worker.
"""

import os
from collections.abc import Generator

import pytest

from tests import selection

# Those that took 50 s and more on two cores.
LONG = (
    "test_layouts", "test_frozen", "test_faults", "test_ema", "test_absent", "test_zero", "test_sync",
    "test_source_table", "test_replay", "test_bad_files", "test_full_disk", "test_fake_cuda", "test_wandb",
    "test_quickstart", "test_compiled",
)  # fmt: skip


BEGIN = pytest.StashKey[float]()
# What libraries set for the whole process when they are first used.
OF_LIBRARIES = {
    "LD_LIBRARY_PATH", "PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",
    "WANDB_SILENT",
}  # fmt: skip
environment: dict[str, str] = {}  # before the first test of a file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process and cost little")
    parser.addoption(
        "--long", action="store_true", help="only tests of which `make test` takes a part, and all of them"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("long"):
        os.environ[selection.LONG] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long = config.getoption("long")
    left_out = {item for item in items if (not selection.is_long(item) if long else item.get_closest_marker("long"))}
    if config.getoption("fast"):
        left_out |= {item for item in items if not selection.is_fast(item)}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[BEGIN] = selection.cost()
    if not environment:
        environment.update(os.environ)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Fails a test of `make test-fast` that costs too much for it, and the last one of a file that leaves variables of
    the environment changed: whatever the worker runs next would inherit them."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        after, before = dict(os.environ), dict(environment)
        environment.clear()
        changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} - OF_LIBRARIES
        if changed:
            pytest.fail(f"{item.path.name} leaves the environment changed: {', '.join(sorted(changed))}", pytrace=False)
    spent = selection.cost() - item.stash[BEGIN]
    if item.config.getoption("fast") and spent > selection.LIMIT and not item.get_closest_marker("fast"):
        pytest.fail(f"{spent:.1f} s of processor time: mark it @pytest.mark.slow, or make it cheaper", pytrace=False)
    return result
