"""Credit measured on a policy: exact against sums written out, sampled against exact, and on a real run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from command_line import run_command, train_ranks
from eapo_megatron.config import RecipeError
from eapo_megatron.data import arithmetic_examples, arithmetic_tokenizer
from eapo_megatron.evaluation.measured_credit import all_states, described, measurable, sampled_states
from eapo_megatron.report.report import CREDIT_FILE, PAGE_FILE

STOP, LENGTH = 2, 3


def policy(prefixes: Tensor) -> Tensor:
    """Three tokens, whose probabilities depend on the tokens before."""
    before = (prefixes * torch.arange(1, prefixes.shape[1] + 1)).sum(dim=-1, keepdim=True)
    return torch.cos(before + 2.0 * torch.arange(3)).double().log_softmax(dim=-1)


def probs_after(prefix: list[int]) -> list[float]:
    return policy(torch.tensor([prefix], dtype=torch.int64).view(1, len(prefix)))[0].exp().tolist()


def is_right(response: list[int]) -> bool:
    return sum(response) % 2 == 0


def value_of(prefix: list[int]) -> float:
    """The probability of a correct response from a prefix on, by recursion."""
    if len(prefix) == LENGTH or (prefix and prefix[-1] == STOP):
        return float(is_right(prefix))
    return sum(p * value_of([*prefix, token]) for token, p in enumerate(probs_after(prefix)))


def information(probs: list[float], success: list[float]) -> float:
    """sum over (token, reward) of p(v, r) log (p(v, r) / (p(v) p(r)))."""
    right = sum(p * s for p, s in zip(probs, success, strict=True))
    pairs = [(p, p * s, right) for p, s in zip(probs, success, strict=True)]
    pairs += [(p, p * (1 - s), 1 - right) for p, s in zip(probs, success, strict=True)]
    return sum(pair * math.log(pair / (p * r)) for p, pair, r in pairs if pair > 0)


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def test_exact_states_have_their_probability_and_positions_the_mean_over_states() -> None:
    states = all_states(policy, lambda all_: list(map(is_right, all_)), max_tokens=LENGTH, stop_token_ids=[STOP])
    found = described(states)
    assert [line["position"] for line in found["positions"]] == [0, 1, 2]
    assert len(found["states"]["credit"]) == 1 + 2 + 4
    for line in found["positions"]:
        prefixes = [list(prefix) for prefix in product([0, 1], repeat=line["position"])]
        weights = [math.prod(probs_after(p[:i])[p[i]] for i in range(len(p))) for p in prefixes]
        success = [[value_of([*prefix, token]) for token in range(3)] for prefix in prefixes]
        assert line["reached"] == pytest.approx(sum(weights))
        values = {
            "entropy": [entropy(probs_after(prefix)) for prefix in prefixes],
            "credit": [information(probs_after(p), s) for p, s in zip(prefixes, success, strict=True)],
            "reward_entropy": [entropy([value_of(p), 1 - value_of(p)]) for p in prefixes],
        }
        for name, of_prefixes in values.items():
            expected = sum(w * value for w, value in zip(weights, of_prefixes, strict=True)) / sum(weights)
            assert line[name] == pytest.approx(expected, abs=1e-12), name
        assert line["hindsight"] == pytest.approx(line["credit"], abs=1e-12)
        assert line["error"] == 0
    assert found["states"]["weight"] == sorted(found["states"]["weight"], reverse=True)


def test_sampled_continuations_come_to_the_exact_credit_within_their_error() -> None:
    generator = torch.Generator().manual_seed(5)
    asked: list[Tensor] = []

    def wins(prefix: list[int], trials: Tensor) -> Tensor:
        asked.append(trials)
        success = torch.tensor([value_of([*prefix, token]) for token in range(3)], dtype=torch.float64)
        return torch.binomial(trials.double(), success, generator=generator).long()

    response = [0, 1, 1]
    found = [sampled_states(response, policy, wins, continuations=200) for _ in range(200)]
    assert found[0].position.tolist() == [0, 1, 2]
    for length, trials in enumerate(asked[:3]):
        expected = [max(2, round(200 * p)) for p in probs_after(response[:length])]
        assert trials.tolist() == expected
    credits = torch.stack([states.credit.credit for states in found])
    errors = torch.stack([states.error for states in found])
    for length in range(3):
        prefix = response[:length]
        exact = information(probs_after(prefix), [value_of([*prefix, token]) for token in range(3)])
        spread = float(credits[:, length].std())
        assert float(credits[:, length].mean()) == pytest.approx(exact, abs=4 * spread / math.sqrt(200) + 1e-12)
        assert float(errors[:, length].mean()) == pytest.approx(spread, rel=0.2, abs=1e-12)


# --- A run of the built-in task with responses of at most two tokens

RECIPE = """
seed: 3
cluster: {gpus_per_node: 1, device: cpu, timeout_minutes: 1}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 28, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 16, held_out_size: 3}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 2, temperature: 0.7}
reward: {function: "digits:some", num_workers: 1}
train: {steps: 1, num_prompts_per_step: 4, mini_batch_prompts: 4, micro_batch_size: 4}
"""
REWARD = """
def some(response, answer):
    return 1.0 if set(response) & set("12345") else -1.0
