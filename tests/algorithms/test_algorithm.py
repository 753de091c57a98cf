"""The algorithm from a section of a configuration: wrong keys, what it needs, advantages, loss and metrics from it."""

from __future__ import annotations

import math
import pickle
import statistics as reference
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from random_batches import random_batch
from torch import Tensor

from eapo_megatron.algorithms import LOSSES, SHAPINGS, Algorithm, LossInputs, LossSettings, Needs, ShapingInputs, reads
from eapo_megatron.algorithms.losses import TokenLoss


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"estimator": "grpo"}, "algorithm.estimator is not a key of the algorithm (did you mean advantage_estima"),
        ({"dynamic": 1}, "algorithm.dynamic is not a key of the algorithm: the known ones are advantage_estimator"),
        ({"shapign": {}}, "algorithm.shapign is not a key of the algorithm (did you mean shaping?)"),
        ({"advantage_estimator": "gae"}, "algorithm.advantage_estimator must be one of grpo, dr_grpo, rloo, w_rein"),
        ({"shaping": {"name": "hapo"}}, "algorithm.shaping.name must be one of none, eapo, "),
        ({"shaping": "eapo"}, "algorithm.shaping must be a mapping of name and options, got 'eapo'"),
        ({"shaping": {"name": "eapo", "beta": 1.0}}, "algorithm.shaping.beta is not a key of the shaping 'eapo'"),
        ({"shaping": {"alpha": 3.0}}, "algorithm.shaping.alpha must be in (0, 1], got 3.0"),
        ({"shaping": {"alpha": "much"}}, "algorithm.shaping.alpha must be a number, got 'much'"),
        ({"shaping": {"without": 7}}, "algorithm.shaping: "),
        (
            {"loss": {"clip": 0.2}},
            "algorithm.loss.clip is not a key of the loss 'clipped_surrogate' (did you mean dual_clip?)",
        ),
        ({"loss": {"options": {}}}, "algorithm.loss.options is not a key of the loss"),
        ({"loss": {"loss": "clipped_surrogate"}}, "algorithm.loss.loss is not a key of the loss"),
        ({"loss": {"eps_hi": 0.3}}, "algorithm.loss.eps_hi is not a key of the loss 'clipped_surrogate' (did you mean"),
        ({"loss": {"name": "ppo"}}, "algorithm.loss.name must be one of clipped_surrogate, "),
        ({"loss": {"name": "negative_log_likelihood", "eps_low": 0.2}}, "algorithm.loss.eps_low is not a key of"),
        ({"loss": {"eps_low": 0}}, "algorithm.loss.eps_low must be in (0, 1), got 0"),
        ({"loss": {"aggregation": "mean"}}, "algorithm.loss.aggregation must be one of token_mean, "),
        ({"loss": {"entropy_coef": "much"}}, "algorithm.loss.entropy_coef must be a number, got 'much'"),
        ({"loss": {"kl_estimator": ["k3"]}}, "algorithm.loss.kl_estimator must be one of k1, k2, k3"),
        ({"loss": {"name": "kl_cov", "fraction": 0}}, "algorithm.loss.fraction must be in (0, 1], got 0"),
        ({"loss": {"name": "kl_cov", "eps_low": 0.2}}, "algorithm.loss.eps_low is not a key of the loss 'kl_cov'"),
        ({"loss": {"name": "cispo", "eps_low": 1.1}}, "algorithm.loss.eps_low must be in (0, 1], got 1.1"),
        ({"loss": {"name": "ce_gppo", "beta_low": -1}}, "algorithm.loss.beta_low must be finite and not negative"),
        ({"quadrant_threshold": "median"}, "algorithm.quadrant_threshold must be one of mean, q25, q50, q75, kmeans"),
    ],
)
def test_a_wrong_key_is_named(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  compared below
        Algorithm.from_config(section, key="algorithm")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_defaults_are_the_papers() -> None:
    algorithm = Algorithm.from_config({}, key="algorithm")
    assert algorithm == Algorithm()
    assert (algorithm.advantage_estimator, algorithm.shaping) == ("grpo", "eapo")
    assert algorithm.shaping_options == {"alpha": 0.2, "phi": 2.0, "without": ()}
    assert algorithm.loss_settings.options == {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 0.0}
    assert (algorithm.loss_settings.kl_coef, algorithm.loss_settings.entropy_coef) == (0.0, 0.0)
    assert algorithm.positive_threshold == 0.0
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    with pytest.raises(ValueError, match=r"^positive_threshold must be finite"):
        Algorithm(positive_threshold=math.nan)


@pytest.mark.parametrize(
    ("section", "needs"),
    [
        ({}, Needs(entropies=True, entropy_grad=False, ref_log_probs=False, rollout_log_probs=False)),
        ({"shaping": {"name": "none"}}, Needs(False, False, False, False)),
        ({"loss": {"kl_coef": 0.1}}, Needs(True, False, True, False)),
        ({"loss": {"name": "kl_cov"}}, Needs(True, False, False, False, selected=True)),
        ({"loss": {"name": "clip_cov"}}, Needs(True, False, False, False, selected=True, draws=True)),
        ({"loss": {"entropy_target": 0.2}}, Needs(True, False, False, False, entropy_control=True)),
        ({"shaping": {"name": "none"}, "loss": {"entropy_coef": -0.1}}, Needs(False, True, False, False)),
    ],
)
def test_needs_come_from_the_settings(section: dict[str, Any], needs: Needs) -> None:
    assert Algorithm.from_config(section, key="algorithm").needs == needs


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_a_shaping_says_whether_it_reads_entropies(name: str) -> None:
    batch = random_batch(9, 6, 1)
    algorithm = Algorithm(shaping=name)
    arguments = (batch.rewards, batch.group_ids, batch.mask)
    shaped = algorithm.advantages(*arguments, log_probs=batch.log_probs, entropies=batch.entropies)
    if algorithm.needs.entropies:
        assert not torch.equal(
            shaped, algorithm.advantages(*arguments, log_probs=batch.log_probs, entropies=-batch.entropies)
        )
        with pytest.raises(ValueError, match=f"entropies are needed by the shaping '{name}'"):
            algorithm.advantages(*arguments, log_probs=batch.log_probs)
    else:
        assert torch.equal(shaped, algorithm.advantages(*arguments, log_probs=batch.log_probs))


def test_groups_are_as_large_as_the_estimator_wants() -> None:
    Algorithm().check_group_size(2, key="generations")
    Algorithm("w_reinforce").check_group_size(1, key="generations")
    with pytest.raises(ValueError, match=r"^generations is 1: the group estimator rloo needs at least 2$"):
        Algorithm("rloo").check_group_size(1, key="generations")


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


@pytest.mark.parametrize("positive_threshold", [0.0, 0.5])
def test_without_verdicts_and_with_a_threshold_against_a_loop(positive_threshold: float) -> None:
    """Rewards of 0, 0.25, 1 and none; EAPO without one quadrant, W-REINFORCE, weights and metrics, in float64."""
    batch = random_batch(9, 6, 3)
    rewards = torch.tensor([0.0, 1.0, math.nan, 0.25, 1.0, math.nan, 0.0, 0.25, 1.0])
    group_ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    judged = [i for i in range(9) if not math.isnan(float(rewards[i]))]
    mask = batch.mask & ~rewards.isnan()[:, None]
    tokens = [(i, t) for i, t in batch.mask.nonzero().tolist() if i in judged]
    algorithm = Algorithm.from_config(
        {"shaping": {"without": ["nhr"]}, "loss": {"aggregation": "group_token_mean"}},
        key="algorithm",
        positive_threshold=positive_threshold,
    )
    arguments = (rewards, group_ids, mask)
    advantages = algorithm.advantages(*arguments, log_probs=batch.log_probs, entropies=batch.entropies)
    raw = Algorithm("w_reinforce", "quadrant", {"only": ["phr", "plr"]}, positive_threshold=positive_threshold)
    raw_advantages = raw.advantages(*arguments, log_probs=batch.log_probs, entropies=batch.entropies)
    weights = algorithm.weights(mask, group_ids)
    metrics = algorithm.metrics(*arguments, entropies=batch.entropies, advantages=advantages)

    expected, expected_raw, expected_weights = torch.zeros(3, 9, 6, dtype=torch.float64)
    shares = dict.fromkeys(("phr", "plr", "nhr", "nlr"), 0.0)
    for i, t in tokens:
        group = [j for j in judged if group_ids[j] == group_ids[i]]
        scores = [float(rewards[j]) for j in group]
        group_tokens = [float(batch.entropies[j, s]) for j, s in tokens if j in group]
        advantage = (float(rewards[i]) - reference.fmean(scores)) / (reference.stdev(scores) + 1e-6)
        entropy, mean, std = float(batch.entropies[i, t]), reference.fmean(group_tokens), reference.pstdev(group_tokens)
        correct, high = float(rewards[i]) > positive_threshold, entropy >= mean
        shares[("p" if correct else "n") + ("h" if high else "l") + "r"] += 1 / len(tokens)
        bound = abs(advantage) / 2
        term = 0.0 if high and not correct else max(min((entropy - mean) / std, bound), -bound)
        expected[i, t] = advantage + 0.2 * math.copysign(1, advantage) * term
        expected_raw[i, t] = 0.1 if correct else 0.0
        expected_weights[i, t] = 1 / (3 * len(group_tokens))
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw_advantages.double(), expected_raw, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-6, atol=0)
    assert metrics["entropy/mean"] == pytest.approx(reference.fmean(float(batch.entropies[i, t]) for i, t in tokens))
    assert metrics["advantage/mean_abs"] == pytest.approx(float(expected.abs().sum()) / len(tokens), rel=1e-5)
    assert {name: metrics[f"quadrants/{name}/token_share"] for name in shares} == pytest.approx(shares)

    with pytest.raises(ValueError, match=r"^rewards must not be NaN where a response has tokens under the mask: resp"):
        algorithm.advantages(rewards, group_ids, batch.mask, log_probs=batch.log_probs, entropies=batch.entropies)


