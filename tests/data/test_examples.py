import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.data import LAYOUTS, DataError, Example, load_examples
from eapo_megatron.rewards import math_reward

GSM8K = {
    "question": "Natalia sold 48 clips, then half as many. How many?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nThen 48+24 = <<48+24=72>>72.\n#### 1,072",
}


def write(path: Path, records: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_gsm8k_layout(tmp_path: Path, suffix: str) -> None:
    loaded = load_examples(write(tmp_path / f"data{suffix}", [GSM8K]), **LAYOUTS["gsm8k"])
    solution = "She sold 48/2 = 24 clips.\nThen 48+24 = 72.\n#### 1,072"
    assert loaded.examples == [Example(GSM8K["question"], "1072", solution)]
    assert loaded.dropped == {}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_math_layout_drops_and_counts(tmp_path: Path, suffix: str) -> None:
    records = [
        {"problem": "é?", "answer": " \\frac{1}{2}\n"},
        {"problem": "b?", "answer": None},
        {"problem": " ", "answer": "3"},
        {"problem": "d?", "answer": ""},
        {"problem": "e?", "answer": "5"},
    ]
    loaded = load_examples(write(tmp_path / f"data{suffix}", records), **LAYOUTS["math"])
    assert loaded.examples == [Example("é?", "\\frac{1}{2}"), Example("e?", "5")]
    assert loaded.dropped == {"no answer": 2, "blank prompt": 1}


def test_answers_of_every_type(tmp_path: Path) -> None:
    answers = [142.0, 0.25, 7, ["9.6\n", "9.60"], [1.0, None, "x"], [None]]
    path = write(tmp_path / "data.json", [{"problem": "?", "answer": answer} for answer in answers])
    loaded = load_examples(path)
    assert [example.answer for example in loaded.examples] == ["142", "0.25", "7", ["9.6", "9.60"], ["1", "x"]]
    assert loaded.dropped == {"no answer": 1}


def test_numbers_keep_their_decimals_and_nan_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    answers = ["6.02e23", "1e23", "1e-7", "100000000000000000000", "NaN", "Infinity", "-Infinity", "[NaN, 2.50]"]
    path.write_text("".join(f'{{"problem": "?", "answer": {answer}}}\n' for answer in answers))
    loaded = load_examples(path)
    expected = ["6.02e+23", "1e+23", "1e-07", "100000000000000000000", ["2.5"]]
    assert [example.answer for example in loaded.examples] == expected
    assert loaded.dropped == {"no answer": 3}


def test_named_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"q": "1+1?", "a": "2", "why": "so"}, {"q": "2+2?", "a": "4", "why": None}])
    loaded = load_examples(path, prompt_field="q", answer_field="a", solution_field="why")
    assert loaded.examples == [Example("1+1?", "2", "so"), Example("2+2?", "4", None)]


GOOD = '{"problem": "a?", "answer": "1"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", None, "data.jsonl: no such file"),
        ("data.csv", "a,b", "data.csv: file type must be .json, .jsonl or .parquet"),
        (
            "data.jsonl",
            f"{GOOD}\n\n{{broken\n",
            r"data.jsonl, line 3: malformed JSON \(Expecting .* at column 2\)",
        ),
        ("data.jsonl", f"{GOOD}\n[1]\n", "data.jsonl, line 2: must be an object, got list"),
        ("data.jsonl", f'{GOOD}\n{{"problem": "b?"}}', r"data.jsonl, line 2: no field 'answer', the fields are \["),
        ("data.json", "[", "data.json: malformed JSON"),
        ("data.json", "{}", "data.json: must hold a list of objects, got dict"),
        ("data.json", f'[{GOOD}, {{"answer": "2"}}]', "data.json, record 2: no field 'problem'"),
        (
            "data.json",
            '[{"problem": 3, "answer": "2"}]',
            "data.json, record 1: field 'problem' must be text or a list of messages, got int",
        ),
        ("data.json", '[{"problem": "a?", "answer": {}}]', "data.json, record 1: an answer must be text, a number or"),
        ("data.json", '[{"problem": "a?", "answer": true}]', "data.json, record 1: an answer must be text, a number"),
        ("data.json", "[]", r"data.json: no usable example \(the file is empty\)"),
        ("data.jsonl", "\n", r"data.jsonl: no usable example \(the file is empty\)"),
        ("data.json", '[{"problem": "a?", "answer": null}]', r"data.json: no usable example \(\{'no answer': 1\}\)"),
        ("data.parquet", "not parquet", "data.parquet: not a Parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_examples(tmp_path / name)


def test_unusable_gsm8k_and_solution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GSM8K, {"question": "?", "answer": "42"}])
    with pytest.raises(DataError, match='line 2: a GSM8K answer must be text with its result after "####"'):
        load_examples(path, **LAYOUTS["gsm8k"])
    path = write(tmp_path / "b.json", [{"problem": "?", "answer": "42", "solution": 3}])
    with pytest.raises(DataError, match="record 1: field 'solution' must be text or null, got int"):
        load_examples(path, solution_field="solution")
    with pytest.raises(ValueError, match="answer_format must be"):
        load_examples(path, answer_format="csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solution_field must be None with"):
        load_examples(path, answer_format="gsm8k", solution_field="solution")


