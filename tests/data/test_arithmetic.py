import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eapo_megatron.data import Example, arithmetic_examples, arithmetic_tokenizer, draw_solution, load_tokenizer
from eapo_megatron.rewards import math_reward


def verify_derivation(prompt: str, solution: str) -> str:
    """Follow a solution step by step; the result it ends with."""
    available = Counter(int(term) for term in prompt.removesuffix("=?").split("+"))
    steps, _, result = solution.partition(". #### ")
    for number, step in enumerate(steps.split(", ")):
        pattern = r"(\d+)\+(\d+)=(\d+)" if number == 0 else r"(?:so|then|next|now) (\d+)\+(\d+)=(\d+)"
        match = re.fullmatch(pattern, step)
        assert match, step
        first, second, total = map(int, match.groups())
        assert first + second == total
        for used in (first, second):
            assert available[used] > 0, f"{used} is not there to use in {solution!r}"
            available[used] -= 1
        available[total] += 1
    assert list(available.elements()) == [int(result)]
    return result


@given(
    st.sampled_from(["train", "held_out"]),
    st.integers(),
    st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True),
    st.integers(9, 30),
)
def test_solutions_are_valid_derivations(split, seed: int, num_terms: list[int], max_term: int) -> None:
    for example in arithmetic_examples(split, seed=seed, size=4, num_terms=num_terms, max_term=max_term):
        terms = [int(term) for term in example.prompt.removesuffix("=?").split("+")]
        assert len(terms) in num_terms
        assert all(1 <= term <= max_term for term in terms)
        assert example.answer == str(sum(terms))
        assert verify_derivation(example.prompt, example.solution) == example.answer
        assert math_reward(example.solution, example.answer) == 1.0
        assert math_reward(example.solution, str(sum(terms) + 1)) == -1.0


def test_default_task_is_short_and_without_repetition() -> None:
    examples = arithmetic_examples("train", seed=3, size=1000)
    assert len({example.prompt for example in examples}) == 1000
    assert Counter(example.prompt.count("+") for example in examples) == {2: 500, 3: 500}
    assert max(len(example.prompt) for example in examples) <= 16
    assert max(len(example.solution or "") for example in examples) <= 48
    assert len(draw_solution("20+20+20+20=?", random.Random(0))) <= 48


def test_examples_are_a_function_of_the_seed() -> None:
    examples = arithmetic_examples("train", seed=5, size=50)
    assert examples == arithmetic_examples("train", seed=5, size=50)
    assert examples[:20] == arithmetic_examples("train", seed=5, size=20)
    assert {e.prompt for e in examples} != {e.prompt for e in arithmetic_examples("train", seed=6, size=50)}


def test_held_out_sums_never_occur_in_training_even_reordered() -> None:
    def multisets(examples: list[Example]) -> set[tuple[int, ...]]:
        return {tuple(sorted(map(int, e.prompt.removesuffix("=?").split("+")))) for e in examples}

    held_out = multisets(arithmetic_examples("held_out", seed=1, size=50, num_terms=(2, 3), max_term=16))
    for seed in range(3):
        train = multisets(arithmetic_examples("train", seed=seed, size=400, num_terms=(2, 3), max_term=16))
        assert not train & held_out
    assert held_out


def test_the_two_splits_are_all_sums() -> None:
    every = {f"{a}+{b}=?" for a in range(1, 13) for b in range(1, 13)}
    prompts: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        with pytest.raises(ValueError, match=rf"size must be at most (\d+): the {split} split") as error:
            arithmetic_examples(split, seed=0, size=1000, num_terms=(2,), max_term=12)
        most = int(re.search(r"at most (\d+)", str(error.value)).group(1))
        found = arithmetic_examples(split, seed=0, size=most, num_terms=(2,), max_term=12)
        prompts[split] = {example.prompt for example in found}
        assert len(prompts[split]) == most
    assert prompts["train"] | prompts["held_out"] == every
    assert 0 < len(prompts["held_out"]) < len(every) // 4


def test_choices_are_genuine() -> None:
    """Pairs, their order and the words all vary: 3 terms leave 3 * 2 * 2 derivations of 4 wordings each."""
    rng = random.Random(0)
    drawn = {draw_solution("1+2+4=?", rng) for _ in range(1000)}
    assert len(drawn) == 48
    for solution in drawn:
        assert verify_derivation("1+2+4=?", solution) == "7"


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = arithmetic_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, load_tokenizer(tmp_path)):
        assert (loaded.pad_token, loaded.eos_token, loaded.unk_token) == ("<pad>", "<eos>", "<unk>")
        assert len({loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id}) == 3
        for example in arithmetic_examples("train", seed=0, size=50):
            text = example.prompt + example.solution
            token_ids = loaded(text)["input_ids"]
            assert len(token_ids) == len(text)
            assert loaded.unk_token_id not in token_ids
            assert loaded.decode(token_ids) == text
            assert loaded.decode([*token_ids, loaded.eos_token_id], skip_special_tokens=True) == text
        assert loaded.decode(loaded(" ,. # =?")["input_ids"]) == " ,. # =?"
        assert loaded("1z")["input_ids"][1] == loaded.unk_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, 'split must be "train" or "held_out", got \'test\''),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"num_terms": ()}, "num_terms must be different numbers, each at least 2"),
        ({"num_terms": (1,)}, "num_terms must be different numbers, each at least 2"),
        ({"num_terms": (3, 3)}, "num_terms must be different numbers, each at least 2"),
        ({"max_term": 0}, "max_term must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic_examples(**{"split": "train", "seed": 0, "size": 1, **settings})
