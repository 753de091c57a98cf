"""The plan of a recipe: where its numbers are from, the search for a layout, the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from command_line import run_command
from eapo_megatron.config import GPUS, RecipeError
from eapo_megatron.planning.gpus import GPU_MEMORY, usable_bytes
from eapo_megatron.planning.memory import worst_rank
from eapo_megatron.planning.plan import Plan, make_plan
from eapo_megatron.planning.report import print_plan
from eapo_megatron.planning.search import overrides_of
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.weights.families.public_configs import PUBLIC_CONFIGS

RECIPES = Path(__file__).parents[2] / "recipes"
DENSE = str(RECIPES / "eapo-qwen2.5-7b-1n8g-tp2.yaml")
MIXTURE = str(RECIPES / "eapo-qwen3-30b-a3b-2n8g-tp4ep8.yaml")


def plan_of(recipe: str, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides), source=recipe)


def test_every_gpu_of_the_recipe_is_known() -> None:
    assert set(get_args(GPUS)) == GPU_MEMORY.keys()


def test_a_folder_goes_before_the_public_table(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    assert plan_of(DENSE, f"model.path={folder}").config_source.startswith("Qwen/Qwen2.5-7B")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLIC_CONFIGS["Qwen/Qwen2.5-7B"] | {"num_hidden_layers": 2}))
    plan = plan_of(DENSE, f"model.path={folder}")
    assert plan.config_source == f"{folder}/config.json"
    assert len(plan.layout.shape.layers) == 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.path=/models/Qwen2.5-8B"], "Qwen2.5-8B is no public model known here (did you mean Qwen2.5-7B?)"),
        (["cluster.gpu=h100"], "cluster.gpu: input should be 'a100-40gb'"),
        (["parallel.tensor_model_parallel_size=8"], "does not divide the model's num_attention_heads 28"),
        (["parallel.expert_model_parallel_size=2"], "the model has no experts"),
        (["algorithm.shaping.alpha=3"], "alpha"),
        (
            ["rollout.max_response_tokens=200000", "train.micro_batch_tokens=null"],
            "exceeds the model's max_position_embeddings 131072",
        ),
    ],
)
def test_what_training_would_refuse_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(DENSE, *overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        (DENSE, ["cluster.gpu=a100-40gb"]),
        (DENSE, ["parallel.use_distributed_optimizer=false"]),
        (DENSE, ["model.path=/models/Qwen2.5-72B"]),
        (MIXTURE, ["cluster.num_nodes=1", "parallel.expert_model_parallel_size=2"]),
        (MIXTURE, ["model.path=/models/Qwen3-235B-A22B"]),  # 94 layers divide over few stages
        (MIXTURE, ["model.path=/models/Moonlight-16B-A3B", "cluster.gpu=a100-40gb"]),
    ],
)
def test_the_layout_proposed_fits_and_the_command_line_makes_it(recipe: str, overrides: list[str]) -> None:
    plan = plan_of(recipe, *overrides)
    assert plan.fits is False
    assert plan.smallest is not None
    proposed = plan_of(recipe, *overrides, *overrides_of(plan.smallest, plan.layout.recipe))
    assert proposed.fits
    assert proposed.layout.recipe == plan.smallest.recipe
    assert plan.usable is not None
    resident = 18 * plan.layout.shape.total_parameters / plan.smallest.world_size  # weights, gradients, Adam in bf16
    assert resident <= plan.usable


def test_a_layout_on_half_of_the_ranks_does_not_fit() -> None:
    """The fewest GPUs: the model's state alone, evenly spread, would be too much for half of them."""
    plan = plan_of(DENSE, "model.path=/models/Qwen2.5-72B")
    assert plan.smallest is not None
    assert plan.usable is not None
    assert 18 * plan.layout.shape.total_parameters / (plan.smallest.world_size // 2) > plan.usable


@pytest.mark.parametrize(
    ("train", "keys"),
    [
        ("packing: padded, micro_batch_size: 1000, micro_batch_tokens: null", "train.micro_batch_size"),
        (
            "micro_batch_size: 9000, micro_batch_tokens: 1000000000, num_prompts_per_step: 8192, "
            "mini_batch_prompts: 8192",
            "train.micro_batch_size and train.micro_batch_tokens",
        ),
    ],
)
def test_no_layout_for_batches_too_large(train: str, keys: str) -> None:
    plan = plan_of(DENSE, "rollout.max_response_tokens=130000", f"train={{{train}}}")
    assert plan.fits is False
    assert plan.smallest is None
    text = io.StringIO()
    print_plan(plan, Console(width=200, file=text))
    assert f"nodes does: lower {keys} or rollout.max_batch_size." in text.getvalue()


def test_more_of_a_recipe_takes_more_memory() -> None:
    base = plan_of(DENSE).memory
    of_two, of_four = (1024 + count * 3071 for count in (2, 4))  # a prompt once, responses without their last tokens
    assert plan_of(DENSE, "train.micro_batch_tokens=16384").memory.activations == pytest.approx(
        of_four / of_two * base.activations, rel=0.01
    )
    assert plan_of(DENSE, "model.recompute=full").memory.activations < base.activations / 4
    assert plan_of(DENSE, "rollout.max_batch_size=256").memory.kv_cache == 2 * base.kv_cache
    assert plan_of(DENSE, "parallel.use_distributed_optimizer=false").memory.optimizer == 4 * base.optimizer
    deeper = "parallel={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 4, sequence_parallel: true}"
    piped = plan_of(DENSE, deeper).layout
    assert worst_rank(piped).stage == 0  # most micro-batches in flight
    elsewhere = "rollout.vllm={placement: separate, addresses: ['node:8000']}"
    without = plan_of(DENSE, "rollout.engine=vllm", elsewhere).memory
    assert (without.engine, without.kv_cache, without.sampling) == (0, 0, 0)
    assert usable_bytes("h200-141gb") > usable_bytes("h100-80gb")


def test_vllm_beside_the_policy_takes_its_weights_and_cache() -> None:
    """Qwen2.5-7B: 7,615,616,512 parameters, 28 layers, 4 key-value heads of 128; biases and norms are replicated."""
    whole = plan_of(DENSE, "rollout.engine=vllm").memory
    assert whole.engine == 2 * 7_615_616_512
    plan = plan_of(DENSE, "rollout.engine=vllm", "rollout.vllm.tensor_parallel_size=4")
    assert whole.engine / 4 < plan.memory.engine < whole.engine / 4 * 1.001
    rollout, data = plan.layout.recipe.rollout, plan.layout.recipe.data
    tokens = rollout.max_batch_size * (data.max_prompt_tokens + rollout.max_response_tokens)
    assert whole.kv_cache == tokens * 28 * 2 * 4 * 128 * 2
    assert plan.memory.kv_cache == whole.kv_cache / 4
    assert plan.memory.rollout_peak == plan.memory.resident + plan.memory.engine + plan.memory.kv_cache
    beside = plan.memory.engine + plan.memory.kv_cache
    trained = plan.memory.resident + plan.memory.activations + plan.memory.head
    assert plan.memory.training_peak == trained + beside
    asleep = plan_of(DENSE, "rollout.engine=vllm", "rollout.vllm={tensor_parallel_size: 4, sleep: true}").memory
    assert (asleep.training_peak, asleep.rollout_peak) == (trained, plan.memory.rollout_peak)
    text = io.StringIO()
    print_plan(plan, Console(width=120, file=text))
    assert "vLLM's weights" in text.getvalue()


def test_a_reference_policy_takes_its_weights_where_it_is() -> None:
    """Qwen2.5-7B at TP 2 in bfloat16: two bytes of each of a rank's parameters."""
    without, kept = plan_of(DENSE), plan_of(DENSE, "algorithm.loss.kl_coef=0.04")
    on_host = plan_of(DENSE, "algorithm.loss.kl_coef=0.04", "algorithm.reference_on_host=true")
    weights = 2 * kept.layout.parameters(0).total
    assert weights > 7_615_616_512
    assert (without.memory.reference, kept.memory.reference, on_host.memory.reference) == (0, weights, weights)
    assert kept.memory.training_peak == without.memory.training_peak + weights
    assert kept.memory.rollout_peak == without.memory.rollout_peak + weights
    assert on_host.memory.training_peak == without.memory.training_peak
    assert on_host.memory.rollout_peak == without.memory.rollout_peak
    assert on_host.memory.reference_peak == kept.memory.reference_peak == without.memory.resident + weights
    assert kept.work["reference"] == kept.work["scoring"]
    assert "reference" not in without.work
    text = io.StringIO()
    for plan in (without, on_host):
        print_plan(plan, Console(width=120, file=text))
    assert text.getvalue().count("reference policy") == 1
    assert "frozen, on the host between uses" in text.getvalue()


def test_the_report_names_every_part() -> None:
    text = io.StringIO()
    print_plan(plan_of(DENSE), Console(width=120, file=text))
    for part in ("7,615,616,512", "weights", "gradients", "optimizer", "activations", "fused head", "KV cache", "TP 2"):
        assert part in text.getvalue()
    assert "Fits: " in text.getvalue()


@pytest.mark.parametrize(
    ("overrides", "code", "stream", "sentence"),
    [
        (["cluster.gpu=l40s-48gb"], 1, "stdout", "The smallest layout that does"),
        (["rollout.max_batch_size=1024"], 1, "stdout", "Too large: rollouts."),
        (["cluster.gpus_per_node=2"], 1, "stdout", "Too large: training and rollouts."),
        (["model.path=/models/nothing"], 2, "stderr", "error: model.path /models/nothing is not a folder"),
    ],
)
def test_command_line(overrides: list[str], code: int, stream: str, sentence: str) -> None:
    done = run_command(["plan", DENSE, *overrides])
    assert done.returncode == code, done.stderr
    assert sentence in getattr(done, stream)
