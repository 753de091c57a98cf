"""Weights of sharded trainers in the real vLLM: its log-probs are the trainer's after every transfer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import TESTS, run_ranks

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from small_models import write_model

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("model", "parallel", "vllm"),
    [
        pytest.param("tied", TP2, {"weight_transfer": "shared_memory"}, id="dense, TP2, shared memory"),
        pytest.param(
            "tied", TP2 | PP2, {"weight_transfer": "gloo", "tensor_parallel_size": 2}, id="dense, TP2 PP2, gloo to TP2"
        ),
        pytest.param("qwen3_moe", TP2 | SP, {"weight_transfer": "gloo"}, id="mixture, TP2, gloo"),
        pytest.param("qwen3_moe", TP2 | SP | PP2, {"weight_transfer": "disk"}, id="mixture, TP2 PP2, disk"),
    ],
)
def test_log_probs_after_every_transfer(
    tmp_path: Path, model: str, parallel: dict[str, Any], vllm: dict[str, Any]
) -> None:
    folder = write_model(tmp_path / "model", model)
    recipe = {
        "name": "run",
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"task": "arithmetic", "max_prompt_tokens": 128},
        "parallel": parallel,
        "rollout": {
            "engine": "vllm",
            "max_response_tokens": 64,
            "max_batch_size": 16,
            "verify_weights": True,
            "vllm": vllm,
        },
        "logging": {"run_dir": str(tmp_path)},
    }
    world = 2 * parallel.get("pipeline_model_parallel_size", 1)
    out = tmp_path / "results.json"
    run_ranks(TESTS / "ranks" / "vllm_transfer.py", world, [json.dumps(recipe), out], timeout=240)
    first, second = json.loads(out.read_text())
    assert first["versions"] == [1] * 5
    assert second["versions"] == [2] * 5
    assert first["tokens"] == 100
    assert first["difference"] < 1e-4
    assert second["difference"] < 1e-4
    assert first["log_probs"] != second["log_probs"]  # the same prompt and seed, other weights
    assert not list((tmp_path / "run" / "rollout").glob("weights-*"))
