import torch
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.algorithms.top_tokens import top_tokens


@given(
    values=st.lists(
        st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, 1.0000001])), max_size=15
    ),
    masked=st.integers(0, 3),
    fraction=st.sampled_from([0.01, 0.2, 0.5, 1.0]),
)
def test_selection_equals_sorting(values: list[float], masked: int, fraction: float) -> None:
    tokens = torch.tensor([*values, *[float("nan")] * masked], dtype=torch.float32)[None]
    mask = torch.tensor([[True] * len(values) + [False] * masked], dtype=torch.bool)
    selected = top_tokens(tokens, mask, fraction=fraction)
    count = max(1, round(fraction * len(values)))
    assert torch.equal(selected, top_tokens(tokens, mask, count=count))
    assert torch.equal(mask, top_tokens(tokens, mask, count=len(values) + 1))
    if values:
        descending = sorted(tokens[0, : len(values)].tolist(), reverse=True)
        threshold = descending[max(1, round(fraction * len(values))) - 1]
        expected = [value >= threshold for value in tokens[0, : len(values)].tolist()]
    else:
        expected = []
    assert selected[0].tolist() == expected + [False] * masked
