"""The embedded engine: tokens alike in every layout and batch, the policy's own log-probs, greedy as transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from eapo_megatron.config import Parallel
from eapo_megatron.rollout.sampling import response_uniforms
from hf_reference import one_thread, tiny_model
from layouts import LAYOUTS, RESPONSE_TOKENS, ROLLOUT_PROMPTS, ROLLOUT_SEEDS, STOP_TOKENS, TEMPERATURE, Response

Measured = Callable[[str], dict[str, Any]]
ROLLOUTS = [name for name, layout in LAYOUTS.items() if layout.rollouts]
JOINED = [name for name in ROLLOUTS if Parallel(**LAYOUTS[name].parallel).experts_join_replicas]
TIED = [name for name in ROLLOUTS if LAYOUTS[name].model == "tied" and name != "single"]


def tokens_of(groups: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.tokens for response in group] for group in groups]


def flat(groups: list[list[Response]]) -> Iterator[Response]:
    return (response for group in groups for response in group)


def assert_same(actual: list[list[Response]], expected: list[list[Response]]) -> None:
    """Equal tokens and ends; log-probs up to the rounding of another batch shape or layout."""
    assert tokens_of(actual) == tokens_of(expected)
    for one, other in zip(flat(actual), flat(expected), strict=True):
        assert one.finished == other.finished
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_greedy_responses_are_those_of_transformers(name: str, measured: Measured) -> None:
    model = tiny_model(LAYOUTS[name].model)
    groups = measured(name)["rollouts"]["greedy"]
    for prompt, group in zip(ROLLOUT_PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=RESPONSE_TOKENS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).max(-1).values.tolist()
        for response in group:
            assert response.tokens == generated
            assert response.log_probs == pytest.approx(log_probs, abs=2e-5)
            assert not response.finished


@pytest.mark.parametrize("name", ROLLOUTS)
def test_sampled_tokens_are_where_their_uniforms_fall(name: str, measured: Measured) -> None:
    """By transformers in float64; no uniform is so near an edge of the distribution that rounding could decide."""
    model = copy.deepcopy(tiny_model(LAYOUTS[name].model)).double()
    for prompt, seeds, group in zip(ROLLOUT_PROMPTS, ROLLOUT_SEEDS, measured(name)["rollouts"]["sampled"], strict=True):
        for response, uniforms in zip(group, response_uniforms(seeds, RESPONSE_TOKENS), strict=True):
            with torch.no_grad(), one_thread():
                logits = model(torch.tensor([prompt + response.tokens])).logits[0, len(prompt) - 1 : -1]
            edges = (logits / TEMPERATURE).softmax(-1).cumsum(-1)
            drawn = uniforms[: len(response.tokens), None].double()
            assert (edges < drawn).sum(-1).tolist() == response.tokens
            assert (edges - drawn).abs().min() > 1e-5, "take other seeds"


@pytest.mark.parametrize("sampling", ["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("name", TIED)
def test_responses_do_not_depend_on_the_layout(name: str, sampling: str, measured: Measured) -> None:
    assert_same(measured(name)["rollouts"][sampling], measured("single")["rollouts"][sampling])


@pytest.mark.parametrize("name", JOINED)
def test_replicas_that_share_experts_may_have_other_prompts_or_none(name: str, measured: Measured) -> None:
    rollouts = measured(name)["rollouts"]
    assert rollouts["apart"].keys() == {1, 3}  # the first of two replicas has none
    assert_same([rollouts["apart"][place] for place in (1, 3)], [rollouts["sampled"][place] for place in (1, 3)])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_all_ranks_of_a_replica_have_the_responses(name: str, measured: Measured) -> None:
    assert measured(name)["rollouts"]["ranks_agree"]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_log_probs_are_the_policys(name: str, measured: Measured) -> None:
    of_engine, of_worker = measured(name)["rollouts"]["log_probs"]
    assert len(of_engine) > 20
    torch.testing.assert_close(of_engine, of_worker, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_what_is_told_of_a_filtered_draw_is_of_the_full_softmax(name: str, measured: Measured) -> None:
    """Log-probs and entropies are those of the forward that training would run: `old_policy: rollout` spares it.

    With the kept sets both are over them: `nucleus_replay`.
    """
    told = measured(name)["rollouts"]["told_of_filtered"]
    for kind in ("log_probs", "entropies", "kept log_probs", "kept entropies"):
        of_engine, of_worker = told[kind]
        assert len(of_engine) > 20
        torch.testing.assert_close(of_engine, of_worker, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_the_kept_mass_is_the_softmaxs_over_the_kept_tokens(name: str, measured: Measured) -> None:
    """By transformers in float64: the 12 most probable tokens, of these the fewest that hold 0.8 of their mass."""
    model = copy.deepcopy(tiny_model(LAYOUTS[name].model)).double()
    rollouts = measured(name)["rollouts"]
    expected, kept = [], []
    for prompt, group in zip(ROLLOUT_PROMPTS, rollouts["filtered"], strict=True):
        for response in group:
            with torch.no_grad(), one_thread():
                logits = model(torch.tensor([prompt + response.tokens])).logits[0, len(prompt) - 1 : -1]
            for row in (logits / 1.5).softmax(-1).tolist():
                order = sorted(range(len(row)), key=lambda token, row=row: -row[token])[:12]
                best = [row[token] for token in order]
                count = next(n for n in range(1, 13) if sum(best[:n]) >= 0.8 * sum(best))
                expected.append(sum(best[:count]))
                kept.append(sorted(order[:count]))
    assert min(expected) < 0.9
    assert rollouts["told_of_filtered"]["kept"] == kept
    assert rollouts["told_of_filtered"]["kept_mass"].tolist() == pytest.approx(expected, abs=1e-5)


def test_rollout_log_probs_are_the_policys_at_temperature_1(measured: Measured) -> None:
    of_engine, of_worker = measured("single")["engine"]["log_probs_at_1"]
    assert len(of_engine) > 20
    torch.testing.assert_close(of_engine, of_worker, rtol=0, atol=2e-5)


def test_responses_of_a_prompt_differ(measured: Measured) -> None:
    for group in measured("single")["rollouts"]["sampled"]:
        assert len({tuple(response.tokens) for response in group}) == len(group)


@pytest.mark.parametrize(
    "batching", ["one_prompt_at_a_time", "one_response_at_a_time", "max_batch_size_1", "max_batch_size_5"]
)
def test_responses_do_not_depend_on_the_batch(batching: str, measured: Measured) -> None:
    engine = measured("single")["engine"]
    assert_same(engine[batching], engine["together"])


def test_no_prompts(measured: Measured) -> None:
    assert measured("single")["engine"]["no_prompts"] == []


def test_stop_tokens_end_responses_and_belong_to_them(measured: Measured) -> None:
    engine = measured("single")["engine"]
    responses = list(flat(engine["together"]))
    lengths = {len(response.tokens) for response in responses if response.finished}
    assert len(lengths) > 1, "rows must leave the batch at different steps"
    assert any(not response.finished for response in responses), "and some must stay to the end"
    for response, endless in zip(responses, flat(engine["endless"]), strict=True):
        stops = [place for place, token in enumerate(endless.tokens) if token in STOP_TOKENS]
        end = stops[0] + 1 if stops else RESPONSE_TOKENS
        assert response.tokens == endless.tokens[:end]
        assert response.finished == bool(stops)
        assert response.log_probs == pytest.approx(endless.log_probs[:end], abs=2e-5)


def test_responses_are_cut_at_the_maximum_length(measured: Measured) -> None:
    engine = measured("single")["engine"]
    assert all(len(response.tokens) == RESPONSE_TOKENS for response in flat(engine["endless"]))
    assert not any(response.finished for response in flat(engine["endless"]))
    first = [[response.tokens[:1] for response in group] for group in engine["endless"]]
    assert tokens_of(engine["one_token"]) == first
    assert [len(group) for group in engine["one_token"]] == [len(seeds) for seeds in ROLLOUT_SEEDS]


def test_a_prompt_is_prefilled_once_for_its_responses(measured: Measured) -> None:
    """Two prompts of at most 5 tokens, 4 + 2 responses of 3 tokens: one prefill, then two tokens for each response."""
    assert measured("single")["engine"]["forward_shapes"] == [(2, 5), (6, 1), (6, 1)]


def test_the_policy_is_left_in_training(measured: Measured) -> None:
    assert measured("single")["engine"]["training_mode_kept"]
