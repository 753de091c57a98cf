import math
import statistics as reference

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.algorithms import ESTIMATORS, group_advantages, min_group_size


def expected_advantage(estimator: str, reward: float, others: list[float], positive_threshold: float) -> float:
    if math.isnan(reward):
        return 0.0
    others = [other for other in others if not math.isnan(other)]
    group = [reward, *others]
    if estimator == "grpo":
        return (reward - reference.fmean(group)) / (reference.stdev(group) + 1e-6) if others else 0.0
    if estimator == "dr_grpo":
        return reward - reference.fmean(group)
    if estimator == "rloo":
        return reward - reference.fmean(others) if others else 0.0
    return 0.1 if reward > positive_threshold else -1.0


@given(
    responses=st.lists(
        st.tuples(st.sampled_from([2**63 - 1, -5, 0]), st.floats(-10, 10, width=32) | st.just(math.nan)), max_size=10
    ),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    positive_threshold=st.sampled_from([0.0, 0.5, -2.0]),
)
def test_every_estimator_matches_its_definition(
    responses: list[tuple[int, float]], estimator: str, positive_threshold: float
) -> None:
    group_ids = torch.tensor([group for group, _ in responses], dtype=torch.int64)
    rewards = torch.tensor([reward for _, reward in responses], dtype=torch.float32)
    advantages = group_advantages(rewards, group_ids, estimator=estimator, positive_threshold=positive_threshold)
    expected = []
    for i, (group, reward) in enumerate(responses):
        others = [other for j, (other_group, other) in enumerate(responses) if other_group == group and j != i]
        expected.append(expected_advantage(estimator, reward, others, positive_threshold))
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_a_response_without_a_verdict_changes_nothing_for_its_group() -> None:
    rewards = torch.tensor([1.0, math.nan, -1.0, -1.0, math.nan])
    group_ids = torch.tensor([3, 3, 3, 3, 4])
    judged = ~rewards.isnan()
    for estimator in ESTIMATORS:
        advantages = group_advantages(rewards, group_ids, estimator=estimator)
        alone = group_advantages(rewards[judged], group_ids[judged], estimator=estimator)
        assert torch.equal(advantages[judged], alone)
        assert advantages[~judged].tolist() == [0.0, 0.0]


def test_the_smallest_group_is_asked_of_the_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: min_group_size(name) for name in ESTIMATORS} == {"grpo": 2, "dr_grpo": 2, "rloo": 2, "w_reinforce": 1}
    monkeypatch.setitem(ESTIMATORS, "raw", lambda rewards, statistics, positive_threshold: rewards)
    assert min_group_size("raw") == 1


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(estimator: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [-1.0], dtype=torch.float64)
    group_ids = torch.tensor([3] * 7 + [4])
    assert group_advantages(rewards, group_ids, estimator=estimator).tolist() == [0.0] * 8


def test_grpo_of_one_success_in_four() -> None:
    advantages = group_advantages(torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "gae"}, "estimator must be one of grpo, dr_grpo, rloo, w_reinforce, got 'gae'"),
        ({"rewards": torch.tensor([1.0, float("inf")])}, "rewards must be finite"),
        ({"rewards": torch.tensor([1.0, float("-inf")])}, "rewards must be finite"),
        ({"rewards": torch.tensor([1, 0])}, "rewards must be floating point"),
        ({"rewards": torch.ones(2, 1)}, "rewards must have shape"),
        ({"group_ids": torch.tensor([1])}, "group_ids must have shape"),
        ({"group_ids": torch.tensor([1, 2], dtype=torch.int32)}, "group_ids must be int64"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    arguments = {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([1, 2]), "estimator": "grpo"} | change
    with pytest.raises(ValueError, match=message):
        group_advantages(arguments["rewards"], arguments["group_ids"], estimator=arguments["estimator"])
