"""Runs that are interrupted go on as if they had not been; a run that cannot go on stops with its checkpoint intact."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from command_line import checkpoints, last_step, metrics, tensors, train_ranks, train_until
from eapo_megatron.records.tokens import recorded_steps
from eapo_megatron.weights.convert import to_hf

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"

ARITHMETIC = """
seed: 3
cluster: {gpus_per_node: 2, device: cpu, timeout_minutes: 1}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
parallel: {tensor_model_parallel_size: 2}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 12}
reward: {function: "lengths:even_length", num_workers: 1}
optimizer: {lr: 1.0e-3, lr_warmup_steps: 3, lr_decay_style: cosine, lr_decay_steps: 20}
train: {steps: 6, num_prompts_per_step: 8, mini_batch_prompts: 4, micro_batch_size: 8}
warm_start: {steps: 3, batch_size: 8, lr: 1.0e-3}
evaluation: {every: 3, benchmarks: [amc], num_generations_per_problem: 4, benchmarks_path: DATA}
checkpoint: {every: 1, keep_last: 3}
algorithm: {dynamic_sampling_rounds: 2}
logging: {record_tokens: 2}
"""

EXPERTS = "num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 12, head_dim: 4, norm_topk_prob: true"

GSM8K_LIKE = [
    {"question": f"Tom has {a} apples and buys {b} more. How many apples has he?", "answer": f"{a}+{b}\n#### {a + b}"}
    for a in range(2, 12)
    for b in range(3, 9)
]


@pytest.fixture(autouse=True)
def easy_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lengths:even_length`, which a random policy meets half of the time, so that every step has a gradient."""
    (tmp_path / "lengths.py").write_text(
        "def even_length(response, answer):\n    return 1.0 if len(response) % 2 == 0 else -1.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def arithmetic(tmp_path: Path) -> Path:
    recipe = tmp_path / "arithmetic.yaml"
    (tmp_path / "amc.jsonl").write_text("".join(f'{{"problem": "{i}+4=", "answer": {i + 4}}}\n' for i in range(5)))
    text = ARITHMETIC.replace("{record_tokens", f"{{run_dir: {tmp_path / 'runs'}, record_tokens")
    recipe.write_text(text.replace("DATA", str(tmp_path)))
    return recipe


def recorded_tokens(run: Path) -> list[list[dict]]:
    """The recorded responses of each step."""
    return [pq.read_table(path).to_pylist() for path in recorded_steps(run).values()]


def test_a_hung_run_ends_and_resumes_bit_for_bit_then_under_another_layout(arithmetic: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    train_ranks(arithmetic, "name=whole")
    whole = metrics(runs / "whole")
    assert [line["step"] for line in whole] == [0, 1, 2, 3, 4, 5, 6]
    assert all(line["grad_norm"] > 0 for line in whole[1:])

    checkpoint = runs / "hung" / "checkpoints" / "step_000002"
    in_seconds = "cluster.timeout_minutes=0.5"
    stopped = {"until": checkpoint.is_dir, "send": signal.SIGSTOP, "to": "last rank"}
    assert train_until(arithmetic, "name=hung", in_seconds, **stopped) != 0
    train_ranks(arithmetic, "name=hung", "train.steps=5")
    resumed = metrics(runs / "hung")
    assert resumed[:5] == whole[:5]
    assert {f"eval/amc/{name}" for name in ("avg@4", "pass@1", "pass@2", "pass@4")} <= resumed[3].keys()
    # A run cut to 5 steps evaluates at its end: the longer one does not at that step.
    assert {name: x for name, x in resumed[5].items() if not name.startswith(("held_out/", "eval/"))} == whole[5]
    ours = tensors(runs / "hung" / "checkpoints" / "step_000005", tmp_path / "hung.pt")
    theirs = tensors(runs / "whole" / "checkpoints" / "step_000005", tmp_path / "whole.pt")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20  # weights and both moments
    assert all(ours[name].equal(theirs[name]) for name in ours)
    # At TP 2 too rank 0 alone records tokens, and the steps that are done again replace what they had recorded.
    assert recorded_tokens(runs / "hung") == recorded_tokens(runs / "whole")[:5]

    train_ranks(arithmetic, "name=hung", "parallel.tensor_model_parallel_size=1", "train.micro_batch_size=3")
    at_other_layout = metrics(runs / "hung", first_step=6)[0]
    for name, value in whole[6].items():
        assert at_other_layout[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    summary = json.loads((runs / "hung" / "summary.json").read_text())
    assert summary["step"] == 6
    assert summary["held_out"]["solve_rate_start"] == whole[0]["held_out/solve_rate"]
    assert summary["held_out"]["solve_rate_end"] == at_other_layout["held_out/solve_rate"]
    kept = sorted(path.name for path in (runs / "hung" / "checkpoints").iterdir())
    assert kept[-3:] == ["step_000004", "step_000005", "step_000006"]


STATEFUL = [
    "algorithm.shaping_policy=current",
    "algorithm.reference_on_host=true",
    "algorithm.loss={name: clip_cov, fraction: 0.1, covariance_low: -9, covariance_high: 9}",
    "algorithm.loss.kl_coef=0.2",
    "algorithm.loss.entropy_target=9",
    "algorithm.loss.entropy_coef_step=0.01",
]


def test_what_methods_keep_survives_a_resume_bit_for_bit(arithmetic: Path, tmp_path: Path) -> None:
    """Clip-Cov's draws, the adaptive entropy bonus, and the reference policy of a warm-started run."""
    whole, moved = (tmp_path / runs / "methods" for runs in ("runs", "moved"))
    train_ranks(arithmetic, "name=methods", "train.steps=4", *STATEFUL)
    lines = metrics(whole)
    assert [line["entropy_bonus/coefficient"] for line in lines[1:]] == pytest.approx([0.0, 0.01, 0.02, 0.03])
    assert all(0 < line["selected_share"] < 0.2 for line in lines[1:])
    assert lines[4]["loss/kl"] > lines[1]["loss/kl"] > 0  # two updates a step: the second one has left the start
    shutil.copytree(whole, moved)
    for step in (3, 4):
        shutil.rmtree(moved / "checkpoints" / f"step_{step:06d}")
    overrides = ["name=methods", "train.steps=4", *STATEFUL, f"logging.run_dir={moved.parent}"]
    assert "resumed from step 2" in train_ranks(arithmetic, *overrides)
    assert not (moved.parent / ".warm_start").exists()
    assert metrics(moved) == lines
    ours = tensors(moved / "checkpoints" / "step_000004", tmp_path / "moved.pt")
    theirs = tensors(whole / "checkpoints" / "step_000004", tmp_path / "whole.pt")
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    shutil.rmtree(moved / "checkpoints" / "step_000004")
    at_cp2 = ["parallel={tensor_model_parallel_size: 1, context_parallel_size: 2}", "train.packing=segments"]
    train_ranks(arithmetic, *overrides, *at_cp2)
    for name, value in lines[4].items():
        assert metrics(moved, first_step=4)[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    shutil.rmtree(moved / "checkpoints" / "step_000004")
    file = next((moved / "reference").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "the reference policy is damaged: " in train_ranks(arithmetic, *overrides, expect=2)
    shutil.rmtree(moved / "reference")
    said = train_ranks(arithmetic, *overrides, expect=2)
    assert f"{moved / 'reference'} is not there: the run cannot go on without the reference policy" in said


def test_context_ranks_that_share_experts_go_on_at_tp2(arithmetic: Path, tmp_path: Path) -> None:
    text = arithmetic.read_text().replace("model_type: qwen2", f"model_type: qwen3_moe, {EXPERTS}")
    text = text.replace("tensor_model_parallel_size: 2", "context_parallel_size: 2, expert_model_parallel_size: 2")
    arithmetic.write_text(text.replace("micro_batch_size: 8", "micro_batch_size: 8, packing: segments"))
    whole, moved = (tmp_path / runs / "experts" for runs in ("runs", "moved"))
    train_ranks(arithmetic, "name=experts", "train.steps=3")
    assert all(line["grad_norm"] > 0 for line in metrics(whole, first_step=1))
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints" / "step_000003")
    at_tp2 = [
        "context_parallel_size=1",
        "expert_model_parallel_size=1",
        "tensor_model_parallel_size=2",
        "sequence_parallel=true",
    ]
    overrides = [f"logging.run_dir={moved.parent}", *(f"parallel.{setting}" for setting in at_tp2)]
    train_ranks(arithmetic, "name=experts", "train.steps=3", *overrides)
    (at_other_layout,) = metrics(moved, first_step=3)
    for name, value in metrics(whole, first_step=3)[0].items():
        assert at_other_layout[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_real_prompts_at_tp2_pp2_resumed_after_sigkill(tmp_path: Path) -> None:
    prompts = tmp_path / "train.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in GSM8K_LIKE))
    make_checkpoint = runpy.run_path(str(RECIPES / "helpers" / "tiny_qwen2.py"))["make_checkpoint"]
    make_checkpoint(prompts, tmp_path / "tiny_qwen2", vocab_size=401)
    recipe = RECIPES / "eapo-qwen2-tiny-gsm8k-1n4g-tp2pp2.yaml"
    runs = tmp_path / "runs"
    overrides = [
        f"data.train_path={prompts}",
        f"model.path={tmp_path / 'tiny_qwen2'}",
        f"logging.run_dir={runs}",
        "reward.function=lengths:even_length",
        "rollout.max_response_tokens=8",
        "train.steps=5",
        "logging.record_tokens=1",
    ]
    train_ranks(recipe, "name=whole", *overrides)
    checkpoint = runs / "killed" / "checkpoints" / "step_000002"
    train_until(recipe, "name=killed", *overrides, until=checkpoint.is_dir, send=signal.SIGKILL, to="launcher")
    said = train_ranks(recipe, "name=killed", *overrides)
    assert "resumed from step" in said
    assert metrics(runs / "killed") == metrics(runs / "whole")
    assert all(line["grad_norm"] > 0 for line in metrics(runs / "whole", first_step=1))
    assert recorded_tokens(runs / "killed") == recorded_tokens(runs / "whole")
    assert len(recorded_tokens(runs / "whole")) == 5
    ours = tensors(runs / "killed" / "checkpoints" / "step_000005", tmp_path / "killed.pt")
    theirs = tensors(runs / "whole" / "checkpoints" / "step_000005", tmp_path / "whole.pt")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    model = runs / "whole" / "huggingface"
    assert (model / "tokenizer.json").read_bytes() == (tmp_path / "tiny_qwen2" / "tokenizer.json").read_bytes()
    to_hf(runs / "whole", tmp_path / "export", max_shard_bytes=2**30)
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        path.name for path in (tmp_path / "tiny_qwen2").iterdir()
    }
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == load_file(tmp_path / "tiny_qwen2" / "model.safetensors").keys()
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    assert exported["model.embed_tokens.weight"].equal(theirs["embedding.word_embeddings.weight"][:vocab_size])
    for layer in range(4):
        down = exported[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert down.equal(theirs["decoder.layers.mlp.linear_fc2.weight"][layer])


def test_a_run_that_is_asked_to_stop_saves_its_last_step(arithmetic: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "asked"
    done = 0  # steps
    # A scheduler signals all ranks, but not at the same moment: one must be enough.
    for send, to in ((signal.SIGTERM, "last rank"), (signal.SIGUSR1, "launcher")):
        overrides = ["name=asked", "train.steps=10000", "checkpoint={every: 0, keep_last: 1}"]
        code = train_until(arithmetic, *overrides, until=lambda: last_step(run) > done, send=send, to=to)  # noqa: B023
        assert code == 75
        assert done < last_step(run) < 10000
        done = last_step(run)
        assert checkpoints(run) == [done]
    assert [line["step"] for line in metrics(run)] == list(range(done + 1))
    assert not (run / "summary.json").exists()


def test_a_diverging_run_stops_with_its_checkpoint_intact(arithmetic: Path, tmp_path: Path) -> None:
    one_rank = ["cluster.gpus_per_node=1", "parallel.tensor_model_parallel_size=1", "name=diverges"]
    said = train_ranks(arithmetic, *one_rank, "algorithm.loss.entropy_coef=3e38", expect=1)  # an infinite loss
    assert (
        "error: step 2: 3 updates in a row had NaN or Inf in a loss or gradient; the last good checkpoint is in" in said
    )
    (line,) = metrics(tmp_path / "runs" / "diverges", first_step=1)
    assert line["skipped_updates"] == 2
    assert [path.name for path in (tmp_path / "runs" / "diverges" / "checkpoints").iterdir()] == ["step_000001"]