@pytest.fixture
def real_data() -> Path:
    folder = Path(os.environ.get("EAPO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("EAPO_TEST_DATA names no folder")
    return folder


def test_real_gsm8k_solutions_earn_their_reward(real_data: Path) -> None:
    loaded = load_examples(real_data / "gsm8k_test.jsonl", **LAYOUTS["gsm8k"])
    assert len(loaded.examples) == 1319
    assert not any("<<" in str(example.solution) for example in loaded.examples)
    assert all(math_reward(str(example.solution), example.answer) == 1.0 for example in loaded.examples)


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        ("train_math", 7470, {"no answer": 4}),
        ("test_math500", 500, {}),
        ("test_aime24", 30, {}),
        ("test_amc", 83, {}),
        ("test_minerva", 272, {}),
        ("test_olympiad", 675, {}),
    ],
)
def test_real_benchmarks_answer_themselves(real_data: Path, name: str, kept: int, dropped: dict[str, int]) -> None:
    loaded = load_examples(real_data / f"{name}.json", **LAYOUTS["math"])
    assert (len(loaded.examples), loaded.dropped) == (kept, dropped)
    for example in loaded.examples:
        first = example.answer[0] if isinstance(example.answer, list) else example.answer
        assert math_reward(rf"\boxed{{{first}}}", example.answer) == 1.0


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "6 times 7?"}
DAPO = {
    "data_source": "math_dapo",
    "prompt": [QUESTION],
    "ability": "MATH",
    "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
NEMO_RL = {"messages": [QUESTION, {"role": "assistant", "content": "42"}], "task_name": "math"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_layouts_of_chats(tmp_path: Path, suffix: str) -> None:
    verl = write(tmp_path / f"verl{suffix}", [DAPO, DAPO | {"prompt": [SYSTEM, QUESTION]}])
    assert load_examples(verl, **LAYOUTS["verl"]).examples == [
        Example("6 times 7?", "42"),
        Example([SYSTEM, QUESTION], "42"),
    ]
    by_struct = load_examples(verl, prompt_field="prompt", answer_field="reward_model")
    assert [example.answer for example in by_struct.examples] == ["42", "42"]
    nemo = write(tmp_path / f"nemo{suffix}", [NEMO_RL, {"messages": [SYSTEM, *NEMO_RL["messages"]]}])
    assert load_examples(nemo, **LAYOUTS["nemo_rl"]).examples == [
        Example("6 times 7?", "42"),
        Example([SYSTEM, QUESTION], "42"),
    ]


def test_a_path_of_fields_and_a_field_with_a_dot(tmp_path: Path) -> None:
    records = [
        {"q": {"texts": ["a?", "b?"]}, "a.b": "1", "a": {"b": "2"}, "c": {"why": "so"}},
        {"q": {"texts": ["c?"]}, "a.b": None, "a": {"b": "2"}, "c": None},
    ]
    path = write(tmp_path / "a.jsonl", records)
    loaded = load_examples(path, prompt_field="q.texts.-1", answer_field="a.b", solution_field="c.why")
    assert loaded.examples == [Example("b?", "1", "so")]  # the field of that very name
    assert loaded.dropped == {"no answer": 1}
    with pytest.raises(DataError, match=r"line 1: no field 'a\.x', the fields of 'a' are \['b'\]"):
        load_examples(path, prompt_field="q.texts.0", answer_field="a.x")
    with pytest.raises(DataError, match=r"no field 'q\.texts\.2', the fields of 'q\.texts' are those of a list"):
        load_examples(path, prompt_field="q.texts.2", answer_field="a")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "the messages of 'prompt' must end with the user's"),
        ([SYSTEM], "the messages of 'prompt' must end with the user's"),
        ([QUESTION, {"role": "assistant", "content": "42"}], "the messages of 'prompt' must end with the user's"),
        (["6 times 7?"], "message 1 of 'prompt' must be an object, got str"),
        ([SYSTEM, {"role": "human", "content": "?"}], "message 2 of 'prompt': role must be one of system, user, "),
        (
            [SYSTEM, {"role": "user", "content": [{"type": "image"}]}],
            "message 2 of 'prompt': content must be text, got",
        ),
        ([{"role": "user"}], "message 1 of 'prompt': content must be text, got NoneType"),
    ],
)
def test_prompts_that_are_no_chat(tmp_path: Path, prompt: list, sentence: str) -> None:
    path = write(tmp_path / "a.jsonl", [DAPO, DAPO | {"prompt": prompt}])
    with pytest.raises(DataError, match=f"a.jsonl, line 2: {sentence}"):
        load_examples(path, **LAYOUTS["verl"])


def test_a_chat_whose_question_is_blank_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [DAPO, DAPO | {"prompt": [SYSTEM, {"role": "user", "content": " "}]}])
    assert load_examples(path, **LAYOUTS["verl"]).dropped == {"blank prompt": 1}
