"""The recipe's keys as a user looks them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.recipe_keys import Key, keys_page, recipe_keys

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"


def leaves(settings: dict[str, Any], path: str = "") -> set[str]:
    found = set()
    for name, value in settings.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) else {path + name}
    return found


def test_every_key_of_a_recipe_is_listed() -> None:
    recipe = parse_recipe({"name": "r", "model": {"path": "m"}, "data": {"task": "arithmetic"}}, source="r")
    paths = {key.path for key in recipe_keys()}
    fields = leaves(recipe.model_dump(mode="json"))
    assert fields <= paths
    options = {"shaping.alpha", "shaping.phi", "shaping.without", "shaping.a", "shaping.kappa", "shaping.fraction"}
    options |= {"shaping.only", "loss.eps_low", "loss.eps_high", "correction.low", "correction.high"}
    options |= {"loss.fraction", "loss.coefficient", "loss.covariance_low", "loss.covariance_high"}
    options |= {"loss.beta_low", "loss.beta_high", "loss.dual_clip"}
    assert paths - fields == {f"algorithm.{option}" for option in options}


@pytest.mark.parametrize(
    ("path", "kind", "default"),
    [
        ("name", "str matching ^[A-Za-z0-9][A-Za-z0-9._-]*$", ""),
        ("cluster.device", "auto, cpu, cuda", "auto"),
        ("model.path", "str or null", "null"),
        ("model.architecture", "mapping or null", "null"),
        ("parallel.data_parallel_size", "int >= 1 or null", "null"),
        ("data.arithmetic.num_terms", "list of int", "[3, 4]"),
        ("data.suffix", "str", '""'),
        ("rollout.top_p", "float > 0 and <= 1", "1.0"),
        ("optimizer.lr", "float > 0 and <= 1000", "1e-06"),
        ("logging.tensorboard", "bool", "true"),
    ],
)
def test_types_bounds_and_defaults_read_as_in_yaml(path: str, kind: str, default: str) -> None:
    (key,) = [key for key in recipe_keys(path) if key.path == path]
    section: Any = Recipe
    for part in path.split(".")[:-1]:
        section = section.model_fields[part].annotation
    assert key == Key(path, kind, default, section.model_fields[path.split(".")[-1]].description)


def test_a_pattern_is_a_part_or_a_glob_of_path_or_description() -> None:
    def found(pattern: str) -> list[str]:
        return [key.path for key in recipe_keys(pattern)]

    assert found("KEEP_") == ["checkpoint.keep_last", "checkpoint.keep_best"]
    assert found("mlflow experiment") == ["logging.mlflow_experiment"]
    assert found("train.*_size") == ["train.micro_batch_size"]
    with pytest.raises(RecipeError, match="no key or description matches 'lrr'"):
        found("lrr")


def test_the_page_is_up_to_date() -> None:
    """Otherwise: eapo-megatron keys --markdown > docs/keys.md"""
    assert PAGE.read_text(encoding="utf-8") == keys_page()
