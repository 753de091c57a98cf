"""Weights of sharded trainers in the real vLLM: its log-probs are the trainer's after every transfer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from launch import TESTS, run_ranks

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from small_models import write_model

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense, TP2, shared memory": ("tied", TP2, {"weight_transfer": "shared_memory"}),
    "mixture, TP2, gloo": ("qwen3_moe", TP2 | SP, {"weight_transfer": "gloo"}),
    "dense, TP2 PP2, gloo to TP2": ("tied", TP2 | PP2, {"weight_transfer": "gloo", "tensor_parallel_size": 2}),
    "mixture, TP2 PP2, disk": ("qwen3_moe", TP2 | SP | PP2, {"weight_transfer": "disk"}),
}


def world_size(name: str) -> int:
    return 2 * CASES[name][1].get("pipeline_model_parallel_size", 1)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a case's ranks wrote; those of equal number are the same processes."""

    @cache
    def launched(ranks: int) -> dict[str, Path]:
        folders = {name: tmp_path_factory.mktemp("transfer") for name in CASES if world_size(name) == ranks}
        pairs = [(json.dumps(recipe_of(name, folder)), folder / "results.json") for name, folder in folders.items()]
        run_ranks(TESTS / "ranks" / "vllm_transfer.py", ranks, list(chain(*pairs)), timeout=480, fresh=True)
        return folders

    return lambda name: launched(world_size(name))[name]


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    model, parallel, vllm = CASES[name]
    return {
        "name": "run",
        "model": {"path": str(write_model(folder / "model", model)), "dtype": "float32"},
        "data": {"task": "arithmetic", "max_prompt_tokens": 128},
        "parallel": parallel,
        "rollout": {
            "engine": "vllm",
            "max_response_tokens": 64,
            "max_batch_size": 16,
            "verify_weights": True,
            "vllm": vllm,
        },
        "logging": {"run_dir": str(folder)},
    }


@pytest.mark.parametrize("name", CASES)
def test_log_probs_after_every_transfer(folder_of: Callable[[str], Path], name: str) -> None:
    folder = folder_of(name)
    first, second = json.loads((folder / "results.json").read_text())
    assert first["versions"] == [1] * 5
    assert second["versions"] == [2] * 5
    assert first["tokens"] == 100
    assert first["difference"] < 1e-4
    assert second["difference"] < 1e-4
    assert first["log_probs"] != second["log_probs"]  # the same prompt and seed, other weights
    assert not list((folder / "run" / "rollout").glob("weights-*"))
