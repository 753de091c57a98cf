"""Recipes: inheritance, overrides, and one sentence for each mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eapo_megatron.config import Recipe, RecipeError, Section
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.saved_recipe import experiment

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(
        "model: {architecture: {model_type: qwen2}}\ndata: {task: arithmetic}\n"
        "optimizer: {lr: 1.0e-5, min_lr: 1.0e-6}\n"
    )
    path = tmp_path / "child.yaml"
    path.write_text("defaults: base.yaml\noptimizer: {lr: 2.0e-5}\n")
    return path


def test_child_overrides_parent_key_by_key(recipe: Path) -> None:
    settings = load_recipe(recipe)
    assert settings.optimizer.lr == 2e-5
    assert settings.optimizer.min_lr == 1e-6
    assert settings.name == "child"


def test_dotted_overrides_come_last(recipe: Path) -> None:
    settings = load_recipe(recipe, ["optimizer.lr=3e-5", "algorithm.shaping.alpha=0.3", "rollout.stop_token_ids=[1,2]"])
    assert settings.optimizer.lr == 3e-5
    assert settings.make_algorithm().shaping_options == {"alpha": 0.3, "phi": 2.0, "without": ()}
    assert settings.rollout.stop_token_ids == [1, 2]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key (did you mean lr?)"),
        ("optimizr.lr=1", "optimizr: unknown key (did you mean optimizer?)"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, got -1"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("train.steps=1.5", "train.steps: input should be a valid integer"),
        ("algorithm.loss.eps_low=0", "algorithm.loss.eps_low must be in (0, 1), got 0"),
        ("algorithm.loss.eps_high=-0.1", "algorithm.loss.eps_high must be positive and finite, got -0.1"),
        ("algorithm.loss.eps_hihg=0.3", "algorithm.loss.eps_hihg is not a key of the loss 'clipped_surrogate' (did"),
        ("algorithm.loss.name=ppo", "algorithm.loss.name must be one of clipped_surrogate"),
        ("algorithm.loss.kl_coef=-0.1", "algorithm.loss.kl_coef must be finite and not negative, got -0.1"),
        ("algorithm.quadrant_threshold=median", "algorithm.quadrant_threshold must be one of mean, q25, q50, q75, km"),
        (
            "reward.overlong.buffer_tokens=4000",
            "reward.overlong.buffer_tokens 4000 exceeds rollout.max_response_tokens 3072",
        ),
        ("algorithm.shaping.name=json:loads", "algorithm.shaping: "),
        (
            "algorithm.shaping.name=json:absent",
            "algorithm.shaping.name 'json:absent' cannot be imported: AttributeError",
        ),
        (
            "algorithm.shaping.name=absent.module:f",
            "algorithm.shaping.name 'absent.module:f' cannot be imported: ModuleNotFoundError: No module named "
            "'absent' (its folder must be on PYTHONPATH)",
        ),
        ("algorithm.shaping.name=json:__all__", "algorithm.shaping.name 'json:__all__' is no function but list"),
        ("algorithm.correction.name=mis", "algorithm.correction.name must be one of none, tis, icepop"),
        ("algorithm.correction={name: tis, higj: 3}", "algorithm.correction.higj is not a key of the correction 'tis'"),
        (
            "algorithm={old_policy: rollout, correction: {veto: 0.1}}",
            "algorithm.correction has nothing to correct with",
        ),
        ("rollout.nucleus_replay=true", "rollout: nucleus_replay needs top_p < 1 or top_k > 0: every token is kept"),
        ("rollout={nucleus_replay: true, top_p: 0.9}", "rollout.nucleus_replay needs model.head.backend logits"),
        ("model.routing_replay=r4", "model.routing_replay: input should be 'none', 'r2' or 'r3'"),
        ("algorithm.old_policy=sampler", "algorithm.old_policy: input should be 'forward' or 'rollout'"),
        ("algorithm.shaping.alpha=much", "algorithm.shaping.alpha must be a number, got 'much'"),
        ("algorithm.advantage_estimator=gae", "algorithm.advantage_estimator must be one of grpo, dr_grpo"),
        ("rollout.num_generations_per_prompt=1", "rollout.num_generations_per_prompt is 1: the group estimator grpo"),
        ("train={packing: padded, micro_batch_tokens: 100}", "train: micro_batch_tokens needs packing segments"),
        (
            "train.micro_batch_tokens=100",
            "train.micro_batch_tokens 100 is less than what the model reads of one response",
        ),
        ("parallel.context_parallel_size=0", "parallel.context_parallel_size: input should be greater than or equal"),
        ("train.mini_batch_prompts=1000", "train.mini_batch_prompts 1000 exceeds train.num_prompts_per_step 64"),
        ("model.path=x", "model: give path (a Hugging Face folder) or architecture"),
        ("data.train_path=x", "data: give either task (built in), train_path (a fi"),
        ("data.template=hello", "data: template must be"),
        ("parallel.sequence_parallel=true", "parallel: sequence_parallel needs tensor_model_parallel_size > 1"),
        (
            "parallel.expert_tensor_parallel_size=2",
            "parallel: expert_tensor_parallel_size 2 beside tensor_model_parallel_size 1 needs expert_model_parallel",
        ),
        ("optimizer.lr_decay_style=cosine", "optimizer: lr_decay_steps is needed"),
        ("reward={function: a:b, thinking: opened}", "reward: thinking is a setting of the function math alone"),
        ("name=../evil", "name: string should match pattern"),
        ("optimizer.lr", "override 'optimizer.lr' is not of the form key.path=value"),
    ],
)
def test_a_wrong_setting_is_one_sentence_naming_the_key(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("in_file", "overrides", "place"),
    [
        ("optimizer: {lr: -1}", [], "FILE:"),
        ("optimizer: {lr: -1}", ["optimizer.lr_warmup_steps=2"], "FILE:"),
        ("optimizer: {lr: -1}", ["optimizer={lr_warmup_steps: 2}"], "FILE:"),
        ("", ["optimizer.lr=1e-4", "optimizer.lr=-1"], "override"),
        ("", ["seed=3", "optimizer={lr: -1}"], "override"),
        ("optimizer: {lr: -1}", ["optimizer.lr=-2"], "override"),
        ("", ["optimizer.l=1", "optimizer.lr=-1"], "override"),
    ],
)
def test_a_wrong_key_is_placed_where_it_was_given(
    in_file: str, overrides: list[str], place: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{path: absent}}\ndata: {{task: arithmetic}}\n{in_file}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value).startswith(f"{place.replace('FILE', str(path))} optimizer.lr: ")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "parallel.context_parallel_size=2",
            "parallel.context_parallel_size 2 needs train.packing segments: padded micro-batches are not divided",
        ),
        ("model.attention_backend=flex", "model.attention_backend flex needs train.packing segments"),
    ],
)
def test_what_needs_packed_rows_is_refused_with_padded_ones(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["train.packing=padded", override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml is neither a file nor a built-in recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"broken\.yaml: not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "circle.yaml").write_text("defaults: circle.yaml\n")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "circle.yaml")


def test_an_old_key_is_read_under_its_new_name(recipe: Path) -> None:
    assert load_recipe(recipe).data.format == "math"
    assert load_recipe(recipe, ["data.layout=gsm8k"]).data.format == "gsm8k"
    parent = recipe.with_name("base.yaml")
    parent.write_text(parent.read_text().replace("{task: arithmetic}", "{task: arithmetic, format: math}"))
    recipe.write_text("defaults: base.yaml\ndata: {layout: gsm8k}\n")
    assert load_recipe(recipe).data.format == "gsm8k"  # a child's old name is over its parent's new one
    assert load_recipe(recipe, ["data.format=math"]).data.format == "math"
    with pytest.raises(
        RecipeError, match=r"^override data\.format: input should be 'math', .* or 'nemo_rl', got 'csv'"
    ):
        load_recipe(recipe, ["data.layout=csv"])
    with pytest.raises(RecipeError, match=r"data\.layout is the old name of data\.format: give data\.format alone"):
        load_recipe(recipe, ["data.layout=gsm8k", "data.format=math"])


def sections(section: type[Section] = Recipe) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_has_a_description(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue  # described by its class
        assert field.description, f"{section.__name__}.{name} has no description under it"
        assert field.description.endswith(".")
        assert "\n" not in field.description


def test_an_option_that_is_set_to_its_default_is_the_same_experiment(recipe: Path) -> None:
    written = load_recipe(recipe, ["algorithm.loss.eps_low=0.2", "algorithm.shaping.alpha=0.2"])
    assert experiment(written) == experiment(load_recipe(recipe))
    assert experiment(written)["algorithm"]["loss"]["eps_high"] == 0.28


def test_the_section_becomes_an_algorithm_with_its_options(recipe: Path) -> None:
    overrides = ["loss.eps_low=0.1", "loss.entropy_coef=0.01", "shaping.alpha=0.3", "dynamic_sampling_rounds=3"]
    algorithm = load_recipe(recipe, [f"algorithm.{override}" for override in overrides]).make_algorithm()
    assert algorithm.loss_settings.options == {"eps_low": 0.1, "eps_high": 0.28, "dual_clip": 0.0}
    assert algorithm.loss_settings.entropy_coef == 0.01
    assert algorithm.shaping_options["alpha"] == 0.3


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem
