"""Temperature, top-k and top-p against float64 definitions; draws against the distribution they come from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from eapo_megatron.rollout import sampling as sampling_module
from eapo_megatron.rollout.engine import SamplingParams, response_seed
from eapo_megatron.rollout.sampling import draw, filtered, response_uniforms, sample

ALMOST_ONE = math.nextafter(1.0, 0.0)


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities of one row: the top_k most probable, then of these the fewest whose mass reaches top_p."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    kept, mass, total = [], 0.0, math.fsum(weights[i] for i in order)
    for i in order:
        if top_p < 1 and mass / total >= top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 40),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_filtered_distribution(rows: int, vocab: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    kept = filtered((logits / temperature).exp(), SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    assert kept.dtype == torch.float32
    actual = kept.double() / kept.double().sum(-1, keepdim=True)
    near = [[reference(row, temperature, top_k, p) for row in logits.tolist()] for p in (top_p - 1e-5, top_p + 1e-5)]
    assume(top_p == 1 or [[x > 0 for x in row] for row in near[0]] == [[x > 0 for x in row] for row in near[1]])
    expected = [reference(row, temperature, top_k, top_p) for row in logits.tolist()]
    # Of the exponential of a float32 number of this size.
    rounding = (8 * float(logits.abs().max()) / temperature + 64) * 2.0**-24
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=rounding, atol=0)


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    weights = torch.tensor([[1.0, 0.6, 0.3, 0.1]])

    def kept(top_p: float) -> list[int]:
        return filtered(weights, SamplingParams(top_p=top_p))[0].nonzero().flatten().tolist()

    assert kept(0.01) == [0]
    assert kept(0.49) == [0]
    assert kept(0.51) == [0, 1]
    assert kept(0.79) == [0, 1]
    assert kept(0.81) == [0, 1, 2]
    assert kept(0.99) == [0, 1, 2, 3]


def test_top_k_1_is_certain() -> None:
    assert filtered(torch.tensor([[0.1, 2.0, 0.0]]), SamplingParams(top_k=1)).tolist() == [[0.0, 2.0, 0.0]]


def test_top_p_is_the_same_however_many_tokens_it_looks_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 to 900 tokens in the nucleus of a vocabulary of 1,000."""
    generator = torch.Generator().manual_seed(5)
    sharpness = torch.tensor([[0.0], [0.1], [1.0], [3.0], [10.0], [100.0]])
    weights = (torch.randn(6, 1000, generator=generator) * sharpness).softmax(-1)
    kept = {}
    for candidates in (1, 7, 256, 1000):
        monkeypatch.setattr(sampling_module, "CANDIDATES", candidates)
        kept[candidates] = filtered(weights, SamplingParams(top_p=0.9))
    assert all(torch.equal(kept[1000], other) for other in kept.values())
    for row, all_weights in zip(kept[1000], weights, strict=True):
        assert len(row.nonzero()) == fewest(all_weights.tolist(), 0.9)


def fewest(weights: list[float], top_p: float) -> int:
    """How many of the largest weights reach top_p of their sum."""
    mass, total = 0.0, math.fsum(weights)
    for count, weight in enumerate(sorted(weights, reverse=True)):
        if mass >= top_p * total:
            return count
        mass += weight
    return len(weights)


