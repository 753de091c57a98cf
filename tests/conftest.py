"""Fixtures shared by the tests: tiny models on disk, and launches that measure every parallel layout once a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton's interpreter runs kernels on CPU tensors. Triton reads this as it is imported, which Megatron does too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# NeMo's environment has no hypothesis: nothing that runs there is a property test.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("same examples", max_examples=50, deadline=None, derandomize=True)
    settings.register_profile("fresh examples", max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile("same examples")

SCRIPT = Path(__file__).parent / "measure_layouts.py"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Hugging Face folder for each of the tiny models."""
    from hf_reference import write_models

    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def _launch(world_size: int, model_folders: Path, out: Path) -> Path:
    from launch import run_ranks

    run_ranks(SCRIPT, world_size, [model_folders, out], timeout=600)
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


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """What came out of a layout, by its name; its launch runs when first asked for."""
    from layouts import LAYOUTS

    def results_of(name: str) -> dict[str, Any]:
        folder = request.getfixturevalue(f"launch_of_{LAYOUTS[name].world_size}")
        return torch.load(folder / f"{name}.pt", weights_only=False)

    return results_of