def test_metrics_are_means_over_tokens() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    entropies = torch.tensor([[1.0, 3.0], [5.0, torch.nan]])
    advantages = torch.tensor([[0.5, -0.5], [2.0, 0.0]])
    metrics = Algorithm().metrics(
        torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), mask, entropies=entropies, advantages=advantages
    )
    assert metrics["entropy/mean"] == pytest.approx(3.0)
    assert metrics["advantage/mean_abs"] == pytest.approx(1.0)
    # mu_H is 3: one token each is low and correct, high and correct, high and wrong.
    assert [metrics[f"quadrants/{name}/token_share"] for name in ("phr", "plr", "nhr", "nlr")] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0.0]
    )


def test_a_shaping_of_the_users_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("users_shapings")

    @reads("entropies")
    def doubled(inputs: ShapingInputs, *, process_group: Any = None, factor: float = 2.0) -> Tensor:
        return factor * inputs.advantages

    def broken(inputs: ShapingInputs, *, process_group: Any = None) -> Tensor:
        return inputs.colour  # type: ignore[attr-defined]

    def narrow(inputs: ShapingInputs, *, process_group: Any = None) -> Tensor:
        return inputs.rewards

    def silent(inputs: ShapingInputs, *, process_group: Any = None) -> None:
        return None

    vars(module).update(doubled=doubled, broken=broken, narrow=narrow, silent=silent)
    monkeypatch.setitem(sys.modules, "users_shapings", module)

    def of(name: str, **options: Any) -> Algorithm:
        section = {"shaping": {"name": f"users_shapings:{name}", **options}}
        return Algorithm.from_config(section, key="algorithm")

    algorithm = of("doubled", factor=3)
    assert algorithm.needs.entropies
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    one = torch.ones(2, 1)
    advantages = algorithm.advantages(
        torch.tensor([1.0, -1.0]), torch.tensor([1, 1]), one.bool(), log_probs=one, entropies=one
    )
    torch.testing.assert_close(advantages, torch.tensor([[3 * math.sqrt(0.5)], [-3 * math.sqrt(0.5)]]))
    for name, sentence in (
        (
            "broken",
            r"algorithm\.shaping: the shaping 'users_shapings:broken' fails on one token: AttributeError: .*colour",
        ),
        ("narrow", r"algorithm\.shaping: what the shaping 'users_shapings:narrow' returns must have the mask's shape"),
        ("silent", r"algorithm\.shaping: the shaping 'users_shapings:silent' must return a tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            of(name)
    with pytest.raises(
        ValueError, match=r"^algorithm\.shaping\.factr is not a key of the shaping 'users_shapings:doub"
    ):
        of("doubled", factr=1)


@reads("rollout_log_probs")
def truncated_reinforce(inputs: LossInputs, *, cap: float = 2.0) -> TokenLoss:
    """-min(pi_old / pi_rollout, cap) A log pi."""
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    assert inputs.rollout_log_probs is not None
    importance = (inputs.old_log_probs - inputs.rollout_log_probs).exp().clamp(max=cap)
    return -importance * inputs.advantages * inputs.log_probs, {"importance/mean": importance}


def test_a_new_loss_with_an_option_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "truncated_reinforce", truncated_reinforce)
    section = {"loss": {"name": "truncated_reinforce", "cap": 1.25}}
    algorithm = Algorithm.from_config(section, key="algorithm")
    assert algorithm.needs == Needs(entropies=True, entropy_grad=False, ref_log_probs=False, rollout_log_probs=True)
    assert Algorithm.from_config({"loss": {"name": "truncated_reinforce"}}, key="a").loss_settings.options["cap"] == 2.0
    assert LossSettings("truncated_reinforce", cap=1.25) == algorithm.loss_settings

    batch = random_batch(9, 6, 5)
    generator = torch.Generator().manual_seed(0)
    log_probs = batch.log_probs.clone().requires_grad_()
    rollout = batch.log_probs + 0.5 * torch.randn(9, 6, generator=generator)
    weights = algorithm.weights(batch.mask, batch.group_ids)
    fields = {"log_probs": log_probs, "old_log_probs": batch.log_probs, "advantages": batch.advantages}
    outputs = algorithm.loss(LossInputs(mask=batch.mask, weights=weights, rollout_log_probs=rollout, **fields))
    (gradient,) = torch.autograd.grad(outputs.loss, log_probs)
    tokens = batch.mask.nonzero().tolist()
    expected, loss = torch.zeros(9, 6, dtype=torch.float64), 0.0
    importances = []
    for i, t in tokens:
        importances.append(min(math.exp(float(batch.log_probs[i, t]) - float(rollout[i, t])), 1.25))
        expected[i, t] = -importances[-1] * float(batch.advantages[i, t]) / len(tokens)
        loss += float(expected[i, t]) * float(batch.log_probs[i, t])
    assert 1.25 in importances
    assert min(importances) < 1
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-5)
    assert outputs.metrics["importance/mean"].item() == pytest.approx(reference.fmean(importances), rel=1e-5)

    with pytest.raises(ValueError, match=r"^rollout_log_probs are needed by LossSettings"):
        algorithm.loss(LossInputs(mask=batch.mask, weights=weights, **fields))
    for option, sentence in (
        ({"cap": 0.0}, "^a.loss.cap must be positive, got 0.0$"),
        ({"eps_low": 0.2}, "^a.loss.eps_low is not a key of the loss 'truncated_reinforce': .*entropy_coef_step, cap$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Algorithm.from_config({"loss": {"name": "truncated_reinforce", **option}}, key="a")


def test_a_loss_that_reads_what_it_did_not_declare_is_found_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def undeclared(inputs: LossInputs) -> TokenLoss:
        return inputs.log_probs * inputs.ref_log_probs, {}  # type: ignore[operator]

    monkeypatch.setitem(LOSSES, "undeclared", undeclared)
    with pytest.raises(ValueError, match=r"^algorithm.loss: .*NoneType"):
        Algorithm.from_config({"loss": {"name": "undeclared"}}, key="algorithm")


def test_a_new_shaping_with_an_option_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def likely(inputs: ShapingInputs, *, process_group: Any = None, factor: float = 2.0) -> Tensor:
        return torch.where(inputs.mask & (inputs.log_probs > -0.5), factor * inputs.advantages, 0.0)

    monkeypatch.setitem(SHAPINGS, "likely", likely)
    algorithm = Algorithm.from_config({"shaping": {"name": "likely", "factor": 3}}, key="algorithm")
    log_probs, mask = torch.tensor([[-0.1, -0.9], [-0.2, -0.3]]), torch.ones(2, 2, dtype=torch.bool)
    advantages = algorithm.advantages(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]), mask, log_probs=log_probs)
    root = math.sqrt(0.5)  # of rewards +1 and -1, Bessel's standard deviation is sqrt(2)
    torch.testing.assert_close(advantages, 3 * torch.tensor([[root, 0.0], [-root, -root]]))
    with pytest.raises(ValueError, match=r"^algorithm.shaping.fator is not a key of the shaping 'likely' .*factor"):
        Algorithm.from_config({"shaping": {"name": "likely", "fator": 3}}, key="algorithm")