@given(
    vocab=st.integers(1, 40),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_log_probs_and_entropies_are_of_the_full_softmax(
    vocab: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Against float64, whatever top-k and top-p leave out; the kept mass is that of the tokens they keep."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocab, generator=generator) * 3
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    near = [[reference(row, temperature, top_k, p) for row in logits.tolist()] for p in (top_p - 1e-5, top_p + 1e-5)]
    assume(top_p == 1 or [[x > 0 for x in row] for row in near[0]] == [[x > 0 for x in row] for row in near[1]])
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, entropies=True)
    drawn = sample(logits, uniforms, sampling)
    assert drawn.entropies is not None
    for i, row in enumerate(logits.tolist()):
        everything = reference(row, temperature, 0, 1.0)
        kept = [x > 0 for x in reference(row, temperature, top_k, top_p)]
        token = int(drawn.tokens[i])
        assert kept[token]
        # Of values of up to 13 / temperature, in float32.
        bound = (8 * 13 / temperature + 64) * 2.0**-24
        assert float(drawn.log_probs[i]) == pytest.approx(math.log(everything[token]), abs=bound)
        mass = math.fsum(x for x, is_kept in zip(everything, kept, strict=True) if is_kept)
        assert float(drawn.kept_mass[i]) == pytest.approx(mass, rel=2 * bound)
        entropy = -math.fsum(x * math.log(x) for x in everything if x > 0)
        assert float(drawn.entropies[i]) == pytest.approx(entropy, abs=2 * bound)


def test_without_top_p_and_top_k_all_mass_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(50, 300, generator=generator) * 4, torch.rand(50, generator=generator)
    sampling = SamplingParams(temperature=0.7)
    drawn = sample(logits, uniforms, sampling)
    assert torch.equal(drawn.tokens, draw((logits / 0.7).softmax(-1), uniforms))
    assert torch.equal(drawn.kept_mass, torch.ones(50))
    assert drawn.entropies is None


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([0.125, 0.25, 0.5, 0.125])
    uniforms = torch.tensor([0.0, 0.1249, 0.126, 0.374, 0.376, 0.874, 0.876, ALMOST_ONE], dtype=torch.float64)
    tokens = draw(probabilities.expand(len(uniforms), -1), uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@given(vocab=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_draw_passes_the_uniform_where_the_cumulative_distribution_does(vocab: int, seed: int) -> None:
    """Over several blocks, against float64 sums."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(8, vocab, generator=generator) * 6).exp() * (torch.rand(8, vocab, generator=generator) < 0.7)
    weights[:, -1] += 1e-3
    uniforms = torch.rand(8, generator=generator, dtype=torch.float64)
    tokens = draw(weights, uniforms)
    for row, token, uniform in zip(weights.double().tolist(), tokens.tolist(), uniforms.tolist(), strict=True):
        total = math.fsum(row)
        assert row[token] > 0
        assert math.fsum(row[:token]) <= (uniform + 1e-6) * total
        assert math.fsum(row[: token + 1]) >= (uniform - 1e-6) * total


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.5, 1 - 1e-12, ALMOST_ONE])
@pytest.mark.parametrize(
    "weights",
    [[0, 0, 3, 0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0, 1e-7, 0], [1e-30, 1, 0], [0, 1, 1e-30, 0]],
)
def test_draw_never_takes_a_token_of_probability_zero(weights: list[float], uniform: float) -> None:
    for padding in (0, 61, 130):  # at the end of a block, and in a block before the last
        padded = torch.tensor([weights + [0] * padding], dtype=torch.float32)
        tokens = draw(padded, torch.tensor([uniform], dtype=torch.float64))
        assert padded[0, int(tokens)] > 0


@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 300), top_p=st.floats(0.05, 1.0))
def test_draw_stays_within_the_kept_tokens(seed: int, vocab: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab, generator=generator) * 8
    weights = filtered(logits.softmax(-1), SamplingParams(top_p=top_p))
    uniforms = torch.tensor([0.0, ALMOST_ONE, *torch.rand(4, generator=generator).tolist()], dtype=torch.float64)
    assert weights.gather(-1, draw(weights, uniforms).unsqueeze(-1)).min() > 0


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=2)])
def test_nan_is_told_of_its_own_row_alone(sampling: SamplingParams) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    logits[1, 70] = torch.nan
    drawn = sample(logits, torch.full((3,), 0.5), sampling)
    assert drawn.log_probs.isfinite().tolist() == [True, False, True]
    assert 0 <= int(drawn.tokens[1]) < 100


def test_draw_frequencies() -> None:
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    count = 40_000
    uniforms = response_uniforms([7], count)[0]
    tokens = draw(probabilities.float().expand(count, -1), uniforms)
    frequencies = torch.bincount(tokens, minlength=5) / count
    deviations = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * deviations).all()


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    weights = torch.randn(5, 111, generator=torch.Generator().manual_seed(0)).exp()
    uniforms = response_uniforms([1, 2, 3, 4, 5], 1)[:, 0]
    tokens = draw(weights, uniforms)
    alone = [draw(weights[row : row + 1], uniforms[row : row + 1]).item() for row in range(5)]
    assert tokens.tolist() == alone


def test_uniforms_depend_on_their_own_seed_alone() -> None:
    together = response_uniforms([3, 9], 6)
    assert torch.equal(together[1], response_uniforms([9], 6)[0])
    assert torch.equal(together[1, :4], response_uniforms([9], 4)[0])
    assert not torch.equal(together[0], together[1])
    assert ((together >= 0) & (together < 1)).all()


def test_response_seeds_differ_in_every_part() -> None:
    def seeds() -> Tensor:
        draws = [
            (run, stream, i, j) for run in (0, 1) for stream in ("train", "eval") for i in range(12) for j in range(12)
        ]
        return torch.tensor([response_seed(*parts) for parts in draws])

    assert len(seeds().unique()) == 2 * 2 * 12 * 12
    assert torch.equal(seeds(), seeds())
    assert (seeds() >= 0).all()
