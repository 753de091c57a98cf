import math
import statistics as reference
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import Batch, batches

from eapo_megatron.algorithms import QUADRANTS, SHAPINGS, ShapingInputs, eapo_advantages, shape_advantages

ROUNDING = 1.001 * 2.0**-24  # to float32: of the result once, of the largest entropy term three times


def shaping_inputs(batch: Batch) -> ShapingInputs:
    return ShapingInputs(
        advantages=batch.advantages,
        entropies=batch.entropies,
        mask=batch.mask,
        group_ids=batch.group_ids,
        rewards=batch.rewards,
        log_probs=batch.log_probs,
    )


def expected_eapo(batch: Batch, alpha: float, phi: float, without: tuple[str, ...] = ()) -> torch.Tensor:
    shaped = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, t in batch.mask.nonzero().tolist():
        group = [float(batch.entropies[j, s]) for j, s in batch.tokens(int(batch.group_ids[i]))]
        mean, std = math.fsum(group) / len(group), reference.pstdev(group)
        advantage, entropy = float(batch.advantages[i, t]), float(batch.entropies[i, t])
        bound = abs(advantage) / phi
        term = min(max((entropy - mean) / std, -bound), bound) if std > 0 else 0.0
        if ("p" if batch.rewards[i] > 0 else "n") + ("h" if entropy >= mean else "l") + "r" in without:
            term = 0.0
        shaped[i, t] = advantage + alpha * ((advantage > 0) - (advantage < 0)) * term
    return shaped


@given(
    batch=batches(),
    alpha=st.floats(0.01, 1.0),
    excess=st.floats(0.01, 4.0),
    without=st.sampled_from([(), ("phr",), ("nlr", "plr"), QUADRANTS]),
)
def test_eapo_matches_equations_6_and_7(batch: Batch, alpha: float, excess: float, without: tuple[str, ...]) -> None:
    phi = alpha + excess
    shaped = eapo_advantages(
        batch.advantages,
        batch.entropies,
        batch.mask,
        batch.group_ids,
        alpha=alpha,
        phi=phi,
        rewards=batch.rewards,
        without=without,
    )
    assert shaped.dtype == torch.float32
    expected = expected_eapo(batch, alpha, phi, without)
    size = expected.abs() + 3 * alpha / phi * torch.where(batch.mask, batch.advantages, 0.0).double().abs()
    assert bool(((shaped.double() - expected).abs() <= ROUNDING * size).all())


@given(batch=batches(), alpha=st.floats(0.01, 1.0), excess=st.floats(0.01, 4.0))
def test_eapo_keeps_signs_and_stays_within_its_bound(batch: Batch, alpha: float, excess: float) -> None:
    phi = alpha + excess
    shaped = eapo_advantages(
        batch.advantages, batch.entropies, batch.mask, batch.group_ids, alpha=alpha, phi=phi
    ).double()
    advantages = torch.where(batch.mask, batch.advantages, 0.0).double()
    assert torch.equal(shaped.sign(), advantages.sign())
    rounding = ROUNDING * (1 + 3 * alpha / phi)
    assert bool(((shaped - advantages).abs() <= advantages.abs() * (alpha / phi + rounding)).all())
    assert not shaped[~batch.mask].any()


def test_eapo_keeps_advantages_exactly_where_entropy_is_constant() -> None:
    advantages = torch.tensor([[0.3], [-0.7]]).expand(2, 1000)
    mask = torch.ones(2, 1000, dtype=torch.bool)
    shaped = eapo_advantages(advantages, torch.full((2, 1000), 0.1), mask, torch.tensor([4, 4]))
    assert torch.equal(shaped, advantages)


def test_eapo_moves_credit_towards_high_entropy_in_both_polarities() -> None:
    entropies = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    shaped = eapo_advantages(advantages, entropies, torch.ones(2, 2, dtype=torch.bool), torch.tensor([1, 1]))
    torch.testing.assert_close(shaped, torch.tensor([[0.9, 1.1], [-0.9, -1.1]]))


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_no_shaping_carries_a_gradient(name: str) -> None:
    inputs = ShapingInputs(
        advantages=torch.ones(2, 3, requires_grad=True),
        entropies=torch.rand(2, 3).requires_grad_(),
        mask=torch.ones(2, 3, dtype=torch.bool),
        group_ids=torch.tensor([1, 1]),
        rewards=torch.ones(2),
        log_probs=-torch.rand(2, 3).requires_grad_(),
    )
    assert not shape_advantages(name, inputs).requires_grad


