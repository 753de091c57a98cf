"""The algorithm section of a host's configuration, and advantages from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eapo_megatron.integrations.algorithm import Algorithm, batch_metrics


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"estimator": "grpo"}, "algorithm.estimator: unknown key"),
        ({"advantage_estimator": "gae"}, "algorithm.advantage_estimator must be one of"),
        ({"shaping": {"name": "hapo"}}, "algorithm.shaping: shaping must be one of"),
        ({"shaping": {"name": "eapo", "beta": 1.0}}, "algorithm.shaping: shaping 'eapo' has the options"),
        ({"shaping": {"alpha": 3.0}}, "algorithm.shaping: alpha must be in"),
        ({"shaping": {"alpha": "much"}}, "algorithm.shaping: "),
        ({"loss": {"clip": 0.2}}, "algorithm.loss.clip: unknown key"),
        ({"loss": {"name": "ppo"}}, "algorithm.loss: loss must be one of"),
        ({"loss": {"eps_low": 0}}, "algorithm.loss: eps_low must be positive"),
    ],
)
def test_a_wrong_key_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Algorithm.from_config(section, key="algorithm")


def test_defaults_are_the_papers() -> None:
    algorithm = Algorithm.from_config({}, key="algorithm")
    assert (algorithm.advantage_estimator, algorithm.shaping) == ("grpo", "eapo")
    assert (algorithm.loss.eps_low, algorithm.loss.eps_high, algorithm.loss.kl_coef) == (0.2, 0.28, 0.0)


@pytest.mark.parametrize("name", ["none", "eapo", "entropy_advantage", "forking_tokens", "quadrant"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "w_reinforce"])
def test_every_method_can_be_chosen(name: str, estimator: str) -> None:
    algorithm = Algorithm.from_config({"advantage_estimator": estimator, "shaping": {"name": name}}, key="algorithm")
    mask = torch.tensor([[False, True, True], [False, True, False]])
    entropies = torch.where(mask, torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]), torch.nan)
    advantages = algorithm.advantages(
        torch.tensor([1.0, -1.0]), torch.tensor([7, 7]), mask, log_probs=-entropies, entropies=entropies
    )
    assert advantages.dtype == torch.float32
    assert advantages.isfinite().all()
    assert not advantages[~mask].any()
    assert advantages[mask].any()


def test_metrics_are_means_over_tokens() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    entropies = torch.tensor([[1.0, 3.0], [5.0, torch.nan]])
    advantages = torch.tensor([[0.5, -0.5], [2.0, 0.0]])
    metrics = batch_metrics(
        torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), mask, entropies=entropies, advantages=advantages
    )
    assert metrics["entropy/mean"] == pytest.approx(3.0)
    assert metrics["advantage/mean_abs"] == pytest.approx(1.0)
    # mu_H is 3: one token each is low and correct, high and correct, high and wrong.
    assert [metrics[f"quadrants/{name}/token_share"] for name in ("phr", "plr", "nhr", "nlr")] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0.0]
    )
