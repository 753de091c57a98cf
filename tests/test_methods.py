"""`method` in a recipe: what each name stands for, what goes above it, and that a printed recipe needs no table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from eapo_megatron.algorithms import LossInputs
from eapo_megatron.cli import app
from eapo_megatron.config import METHODS, RecipeError
from eapo_megatron.config.methods import OfResponse
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.saved_recipe import experiment, resolved

TINY = "eapo-qwen2-tiny-arithmetic-1n2g-tp2"
NAMES = (
    "eapo grpo dapo w_reinf entro_reg entro_adv forking kl_cov clip_cov ce_gppo dr_grpo rloo gspo cispo phr plr nhr nlr"
)
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def at(settings: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings


def recipe_of(tmp_path: Path, text: str, *overrides: str) -> dict[str, Any]:
    path = tmp_path / "own.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{task: arithmetic}}\n{text}")
    return resolved(load_recipe(path, overrides))


def test_the_methods_are_these() -> None:
    assert list(METHODS) == NAMES.split()


def test_the_page_names_every_method_and_the_three_papers_called_hapo() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "arxiv.org" in line or "Sec. 4.1 |" in line]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(METHODS)
    for paper in ("2604.11056 v2", "2509.16591", "2603.11321"):
        assert paper in page


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_settings(tmp_path: Path, name: str) -> None:
    settings = recipe_of(tmp_path, f"method: {name}\nrollout: {{max_response_tokens: 1000}}\n")
    assert settings["method"] == name
    for key, value in METHODS[name].items():
        assert at(settings, key) == (int(1000 * value.share) if isinstance(value, OfResponse) else value), key


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("grpo", "algorithm.loss.kl_coef", 0.04),
        ("grpo", "algorithm.loss.eps_high", 0.2),
        ("eapo", "algorithm.loss.eps_high", 0.28),
        ("eapo", "algorithm.shaping.alpha", 0.2),
        ("dapo", "reward.overlong.buffer_tokens", 614),  # a fifth of 3,072
        ("dapo", "algorithm.dynamic_sampling_rounds", 4),
        ("w_reinf", "algorithm.advantage_estimator", "w_reinforce"),
        ("kl_cov", "algorithm.loss.fraction", 2e-3),
        ("kl_cov", "algorithm.loss.coefficient", 1.0),
        ("clip_cov", "algorithm.loss.covariance_high", 5.0),
        ("dr_grpo", "algorithm.loss.aggregation_length", 3072),
        ("gspo", "algorithm.loss.aggregation", "seq_mean_token_mean"),
        ("cispo", "algorithm.loss.eps_low", 1.0),
        ("entro_reg", "algorithm.loss.entropy_target", 0.2),
        ("nlr", "algorithm.shaping.only", ["nlr"]),
    ],
)
def test_settings_of_the_papers(tmp_path: Path, name: str, key: str, value: object) -> None:
    assert at(recipe_of(tmp_path, f"method: {name}\n"), key) == value


def test_no_clip_range_is_left_of_a_loss_without_one(tmp_path: Path) -> None:
    assert not {"eps_low", "eps_high"} & recipe_of(tmp_path, "method: kl_cov\n")["algorithm"]["loss"].keys()


def test_what_the_recipe_says_itself_wins(tmp_path: Path) -> None:
    text = "method: dapo\nalgorithm: {loss: {eps_high: 0.4}, dynamic_sampling_rounds: 2}\n"
    settings = recipe_of(tmp_path, text, "method=eapo", "algorithm.shaping.alpha=0.5")
    assert settings["method"] == "eapo"
    assert at(settings, "algorithm.shaping") == {"name": "eapo", "alpha": 0.5, "phi": 2.0, "without": []}
    assert at(settings, "algorithm.loss.eps_high") == 0.4
    assert at(settings, "algorithm.loss.eps_low") == 0.2
    assert at(settings, "algorithm.dynamic_sampling_rounds") == 2
    assert at(settings, "reward.overlong.buffer_tokens") == 0


def test_another_function_takes_the_methods_options_with_it(tmp_path: Path) -> None:
    settings = recipe_of(
        tmp_path, "method: eapo\nalgorithm: {shaping: {name: none}, loss: {name: cispo, eps_high: 3}}\n"
    )
    assert at(settings, "algorithm.shaping") == {"name": "none"}
    loss = at(settings, "algorithm.loss")
    assert (loss["name"], loss["eps_low"], loss["eps_high"]) == ("cispo", 1.0, 3)
    assert loss["aggregation"] == "token_mean"


def test_an_unknown_method_is_one_sentence_with_the_known_ones(tmp_path: Path) -> None:
    for text in ("method: hapo\n", "method: 7\n", "method: [eapo]\n"):
        with pytest.raises(RecipeError) as caught:
            recipe_of(tmp_path, text)
        assert f"own.yaml: method: must be one of {NAMES.replace(' ', ', ')}, got " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_printed_recipe_is_complete_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    printed = CliRunner().invoke(app, ["train", TINY, f"method={name}", "--dry-run"]).stdout
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    before = load_recipe(TINY, [f"method={name}"])
    monkeypatch.setattr("eapo_megatron.config.methods.METHODS", {name: {}})  # the table of another version
    assert yaml.safe_load(printed) == resolved(load_recipe(path))
    assert experiment(load_recipe(path)) == experiment(before)


def test_eapo_without_alpha_is_grpo(tmp_path: Path) -> None:
    """With the clip range, KL and sampling of EAPO, in value and gradient."""
    alike = "algorithm: {loss: {eps_high: 0.28, kl_coef: 0}, dynamic_sampling_rounds: 4}\n"
    algorithms, settings = {}, {}
    for name, own in (("grpo", []), ("eapo", ["algorithm.shaping.alpha=1e-9"])):
        (tmp_path / f"{name}.yaml").write_text(
            f"method: {name}\nmodel: {{path: m}}\ndata: {{task: arithmetic}}\n{alike}"
        )
        recipe = load_recipe(tmp_path / f"{name}.yaml", own)
        algorithms[name], settings[name] = recipe.make_algorithm(), experiment(recipe)
        for key in ("name", "algorithm.shaping"):
            section, _, last = key.rpartition(".")
            (at(settings[name], section) if section else settings[name]).pop(last)
    assert settings["grpo"] == settings["eapo"]

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 12, generator=generator) < 0.8
    log_probs = -torch.rand(8, 12, generator=generator)
    entropies, shift = torch.rand(8, 12, generator=generator), 0.3 * torch.randn(8, 12, generator=generator)
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    group_ids = torch.arange(2).repeat_interleave(4)
    results = {}
    for name, algorithm in algorithms.items():
        advantages = algorithm.advantages(rewards, group_ids, mask, log_probs=log_probs, entropies=entropies)
        current = (log_probs + shift).requires_grad_()
        weights = algorithm.weights(mask, group_ids)
        loss = algorithm.loss(LossInputs(current, log_probs, advantages, mask, weights=weights)).loss
        results[name] = loss, torch.autograd.grad(loss, current)[0]
    torch.testing.assert_close(results["eapo"], results["grpo"], rtol=0, atol=1e-6)
    assert results["grpo"][1].abs().max() > 1e-3


def test_the_name_is_no_part_of_the_experiment() -> None:
    recipe = load_recipe(TINY)
    assert recipe.method == "eapo"
    assert experiment(recipe) == experiment(recipe.model_copy(update={"method": None}))
