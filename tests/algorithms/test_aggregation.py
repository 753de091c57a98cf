import pytest
import torch
from hypothesis import given
from random_batches import Batch, batches

from eapo_megatron.algorithms import AGGREGATIONS, loss_weights


@given(batch=batches())
def test_weights_match_their_denominators(batch: Batch) -> None:
    tokens = [(i, t) for i, t in batch.mask.nonzero().tolist()]
    groups = {int(batch.group_ids[i]) for i, _ in tokens}
    responses = {i for i, _ in tokens}
    for aggregation in AGGREGATIONS:
        weights = loss_weights(batch.mask, batch.group_ids, aggregation=aggregation, aggregation_length=40)
        expected = torch.zeros(batch.mask.shape, dtype=torch.float64)
        for i, t in tokens:
            denominator = {
                "token_mean": len(tokens),
                "group_token_mean": len(batch.tokens(int(batch.group_ids[i]))) * len(groups),
                "seq_mean_token_mean": int(batch.mask[i].sum()) * len(responses),
                "seq_mean_token_sum": 40 * len(responses),
            }[aggregation]
            expected[i, t] = 1 / denominator
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected.float(), rtol=1e-6, atol=0)
        if aggregation == "seq_mean_token_sum":
            continue
        assert float(weights.sum()) == pytest.approx(1.0 if tokens else 0.0, abs=1e-5)


def test_bad_input_is_refused_by_name() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    for arguments, message in (
        ({"mask": mask, "group_ids": None, "aggregation": "mean"}, "aggregation must be one of token_mean, .*'mean'"),
        ({"mask": mask, "group_ids": None, "aggregation": "group_token_mean"}, "group_ids are needed"),
        ({"mask": mask, "group_ids": None, "aggregation_length": 0}, "aggregation_length must be a whole .*got 0"),
        ({"mask": mask.float(), "group_ids": None}, "mask must be boolean"),
        ({"mask": mask, "group_ids": torch.tensor([1, 2, 3])}, "group_ids must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_weights(**arguments)