"""
# The run's credit exactly, and by sampling as where there are too many responses.
BOTH = """
import json, sys
from pathlib import Path
from eapo_megatron.evaluation import measured_credit
found = []
for measured_credit.MOST_RESPONSES in (10**6, 1):
    found.append(measured_credit.measure(measured_credit.measurable(Path(sys.argv[1]))))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credit")
    (folder / "digits.py").write_text(REWARD)
    (folder / "run.yaml").write_text(RECIPE + f"logging: {{run_dir: {folder}, tensorboard: false}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        train_ranks(folder / "run.yaml")
    return folder / "run"


def environment(run: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(run.parent), os.environ.get("PYTHONPATH", "")]), "COLUMNS": "200"}


def by_transformers(run: Path, folder: Path) -> list[dict[str, float]]:
    """Entropy and credit of both positions, mean over prompts, from the exported model in float64."""
    from transformers import AutoModelForCausalLM

    from eapo_megatron.weights.convert import to_hf

    to_hf(run, folder, max_shard_bytes=2**30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), arithmetic_tokenizer()
    lines = [{"reached": 0.0, "entropy": 0.0, "credit": 0.0} for _ in range(2)]
    examples = arithmetic_examples("held_out", seed=3, size=3)
    for example in examples:
        prompt = tokenizer.encode(example.prompt)
        with torch.no_grad():
            first = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1).tolist()
            after = model(torch.tensor([[*prompt, token] for token in range(28)])).logits[:, -1] / 0.7
        second = after.softmax(-1).tolist()

        def right(*tokens: int) -> float:
            return float(bool(set(tokenizer.decode(tokens, skip_special_tokens=True)) & set("12345")))

        ends = tokenizer.eos_token_id
        of_second = [[right(token, other) for other in range(28)] for token in range(28)]
        of_first = [
            right(token) if token == ends else sum(p * r for p, r in zip(second[token], of_second[token], strict=True))
            for token in range(28)
        ]
        states = [(0, 1.0, first, of_first)]
        states += [(1, first[token], second[token], of_second[token]) for token in range(28) if token != ends]
        for position, weight, probs, success in states:
            lines[position]["reached"] += weight / 3
            lines[position]["entropy"] += weight / 3 * entropy(probs)
            lines[position]["credit"] += weight / 3 * information(probs, success)
    return [{**line, **{name: line[name] / line["reached"] for name in ("entropy", "credit")}} for line in lines]


@pytest.mark.slow
def test_the_credit_of_a_run_is_that_of_its_exported_model(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH, str(run)],
        env=os.environ | environment(run),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    exact, sampled = json.loads(done.stdout.splitlines()[-1])
    assert (exact["exact"], sampled["exact"], exact["prompts"], sampled["prompts"]) == (True, False, 3, 3)
    for line, expected in zip(exact["positions"], by_transformers(run, tmp_path / "hf"), strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
    first, of_sampled = exact["positions"][0], sampled["positions"][0]  # both are of the prompts' own states
    assert of_sampled["entropy"] == pytest.approx(first["entropy"], rel=1e-9)
    assert 0 < of_sampled["error"] < 0.05
    assert abs(of_sampled["credit"] - first["credit"]) < 4 * of_sampled["error"]


@pytest.mark.slow
def test_the_command_writes_figure_table_page_and_numbers(run: Path, tmp_path: Path) -> None:
    done = run_command(["report", run, "--credit", "--out", tmp_path], **environment(run))
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((tmp_path / CREDIT_FILE).read_text())
    assert measured["run"] == "run"
    assert measured["checkpoint"].endswith("step_000001")
    for form in ("png", "svg"):
        assert (tmp_path / "figures" / f"measured_credit.{form}").stat().st_size > 2000
    assert 'id="measured_credit"' in (tmp_path / PAGE_FILE).read_text()
    assert "exact, over all responses, 3 prompts" in done.stdout
    assert f"{measured['positions'][0]['credit']:.4f}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"task": None, "train_path": "a.jsonl"}}, "credit is measured on the built-in task"),
        ({"vocabulary": 300}, "after every token of the vocabulary, up to 256; its policy has 300"),
    ],
)
def test_runs_that_do_not_allow_it_are_one_sentence(run: Path, change: dict[str, Any], sentence: str) -> None:
    path = run / "recipe.json"
    before = path.read_text()
    saved = json.loads(before)
    saved["recipe"]["reward"]["function"] = "math"
    saved["recipe"]["data"] |= change.get("data", {})
    saved["recipe"]["model"]["architecture"]["vocab_size"] = change.get("vocabulary", 28)
    path.write_text(json.dumps(saved))
    try:
        with pytest.raises(RecipeError, match=sentence):
            measurable(run)
    finally:
        path.write_text(before)
