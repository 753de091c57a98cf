"""Fixtures shared by the tests: tiny models on disk, and launches that measure every parallel layout once a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_megatron.megatron_compat.importing import import_megatron

# Triton's interpreter runs kernels on CPU tensors. Triton reads this as it is imported, which Megatron does too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Tensors of tests are small: threads would spend their time waiting for each other, here and in what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# NeMo's environment has no hypothesis: nothing that runs there is a property test.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("same examples", max_examples=50, deadline=None, derandomize=True)
    settings.register_profile("fresh examples", max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile("same examples")

SCRIPT = Path(__file__).parent / "ranks" / "every_layout.py"


def pytest_collection() -> None:
    """Test modules would import Megatron too, in twice the time. The process that hands out tests collects none."""
    import_megatron()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Marks the tests that use one of the launches below, and those whose module imports what starts ranks.

    Tests that share launches stay in one process (xdist's group).
    """
    for item in items:
        if any(name == "measured" or name.startswith("launch_of_") for name in item.fixturenames):
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("every layout"))
        elif any(map(_starts_ranks, vars(item.module).values())):
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def _starts_ranks(imported: Any) -> bool:
    return getattr(imported, "__module__", None) in ("launch", "command_line", "processes")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Hugging Face folder for each of the tiny models."""
    from hf_reference import write_models

    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def _launch(world_size: int, model_folders: Path, out: Path) -> Path:
    from launch import run_cases
    from layouts import LAYOUTS, LONG_RESPONSES

    names = [name for name, layout in LAYOUTS.items() if layout.world_size == world_size]
    run_cases(SCRIPT, world_size, [model_folders], out, names + [LONG_RESPONSES] * (world_size == 1))
    return out


@pytest.fixture(scope="session")
def launch_of_1(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _launch(1, model_folders, tmp_path_factory.mktemp("ranks_1"))


@pytest.fixture(scope="session")
def launch_of_2(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _launch(2, model_folders, tmp_path_factory.mktemp("ranks_2"))


@pytest.fixture(scope="session")
def launch_of_4(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _launch(4, model_folders, tmp_path_factory.mktemp("ranks_4"))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The runtime of this process alone."""
    from one_rank import one_rank

    with one_rank(tmp_path_factory.mktemp("store")) as alone:
        yield alone


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """What came out of a layout, by its name; its launch runs when first asked for."""
    from launch import result_of
    from layouts import LAYOUTS

    def results_of(name: str) -> dict[str, Any]:
        return result_of(request.getfixturevalue(f"launch_of_{LAYOUTS[name].world_size}"), name)

    return results_of
