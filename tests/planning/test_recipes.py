"""Every recipe is loaded, validated and planned, and fits the cluster that it names."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from eapo_megatron.config import Recipe
from eapo_megatron.planning.plan import make_plan
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.recipe_table import recipe_page

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*-*.yaml"))
ON_CPU = {
    "eapo-qwen2-tiny-arithmetic-1n2g-tp2",
    "eapo-qwen2-tiny-arithmetic-vllm-1n2g-tp2",
    "eapo-qwen2-tiny-gsm8k-1n4g-tp2pp2",
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")


@pytest.fixture(autouse=True)
def tiny_qwen2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that one recipe asks its user to make first."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"question": "1+1=?", "answer": "#### 2"}\n')
    runpy.run_path(str(RECIPES / "helpers" / "tiny_qwen2.py"))["make_checkpoint"](
        Path("prompts.jsonl"), Path("tiny_qwen2"), vocab_size=300
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_cluster_that_it_names(name: str) -> None:
    recipe = recipe_of(name)
    plan = make_plan(recipe, source=name)
    assert plan.fits is (None if name in ON_CPU else True)
    assert recipe.cluster.device == ("cpu" if name in ON_CPU else "auto")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_after_its_cluster_and_layout(name: str) -> None:
    recipe = recipe_of(name)
    parts = re.fullmatch(r"(\w+)-.+-(\d+)n(\d+)g-((?:[a-z]+\d+)+)", name)
    assert parts is not None
    method, nodes, gpus, layout = parts.groups()
    shaping = recipe.algorithm.shaping
    assert method == shaping.name
    assert (int(nodes), int(gpus)) == (recipe.cluster.num_nodes, recipe.cluster.gpus_per_node)
    sizes = {key: int(size) for key, size in re.findall(r"([a-z]+)(\d+)", layout)}
    tp, pp = recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size
    assert sizes.get("tp", 1) == tp
    assert sizes.get("pp", 1) == pp
    assert sizes.get("ep", 1) == recipe.parallel.expert_model_parallel_size
    assert sizes.get("dp", recipe.cluster.world_size // (tp * pp)) == recipe.cluster.world_size // (tp * pp)


QUADRANTS = [f"quadrant-{quadrant}-qwen2.5-math-7b-1n8g-tp2" for quadrant in ("phr", "plr", "nhr", "nlr")]


@pytest.mark.parametrize(
    ("name", "lengths", "prompts", "generations", "steps"),
    [
        ("eapo-qwen2.5-math-7b-1n8g-tp2", (1024, 3072), 512, 8, 220),
        ("eapo-deepscaler-1.5b-1n8g-tp2", (2048, 24576), 64, 16, 900),
        *((name, (1024, 3072), 256, 8, 120) for name in QUADRANTS),
    ],
)
def test_the_papers_settings(name: str, lengths: tuple[int, int], prompts: int, generations: int, steps: int) -> None:
    """Tables 5 and 6 of arXiv 2604.11056."""
    recipe = recipe_of(name)
    assert (recipe.data.max_prompt_tokens, recipe.rollout.max_response_tokens) == lengths
    assert (recipe.train.num_prompts_per_step, recipe.train.mini_batch_prompts) == (prompts, 32)
    assert recipe.rollout.num_generations_per_prompt == generations
    assert recipe.train.steps == steps
    assert recipe.optimizer.lr == 1e-6
    assert recipe.make_algorithm().loss_settings.options == {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 0.0}
    assert (recipe.rollout.temperature, recipe.rollout.top_p) == (1.0, 0.95)
    assert recipe.algorithm.dynamic_sampling_rounds > 1


def test_each_quadrant_is_studied_alone() -> None:
    assert [recipe_of(name).make_algorithm().shaping_options for name in QUADRANTS] == [
        {"only": ["phr"]},
        {"only": ["plr"]},
        {"only": ["nhr"]},
        {"only": ["nlr"]},
    ]


def test_the_table_of_recipes_is_up_to_date() -> None:
    """Otherwise: eapo-megatron recipes --markdown > recipes/README.md"""
    assert (RECIPES / "README.md").read_text(encoding="utf-8") == recipe_page()
