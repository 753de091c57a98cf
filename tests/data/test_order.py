import pytest
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.data import prompt_indices

seeds = st.integers(-(2**63), 2**63)
sizes = st.integers(1, 200)


@given(seeds, sizes, st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    assert sorted(prompt_indices(seed, epoch * size, size, size)) == list(range(size))


@given(seeds, sizes, st.integers(0, 10**6), st.lists(st.integers(0, 40), max_size=6))
def test_resuming_anywhere_gives_the_same_order(seed: int, size: int, position: int, counts: list[int]) -> None:
    pieces: list[int] = []
    for count in counts:
        pieces += prompt_indices(seed, position + len(pieces), count, size)
    assert pieces == prompt_indices(seed, position, sum(counts), size)


@given(seeds, st.integers(20, 200))
def test_epochs_and_seeds_differ(seed: int, size: int) -> None:
    first = prompt_indices(seed, 0, size, size)
    assert first != list(range(size))
    assert first != prompt_indices(seed, size, size, size)
    assert first != prompt_indices(seed + 1, 0, size, size)


@pytest.mark.parametrize("size", [3, 10, 23])
def test_every_prompt_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 2000
    drawn = prompt_indices(7, 0, epochs * size, size)
    for place in (0, size // 2, size - 1):
        expected = epochs / size
        counts = [drawn[place::size].count(index) for index in range(size)]
        chi_squared = sum((count - expected) ** 2 / expected for count in counts)
        # Mean size - 1, standard deviation sqrt(2 (size - 1)).
        assert abs(chi_squared - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5 + 4


def test_the_order_is_fixed_for_ever() -> None:
    """A saved run resumes under any later version: this list may not change."""
    assert prompt_indices(42, 0, 12, 10) == [5, 7, 9, 1, 3, 4, 0, 6, 2, 8, 7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 0), "size must be at least 1, got 0"),
        ((0, -1, 1, 5), "position must not be negative, got -1"),
        ((0, 0, -1, 5), "count must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_indices(*arguments)
