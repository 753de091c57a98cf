"""A policy that is no longer a number: whatever is asked of it first, the run stops with exit code 1 and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from command_line import metrics, train_ranks
from eapo_megatron.data import arithmetic_tokenizer

RECIPE = """
seed: 5
cluster: {device: cpu, timeout_minutes: 1}
model: {dtype: float32, path: PATH}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 8}
reward: {num_workers: 1}
train: {steps: 6, num_prompts_per_step: 4, mini_batch_prompts: 2, micro_batch_size: 8}
logging:
  tensorboard: false
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    config = Qwen2Config(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    arithmetic_tokenizer().save_pretrained(tmp_path / "model")
    text = RECIPE.replace("PATH", str(tmp_path / "model")) + f"  run_dir: {tmp_path / 'runs'}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def poison(folder: Path, value: float) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[3] = value
    model.save_pretrained(folder)


def test_rollouts_whatever_dynamic_sampling_does(recipe: Path, tmp_path: Path) -> None:
    poison(tmp_path / "model", float("nan"))
    said = train_ranks(recipe, "algorithm.dynamic_sampling_rounds=2", expect=1)
    assert "error: step 3: 3 updates in a row had NaN or Inf in the rollouts; there is no checkpoint yet\n" in said
    assert [line["skipped_updates"] for line in metrics(tmp_path / "runs" / "recipe", first_step=1)] == [1, 2]


def test_a_reward_without_a_verdict_is_said_and_ends_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def reward(response, answer):\n    raise KeyError('weight')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = train_ranks(recipe, "reward.function=broken:reward", expect=1)
    sentence = "step 3: 3 updates in a row had no verdict of broken:reward on any response; there is no checkpoint yet"
    assert f"error: {sentence}\n" in said
    assert said.count("no reward for an answer to be compared with") == 3 * said.count(
        " more answers: KeyError: 'weight'"
    )
    assert "no reward for 13 more answers: KeyError: 'weight'" in said


def test_warm_start(recipe: Path, tmp_path: Path) -> None:
    said = train_ranks(recipe, "warm_start={steps: 2, lr: 30, lr_warmup_steps: 0}", expect=1)
    assert "error: the warm start diverged (loss 3." in said
    poison(tmp_path / "model", float("nan"))
    said = train_ranks(recipe, "name=nan", "warm_start.steps=6", expect=1)
    assert "error: warm start: 3 updates in a row had NaN or Inf in a loss or gradient" in said
    assert not (tmp_path / "runs" / ".warm_start").exists()
    assert "Traceback" not in said
