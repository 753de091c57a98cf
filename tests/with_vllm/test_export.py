"""A run at TP=2 x PP=2, exported, in vLLM: the tokens of transformers and of the embedded engine (`make test-vllm`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import train
from eapo_megatron.config import Model, Parallel
from eapo_megatron.policy.policy_model import build_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.weights.convert import to_hf
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.load import load_weights
from launch import free_port

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

RECIPE = Path(__file__).parents[2] / "recipes" / "eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"
PROMPTS = [[5, 6, 7, 8], [9], [10, 4, 11, 12, 13, 5, 6]]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(
        RECIPE,
        f"logging.run_dir={folder}",
        "name=exported",
        "cluster.gpus_per_node=4",
        "parallel.pipeline_model_parallel_size=2",
        "train={steps: 2, num_prompts_per_step: 8, mini_batch_prompts: 4, micro_batch_size: 16}",
        "warm_start.steps=20",
        "data.arithmetic.held_out_size=16",
        timeout=600,
    )
    to_hf(folder / "exported", folder / "export", max_shard_bytes=2**18)
    return folder / "export"


def test_greedy_tokens_agree(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1

    source = HuggingFaceWeights(export)
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for key, value in world.items():
        monkeypatch.setenv(key, value)
    runtime = start_runtime(Parallel(), seed=1)
    policy = build_policy(source.hf_config, Model(path=str(export), dtype="float32"), Parallel(), runtime)
    load_weights(policy.modules, policy.hf_config, source)
    engine = MegatronEngine(policy, pad_token_id=0, max_batch_size=8)
    sampling = SamplingParams(top_k=1, max_response_tokens=NEW_TOKENS)
    embedded = engine.generate(PROMPTS, [[0]] * len(PROMPTS), sampling)
    stop_runtime()
    monkeypatch.undo()
    assert embedded.token_lists() == expected

    script = Path(__file__).with_name("greedy.py")
    command = [sys.executable, str(script), str(export), json.dumps(PROMPTS), str(tmp_path / "tokens.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected
