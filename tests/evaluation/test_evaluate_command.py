"""`eapo-megatron evaluate` on a run with a tiny random model: resumed, scored again, over replicas; and bad input."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from command_line import metrics, run_command, train_ranks

pytestmark = pytest.mark.slow

RECIPE = """
seed: 3
cluster: {gpus_per_node: 1, device: cpu, timeout_minutes: 1}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 16, held_out_size: 2}}
rollout: {num_generations_per_prompt: 2, max_response_tokens: 8, max_batch_size: 6}
reward: {function: "digits:first", num_workers: 1}
train: {steps: 1, num_prompts_per_step: 4, mini_batch_prompts: 4, micro_batch_size: 4}
evaluation: {temperature: 1.0, benchmarks: [amc, aime24], num_generations_per_problem: 4}
"""

# A function that a random policy meets now and then, and that fails on some responses: those have no verdict.
REWARD = """
def first(response, answer):
    if "+" in response:
        raise ValueError("a sum")
    return 1.0 if any(digit in response for digit in "{digits}") else -1.0
"""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; digits.py and data/ lie beside it."""
    folder = tmp_path_factory.mktemp("subject")
    (folder / "digits.py").write_text(REWARD.replace("{digits}", "12345"))
    (folder / "run.yaml").write_text(RECIPE + f"logging: {{run_dir: {folder}, tensorboard: false}}\n")
    data = folder / "data"
    data.mkdir()
    (data / "amc.jsonl").write_text(
        "".join(json.dumps({"problem": f"{i}+4=", "answer": i + 4}) + "\n" for i in range(5))
    )
    aime = [{"problem": "1+2=", "answer": "3"}, {"problem": "no answer"}, {"problem": "3+3=", "answer": "6"}]
    (data / "test_aime24.json").write_text(json.dumps(aime))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        said = train_ranks(folder / "run.yaml", f"evaluation.benchmarks_path={data}")
    assert "left out: " in said
    assert "test_aime24.json, record 2: no answer" in said
    return folder