def test_eapo_advantages_carry_no_gradient() -> None:
    entropies = torch.rand(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not eapo_advantages(torch.ones(2, 3), entropies, mask, torch.tensor([1, 1])).requires_grad


@given(batch=batches())
def test_shapings_by_name_match_their_definitions(batch: Batch) -> None:
    inputs = shaping_inputs(batch)
    mask = batch.mask
    advantages = torch.where(mask, batch.advantages, 0.0).double()
    entropies = torch.where(mask, batch.entropies, 0.0).double()

    def check(shaped: torch.Tensor, expected: torch.Tensor) -> None:
        assert shaped.dtype == torch.float32
        torch.testing.assert_close(shaped, expected.float(), rtol=1e-6, atol=1e-7)

    check(shape_advantages("none", inputs), advantages)
    check(shape_advantages("eapo", inputs), expected_eapo(batch, 0.2, 2.0))
    check(shape_advantages("eapo", inputs, alpha=0.5, without=["nhr"]), expected_eapo(batch, 0.5, 2.0, ("nhr",)))
    psi = (0.3 * entropies).minimum(advantages.abs() / 1.5)
    check(shape_advantages("entropy_advantage", inputs, a=0.3, kappa=1.5), advantages + psi)
    if mask.any():
        descending = entropies[mask].sort(descending=True).values
        threshold = descending[max(1, round(0.2 * len(descending))) - 1]
        check(shape_advantages("forking_tokens", inputs), advantages * ((entropies >= threshold) & mask))
    isolated = [shape_advantages("quadrant", inputs, only=[name]) for name in QUADRANTS]
    check(sum(isolated), advantages)
    assert torch.equal(shape_advantages("quadrant", inputs, only=("phr", "nlr")), isolated[0] + isolated[3])
    assert not isolated[0][batch.rewards < 0].any()


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    inputs = ShapingInputs(
        torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([1]), torch.ones(1),
        torch.ones(1, 2),
    )  # fmt: skip
    for options, message in (
        ({"name": "hapo"}, "shaping must be one of none, eapo, .*, got 'hapo'"),
        (
            {"name": "eapo", "beta": 1.0},
            "^beta is not a key of the shaping 'eapo': the known ones are alpha, phi, without$",
        ),
        ({"name": "eapo", "alhpa": 0.2}, r"^alhpa is not a key of the shaping 'eapo' \(did you mean alpha\?\): "),
        ({"name": "eapo", "alpha": "much"}, "^alpha must be a number, got 'much'$"),
        ({"name": "none", "alpha": 0.2}, "^alpha is not a key of the shaping 'none': it has none$"),
        ({"name": "quadrant", "only": ["phl"]}, "only must hold names among phr, plr, nhr, nlr, got 'phl'"),
        ({"name": "forking_tokens", "fraction": 0.0}, "fraction must be in"),
        ({"name": "entropy_advantage", "kappa": 1.0}, "kappa must be larger than 1"),
        ({"name": "entropy_advantage", "a": -0.1}, "a must be positive"),
    ):
        name = str(options.pop("name"))
        with pytest.raises(ValueError, match=message):
            shape_advantages(name, inputs, **options)
    for field, value, message in (
        ("log_probs", torch.full((1, 2), float("nan")), "log_probs must be finite"),
        ("entropies", torch.ones(1, 3), "entropies must have the mask's shape"),
        ("rewards", torch.ones(2), "rewards must have shape"),
        ("rewards", torch.tensor([math.nan]), "rewards must not be NaN where .* under the mask: response 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(inputs, **{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\]"),
        ({"alpha": 1.1}, r"alpha must be in \(0, 1\]"),
        ({"alpha": float("nan")}, r"alpha must be in \(0, 1\]"),
        ({"phi": 0.2}, "phi must be larger than alpha"),
        ({"without": ["phr"]}, "rewards are needed"),
        ({"without": ["all"], "rewards": torch.ones(1)}, "without must hold names among"),
        ({"without": ["phr"], "rewards": torch.tensor([math.nan])}, "rewards must not be NaN"),
        ({"advantages": torch.full((1, 2), float("nan"))}, "advantages must be finite"),
        ({"entropies": torch.full((1, 2), float("nan"))}, "entropies must be finite"),
        ({"mask": torch.ones(1, 2)}, "mask must be boolean"),
        ({"group_ids": torch.tensor([1, 2])}, "group_ids must have shape"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    arguments = {
        "advantages": torch.ones(1, 2),
        "entropies": torch.ones(1, 2),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "group_ids": torch.tensor([1]),
    } | change
    with pytest.raises(ValueError, match=message):
        eapo_advantages(**arguments)
