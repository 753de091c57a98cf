"""Built-in recipes: found by name from any folder, listed, copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.recipe_files import BUILT_IN, built_in_recipes, copy_recipe, find_recipe, load_recipe

FIRST = "eapo-qwen2-tiny-arithmetic-1n2g-tp2"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_is_found_by_path_then_by_name() -> None:
    assert find_recipe(FIRST) == find_recipe(f"{FIRST}.yaml") == BUILT_IN / f"{FIRST}.yaml"
    own = Path("eapo-qwen3-8b-1n8g-tp2.yaml")
    own.write_text(f"defaults: {FIRST}\nseed: 5\n")
    assert find_recipe(own) == find_recipe("eapo-qwen3-8b-1n8g-tp2") == own
    assert load_recipe(own).seed == 5  # and its parent is built in
    Path(f"{FIRST}.yaml").write_text("defaults: base\nmodel: {path: m}\ndata: {task: arithmetic}\nseed: 6\n")
    assert load_recipe(own, ["seed=7"]).model.path == "m"  # beside the recipe first


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "qwen3-8b",
            "recipe qwen3-8b is neither a file nor a built-in recipe (did you mean eapo-qwen3-8b-1n8g-tp2?)",
        ),
        (f"recipes/{FIRST}.yaml", f"recipe recipes/{FIRST}.yaml is neither .* (did you mean {FIRST}?)"),
        ("eapo-qwen2-tiny-aritmetic-1n2g-tp2", f"is neither a file nor a built-in recipe (did you mean {FIRST}"),
        ("x!", "recipe x! is neither a file nor a built-in recipe: `eapo-megatron recipes` lists these"),
    ],
)
def test_an_unknown_name_is_one_sentence_with_close_ones(name: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    for part in sentence.split(" .* "):
        assert part in str(caught.value)
    Path("child.yaml").write_text(f"defaults: {name}\n")
    with pytest.raises(RecipeError, match=rf"child\.yaml: defaults {name} is neither"):
        load_recipe("child.yaml")


def test_every_recipe_says_what_it_is_in_its_first_line() -> None:
    recipes = built_in_recipes()
    assert {"base", "deepscaler", FIRST} <= recipes.keys()
    for name, line in recipes.items():
        assert (BUILT_IN / f"{name}.yaml").read_text().startswith(f"# {line}\n")
        assert line.endswith("."), f"{name}: {line}"
        assert 20 < len(line) <= 118
    assert len(set(recipes.values())) == len(recipes)


def test_a_copy_is_the_same_run_and_is_never_overwritten(elsewhere: Path) -> None:
    assert copy_recipe(FIRST, Path()) == Path(f"{FIRST}.yaml")
    assert load_recipe(Path(f"{FIRST}.yaml")) == load_recipe(BUILT_IN / f"{FIRST}.yaml")
    assert copy_recipe(f"{FIRST}.yaml", Path("mine.yaml")) == Path("mine.yaml")
    Path("mine.yaml").write_text("edited")
    for name, destination, sentence in (
        (FIRST, Path("mine.yaml"), rf"recipe {FIRST} is not copied to mine\.yaml: File exists"),
        (FIRST, elsewhere, "File exists"),
        (FIRST, Path("absent/mine.yaml"), "No such file or directory"),
        ("mine", Path("other.yaml"), "recipe mine is neither a file nor a built-in recipe"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            copy_recipe(name, destination)
    assert Path("mine.yaml").read_text() == "edited"