def evaluate(
    subject: Path,
    out: Path,
    *arguments: str,
    benchmarks: str = "amc,aime24",
    beside: Path | None = None,
    ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Evaluates the run in the folder `subject`, or the folder itself where the data lie in another, `beside`.

    0 ranks: by the process that a user starts.
    """
    target, home = (subject / "run", subject) if beside is None else (subject, beside)
    command = ["evaluate", target, "--benchmarks", benchmarks, "--data", home / "data", "--out", out, *arguments]
    path = os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])
    return run_command(command, ranks, PYTHONPATH=path, COLUMNS="200")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["benchmarks"]


@pytest.fixture(scope="module")
def evaluated(subject: Path) -> Path:
    """An evaluation that was not interrupted."""
    out = subject / "out"
    done = evaluate(subject, out, "--n", "4", ranks=0)
    assert done.returncode == 0, done.stderr
    assert "left out: " in done.stderr
    assert "test_aime24.json, record 2: no answer" in done.stderr
    assert "aime24" in done.stdout
    return out


def test_every_response_and_what_follows_from_them(evaluated: Path) -> None:
    written = records(evaluated)
    keys = [(record["benchmark"], record["problem"], record["sample"]) for record in written]
    wanted = [("amc", problem) for problem in range(5)] + [("aime24", 0), ("aime24", 2)]
    assert keys == [(*problem, sample) for problem in wanted for sample in range(4)]
    assert len({record["text"] for record in written}) > 10
    for record in written:
        assert record["finished"] or record["tokens"] == 8
        expected = None if "+" in record["text"] else 1.0 if set(record["text"]) & set("12345") else -1.0
        assert record["reward"] == expected
    for name, problems in (("amc", 5), ("aime24", 2)):
        own = [record for record in written if record["benchmark"] == name]
        solved = [
            sum(record["reward"] == 1.0 for record in own if record["problem"] == problem)
            for problem in dict.fromkeys(record["problem"] for record in own)
        ]
        found = results(evaluated)[name]
        assert (found["n"], found["problems"], len(found["left_out"])) == (4, problems, name == "aime24")
        assert found["avg_at_k"] == {"4": pytest.approx(sum(solved) / (4 * problems))}
        assert found["pass_at_k"]["1"] == pytest.approx(found["avg_at_k"]["4"])
        assert found["pass_at_k"]["4"] == pytest.approx(sum(count > 0 for count in solved) / problems)
        assert list(found["pass_at_k"]) == list(found["intervals"]["pass_at_k"]) == ["1", "2", "3", "4"]
        assert found["mean_length"] == pytest.approx(sum(record["tokens"] for record in own) / len(own))
        assert found["truncated"] == sum(not record["finished"] for record in own)
        assert found["no_verdict"] == sum(record["reward"] is None for record in own)
    assert any(record["reward"] is None for record in written)
    assert any(record["reward"] == 1.0 for record in written)
    assert any(record["finished"] for record in written)


def test_a_cut_file_goes_on_record_for_record(subject: Path, evaluated: Path, tmp_path: Path) -> None:
    whole = (evaluated / "responses.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "evaluation.json").write_bytes((evaluated / "evaluation.json").read_bytes())
    (tmp_path / "responses.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])
    done = evaluate(subject, tmp_path, "--n", "4")
    assert done.returncode == 0, done.stderr
    assert "amc: 11 of 11 responses" in done.stderr
    assert (tmp_path / "responses.jsonl").read_bytes() == whole
    assert results(tmp_path) == results(evaluated)


def test_more_samples_and_benchmarks_join_those_that_are_there(subject: Path, evaluated: Path, tmp_path: Path) -> None:
    assert evaluate(subject, tmp_path, "--n", "2", benchmarks="amc").returncode == 0
    assert evaluate(subject, tmp_path, "--n", "4").returncode == 0
    assert sorted(map(json.dumps, records(tmp_path))) == sorted(map(json.dumps, records(evaluated)))
    assert results(tmp_path) == results(evaluated)


def test_the_loop_logs_what_the_command_finds(subject: Path, evaluated: Path) -> None:
    start, end = metrics(subject / "run")
    for name, found in results(evaluated).items():
        logged = {key.removeprefix(f"eval/{name}/"): end[key] for key in end if key.startswith(f"eval/{name}/")}
        pass_at_k = {f"pass@{k}": found["pass_at_k"][str(k)] for k in (1, 2, 4)}
        assert logged == {"avg@4": found["avg_at_k"]["4"], **pass_at_k}
        assert start.keys() >= {f"eval/{name}/{measure}" for measure in logged}


def test_scored_again(subject: Path, evaluated: Path, tmp_path: Path) -> None:
    for name in ("evaluation.json", "responses.jsonl"):
        (tmp_path / name).write_bytes((evaluated / name).read_bytes())
    done = evaluate(subject, tmp_path, "--n", "4", "--rescore", "--k", "2,1", ranks=0)
    assert done.returncode == 0, done.stderr
    assert "Pass@1 %" in done.stdout
    assert "Pass@2 %" in done.stdout
    assert "Pass@4 %" not in done.stdout
    assert records(tmp_path) == records(evaluated)
    assert results(tmp_path) == results(evaluated)
    (subject / "zeros.py").write_text(REWARD.replace("{digits}", "0"))
    done = evaluate(subject, tmp_path, "--n", "4", "--rescore", "reward.function=zeros:first", ranks=0)
    assert done.returncode == 0, done.stderr
    for record, before in zip(records(tmp_path), records(evaluated), strict=True):
        expected = None if "+" in record["text"] else 1.0 if "0" in record["text"] else -1.0
        assert record == before | {"reward": expected}
    assert results(tmp_path) != results(evaluated)


def test_two_replicas_give_what_one_does(subject: Path, evaluated: Path, tmp_path: Path) -> None:
    done = evaluate(subject, tmp_path, "--n", "4", "cluster.gpus_per_node=2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path) == records(evaluated)
    assert results(tmp_path) == results(evaluated)


@pytest.mark.parametrize(
    ("arguments", "benchmarks", "sentence"),
    [
        (["--n", "0"], "amc", "--n must be from 1 to 65536, got 0"),
        (["--n", "4", "--k", "1,8"], "amc", "--k 8: amc gets 4 responses a problem (--n)"),
        (["--k", "2,0"], "amc", "--k must be numbers from 1 on, with commas, got '2,0'"),
        (["--n", "many"], "amc", "'--n': Input should be a valid integer"),
        ([], "amc,aime23", "--benchmarks: 'aime23' is none of aime24"),
        ([], "minerva", "has none of minerva.jsonl"),
        (["evaluation.top_p=2"], "amc", "evaluation.top_p"),
        (["data.max_prompt_tokens=3"], "amc", "max_prompt_tokens"),
        (["--rescore"], "amc", "has 0 of the 160 responses to amc (5 problems, 32 each)"),
    ],
)
def test_bad_input_is_one_sentence(
    subject: Path, tmp_path: Path, arguments: list[str], benchmarks: str, sentence: str
) -> None:
    done = evaluate(subject, tmp_path, *arguments, benchmarks=benchmarks, ranks=0)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("left out: ")]
    assert sentence in line


def test_another_evaluation_in_the_folder(subject: Path, evaluated: Path) -> None:
    before = (evaluated / "responses.jsonl").read_bytes()
    done = evaluate(subject, evaluated, "--n", "4", "--rescore", "seed=4", ranks=0)
    assert done.returncode == 2
    assert "holds another evaluation: seed was 3 there and is 4 here; give another --out" in done.stderr
    assert (evaluated / "responses.jsonl").read_bytes() == before


def test_a_hugging_face_folder_takes_the_recipe_from_overrides(subject: Path, evaluated: Path, tmp_path: Path) -> None:
    from eapo_megatron.weights.convert import to_hf

    to_hf(subject / "run", tmp_path / "hf", max_shard_bytes=2**30)
    settings = [
        *('data.template="{prompt}"', "data.max_prompt_tokens=16", "rollout.max_response_tokens=8"),
        *("reward.function=digits:first", "reward.num_workers=1", "rollout.max_batch_size=6", "model.dtype=float32"),
        *("cluster.device=cpu", "evaluation.temperature=1.0", "seed=3"),
    ]
    done = evaluate(tmp_path / "hf", tmp_path / "out", "--n", "4", *settings, beside=subject)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "out") == records(evaluated)


def test_a_folder_that_is_nothing(subject: Path, tmp_path: Path) -> None:
    done = evaluate(tmp_path, tmp_path / "out", beside=subject, ranks=0)
    assert done.returncode == 2
    assert "is no run (recipe.json), no checkpoint of one and no Hugging Face folder (config.json)" in done.stderr
