"""Weights out of every layout, right after they were loaded: the folder's own, in one order, a parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eapo_megatron.weights.families import family_of
from layouts import LAYOUTS, MODELS

Measured = Callable[[str], dict[str, Any]]


BOTH = pytest.mark.parametrize("leaders_only", [0, 1])


@BOTH
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_the_folders_on_every_rank_that_gets_it(
    name: str, leaders_only: int, measured: Measured
) -> None:
    exported = measured(name)["export"][leaders_only]
    hf_config = MODELS[LAYOUTS[name].model]
    assert exported["names"] == list(family_of(hf_config).hf_shapes(hf_config))
    assert exported["same_order"]
    assert exported["different"] == []


@BOTH
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_one_gathered_parameter_at_a_time(name: str, leaders_only: int, measured: Measured) -> None:
    """Its shards with what they are joined to, then that with what it is split into; a model holds ten such and more.

    Threads of the process group may still hold tensors of the one before for a moment.
    """
    assert measured(name)["export"][leaders_only]["peak"] < 5
