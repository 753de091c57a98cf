"""Servers that `eapo-megatron serve` runs: shared by replicas, in one queue, met by one trainer after another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch import TESTS, free_port, run_ranks

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from small_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("separate")


def recipe_of(folder: Path, **vllm: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "cluster": {"device": "cpu"},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"task": "arithmetic", "max_prompt_tokens": 128},
        "rollout": {
            "engine": "vllm",
            "max_response_tokens": 64,
            "max_batch_size": 2,
            "verify_weights": True,
            "vllm": vllm,
        },
        "logging": {"run_dir": str(folder)},
    }


@pytest.fixture(scope="module")
def addresses(folder: Path) -> Iterator[list[str]]:
    write_model(folder / "model", "untied")
    recipe = folder / "served.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(folder, weight_transfer="gloo")))
    ports = [free_port(), free_port()]
    command = [sys.executable, "-m", "eapo_megatron.cli", "serve", str(recipe), "--host", "127.0.0.1", "--port"]
    servers = [
        subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for port in ports
    ]
    yield [f"127.0.0.1:{port}" for port in ports]
    family = [child for server in servers for child in psutil.Process(server.pid).children(recursive=True)]
    assert len(family) >= 6
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait(30)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.parametrize(("ranks", "used"), [(2, [0]), (1, [0, 1])], ids=["shared by replicas", "in one queue"])
def test_trainers_meet_separate_servers(
    folder: Path, tmp_path: Path, addresses: list[str], ranks: int, used: list[int]
) -> None:
    """The second trainer meets a server that has served the first."""
    recipe = recipe_of(folder, placement="separate", addresses=[addresses[index] for index in used])
    out = tmp_path / "results.json"
    run_ranks(TESTS / "ranks" / "vllm_transfer.py", ranks, [json.dumps(recipe), out], timeout=200, fresh=True)
    for version, result in enumerate(json.loads(out.read_text()), start=1):
        assert result["versions"] == [version] * 5
        assert result["difference"] < 1e-4
