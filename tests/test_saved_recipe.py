"""recipe.json: read by later versions of the schema, compared by what defines the experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eapo_megatron import recipe_files
from eapo_megatron.config import Recipe, RecipeError, Rollout
from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.saved_recipe import (
    RECIPE_FILE,
    check_run_folder,
    experiment,
    read_saved_recipe,
    resolved,
    saved_form,
)

SETTINGS: dict[str, Any] = {
    "name": "run",
    "model": {"path": "/models/Qwen2.5-7B"},
    "parallel": {"use_distributed_optimizer": True},
    "data": {"train_path": "gsm8k.jsonl", "format": "gsm8k"},
    "train": {"steps": 220},
    "algorithm": {"shaping": {"name": "eapo", "alpha": 0.3}},
}
# The file of a run of these settings, when data.format was data.layout and the file had no version.
VERSION_1 = """
{"name": "run", "seed": 1234,
 "model": {"path": "/models/Qwen2.5-7B", "architecture": null, "checkpoint": null, "tokenizer": null,
  "dtype": "bfloat16", "head": {"grad_filter": 0.0}},
 "data": {"task": null,
  "arithmetic": {"train_size": 4096, "held_out_size": 256, "num_terms": [3, 4], "max_term": 20},
  "train_path": "gsm8k.jsonl", "validation_path": null, "layout": "gsm8k", "prompt_field": null,
  "answer_field": null, "solution_field": null, "template": "chat", "system_prompt": null, "suffix": "",
  "max_prompt_tokens": 1024},
 "rollout": {"engine": "megatron", "num_generations_per_prompt": 8, "max_response_tokens": 3072,
  "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_token_ids": []},
 "reward": {"function": "math", "timeout_seconds": 10.0},
 "algorithm": {"advantage_estimator": "grpo", "shaping": {"name": "eapo", "alpha": 0.3},
  "loss": {"name": "clipped_surrogate", "eps_low": 0.2, "eps_high": 0.28, "aggregation": "token_mean",
   "entropy_coef": 0.0},
  "dynamic_sampling_rounds": 1},
 "optimizer": {"name": "adam", "lr": 1e-06, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_style": "constant",
  "lr_decay_steps": null, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-08, "sgd_momentum": 0.0,
  "weight_decay": 0.01, "clip_grad": 1.0, "distributed": true},
 "train": {"num_prompts_per_step": 64, "mini_batch_prompts": 32},
 "warm_start": {"steps": 0, "batch_size": 64, "lr": 0.001, "lr_warmup_steps": 10}}
"""


class GrownRollout(Rollout):
    curiosity: int = 1


class GrownRecipe(Recipe):
    """A later schema: one more key."""

    rollout: GrownRollout = GrownRollout()


@pytest.fixture(params=["version 1", "version 2"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Runs, of which one was saved in the old or in today's form."""
    path = tmp_path / "run" / RECIPE_FILE
    path.parent.mkdir()
    today = json.dumps(saved_form(parse_recipe(SETTINGS, source="r.yaml")))
    path.write_text(VERSION_1 if request.param == "version 1" else today)
    return tmp_path


def recipe_of(run_dir: Path, **sections: Any) -> Recipe:
    changed = {name: {**SETTINGS.get(name, {}), **values} for name, values in sections.items()}
    return parse_recipe({**SETTINGS, **changed, "logging": {"run_dir": str(run_dir)}}, source="r.yaml")


def change(run_dir: Path, edit: Any) -> None:
    path = run_dir / "run" / RECIPE_FILE
    saved = json.loads(path.read_text())
    edit(saved.get("recipe", saved))
    path.write_text(json.dumps(saved))


def test_the_same_experiment_goes_on(run_dir: Path) -> None:
    check_run_folder(recipe_of(run_dir))
    check_run_folder(recipe_of(run_dir, train={"steps": 440}, cluster={"num_nodes": 2}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"optimizer": {"lr": 0.5}}, "holds another experiment: optimizer.lr was 1e-06 there and is 0.5 here"),
        ({"data": {"format": "math"}}, "data.format was 'gsm8k' there and is 'math' here"),
        (
            {"parallel": {"use_distributed_optimizer": False}},
            "parallel.use_distributed_optimizer was True there and is False here",
        ),
        ({"algorithm": {"shaping": {"name": "eapo"}}}, "algorithm.shaping.alpha was 0.3 there and is 0.2 here"),
        ({"reward": {"positive_threshold": 0.5}}, "reward.positive_threshold was 0.0 there and is 0.5 here"),
    ],
)
def test_another_experiment_is_refused(run_dir: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_run_folder(recipe_of(run_dir, **changed))
    assert sentence in str(caught.value)


def test_a_key_that_the_schema_gained_has_its_default(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_files, "Recipe", GrownRecipe)
    check_run_folder(recipe_of(run_dir))
    check_run_folder(recipe_of(run_dir, rollout={"curiosity": 1}))
    with pytest.raises(RecipeError, match=r"rollout\.curiosity was 1 there and is 0 here"):
        check_run_folder(recipe_of(run_dir, rollout={"curiosity": 0}))


def test_a_key_that_the_schema_does_not_know_is_one_sentence(run_dir: Path) -> None:
    change(run_dir, lambda saved: saved["rollout"].update(curiosity=1))
    with pytest.raises(RecipeError, match=r"run/recipe\.json: rollout\.curiosity: unknown key$"):
        check_run_folder(recipe_of(run_dir))


def test_a_file_of_today_is_the_whole_recipe(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rollout={"stop_token_ids": [3], "top_p": 0.95}, evaluation={"every": 7})
    path = tmp_path / RECIPE_FILE
    path.write_text(json.dumps(saved_form(recipe)))
    assert resolved(read_saved_recipe(path)) == resolved(recipe)
    path.write_text(json.dumps({**saved_form(recipe), "version": 3}))
    with pytest.raises(RecipeError, match=r"recipe\.json has format version 3, this eapo_megatron reads up to 2"):
        read_saved_recipe(path)
    path.write_text('{"name": ')
    with pytest.raises(RecipeError, match=r"recipe\.json: not valid JSON"):
        read_saved_recipe(path)


def test_what_defines_the_experiment(tmp_path: Path) -> None:
    def of(**sections: Any) -> dict[str, Any]:
        return experiment(recipe_of(tmp_path, **sections))

    assert of() == of(
        train={
            "steps": 7,
            "micro_batch_size": 2,
            "packing": "segments",
            "micro_batch_tokens": 99_999,
            "max_skipped_in_a_row": 1,
        },
        parallel={"tensor_model_parallel_size": 2},
        logging={"samples_per_step": 1},
        checkpoint={"every": 3},
        evaluation={"every": 3},
        cluster={"gpus_per_node": 4},
        rollout={"max_batch_size": 8},
        reward={"num_workers": 1},
        model={"recompute": "full", "attention_backend": "torch", "head": {"backend": "logits"}},
    )
    for changed in (
        {"optimizer": {"lr": 4e-5}},
        {"algorithm": {"shaping": {"name": "none"}}},
        {"rollout": {"temperature": 0.9}},
        {"model": {"head": {"grad_filter": 0.001}}},
    ):
        assert of(**changed) != of()
