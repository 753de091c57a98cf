"""One rank's policy in the test's own process, and the recipe of engines for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import reference, write_model

from eapo_megatron.config import Parallel, Recipe
from eapo_megatron.policy.policy_model import Policy, open_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.weights.assets import save_run_assets
from eapo_megatron.weights.huggingface import hf_config_of, weight_source
from launch import free_port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A Hugging Face folder and its float64 reference."""
    folder = write_model(tmp_path_factory.mktemp("model"), "tied")
    return folder, reference(folder)


@pytest.fixture(scope="module")
def float64(model: tuple[Path, torch.nn.Module]) -> torch.nn.Module:
    return model[1]


@pytest.fixture(scope="module")
def recipe(model: tuple[Path, torch.nn.Module]) -> Recipe:
    folder, _ = model
    return Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"task": "arithmetic", "max_prompt_tokens": 128},
            "rollout": {
                "engine": "vllm",
                "max_response_tokens": 64,
                "max_batch_size": 16,
                "vllm": {"bucket_mb": 1, "sleep": True},
            },
            "logging": {"run_dir": str(folder.parent)},
        }
    )


@pytest.fixture(scope="module")
def policy(recipe: Recipe) -> Iterator[Policy]:
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ |= {key: str(value) for key, value in world.items()}
    runtime = start_runtime(Parallel(), seed=1)
    hf_config = hf_config_of(recipe.model, source="test")
    save_run_assets(recipe.run_folder, recipe.model, hf_config, None)  # type: ignore[arg-type]
    yield open_policy(hf_config, recipe.model, Parallel(), runtime, weight_source(recipe.model, hf_config, 1))
    stop_runtime()
    for key in world:
        del os.environ[key]
