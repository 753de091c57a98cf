"""Token records: what they hold, how a kill and a resume leave them, and how large they become."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from command_line import metrics, train_ranks
from eapo_megatron.algorithms import QUADRANTS, quadrant_masks
from eapo_megatron.data import arithmetic_tokenizer
from eapo_megatron.data.prompts import Prompt
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.responses import Responses
from eapo_megatron.records.tokens import TokenRecords, recorded_steps, sampled_groups, token_tables, token_texts

RECIPE = """
seed: 3
cluster: {gpus_per_node: 1, device: cpu}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 4, max_response_tokens: 12}
reward: {num_workers: 1}
train: {num_prompts_per_step: 4, mini_batch_prompts: 4, micro_batch_size: 8}
checkpoint: {every: 0}
"""


def tables_of(step: int, chosen: list[int]) -> list:
    """Two prompts with 3 and 2 responses of up to 6 tokens, and the tensors of their records."""
    generator = torch.Generator().manual_seed(step)
    lengths = [4, 1, 6, 2, 3]
    tokens = [torch.randint(3, 20, (length,), generator=generator).tolist() for length in lengths]
    responses = Responses.of_lists(
        tokens, log_probs=[[-0.1 * (i + 1)] * length for i, length in enumerate(lengths)], finished=[True] * 4 + [False]
    )
    groups, rewards = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    batch = make_batch([[1], [2]], responses, groups, rewards, torch.device("cpu"))
    values = [torch.rand(5, 6, generator=generator) for _ in range(3)]
    quadrants = quadrant_masks(rewards, values[1], batch.mask, groups)
    arrays = dict(zip(("old_log_probs", "entropies", "shaped_advantages"), values, strict=True))
    tables = token_tables(
        step,
        chosen,
        [Prompt(7, "1+1=?", [1], "2", None), Prompt(9, "lone \ud800", [2], ["3", "4"], None)],
        batch,
        **arrays,
        advantages=torch.arange(5, dtype=torch.float32),
        quadrants=quadrants,
        decode=arithmetic_tokenizer().decode,
    )
    return [tables, tokens, batch, arrays, quadrants]


def test_a_row_holds_the_tensors_of_its_response_bit_for_bit(tmp_path: Path) -> None:
    tables, tokens, batch, arrays, quadrants = tables_of(5, [0, 1])
    TokenRecords(tmp_path, first_step=1, max_bytes=2**20, say=print).write(5, tables)
    (path,) = recorded_steps(tmp_path).values()
    rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
    assert pq.ParquetFile(path).num_row_groups == 2
    assert [(row["group"], row["response"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for number, row in enumerate(rows):
        mask = batch.mask[number]
        assert row["step"] == 5
        assert row["token_ids"] == tokens[number]
        assert "".join(row["texts"]) == arithmetic_tokenizer().decode(tokens[number])
        for name, values in {**arrays, "rollout_log_probs": batch.rollout_log_probs}.items():
            assert torch.tensor(row[name]).equal(values[number][mask]), name
        expected = [next(q for q in QUADRANTS if quadrants[q][number, t]) for t in range(len(tokens[number]))]
        assert row["quadrants"] == expected
        assert (row["advantage"], row["reward"]) == (float(number), float(batch.rewards[number]))
        assert row["finished"] is (number < 4)
    assert (rows[0]["prompt"], rows[0]["answer"], rows[0]["prompt_index"]) == ("1+1=?", "2", 7)
    assert (rows[3]["prompt"], rows[3]["answer"]) == ("lone \\ud800", "3 | 4")


def test_groups_are_chosen_by_seed_and_step_alone() -> None:
    chosen = sampled_groups(2, seed=1, step=4, of=64)
    assert chosen == sampled_groups(2, seed=1, step=4, of=64)
    assert len({tuple(sampled_groups(2, seed=seed, step=step, of=64)) for seed in (1, 2) for step in range(5)}) > 5
    assert sampled_groups(9, seed=1, step=4, of=3) == [0, 1, 2]


def test_texts_put_together_are_the_response() -> None:
    pieces = {1: b"a", 2: "\u00e9".encode()[:1], 3: "\u00e9".encode()[1:], 4: b" b", 5: b"\xff", 6: "\ufffd".encode()}

    def decode(ids: tuple[int, ...]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace").lstrip(" ")

    assert token_texts((1, 2, 3, 4), decode) == ["a", "", "\u00e9", " b"]
    for ids in [(4, 4), (2,), (1, 2), (5, 1), (6, 6, 6, 6, 6, 1), (2, 1, 3, 3, 4), ()]:
        assert "".join(token_texts(ids, decode)) == decode(ids), ids


def test_the_folder_keeps_its_bound_and_covers_the_run(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    TokenRecords(tmp_path / "one", first_step=1, max_bytes=2**20, say=print).write(1, tables_of(1, [0])[0])
    size = recorded_steps(tmp_path / "one")[1].stat().st_size
    records = TokenRecords(tmp_path, first_step=1, max_bytes=int(size * 5.5), say=print)
    for step in range(1, 41):
        records.write(step, tables_of(step, [0])[0])
        assert sum(path.stat().st_size for path in recorded_steps(tmp_path).values()) <= size * 5.5
    assert list(recorded_steps(tmp_path)) == [8, 16, 24, 32, 40]
    # A resumed run goes on with the same steps.
    resumed = TokenRecords(tmp_path, first_step=25, max_bytes=int(size * 5.5), say=print)
    for step in range(25, 41):
        resumed.write(step, tables_of(step, [0])[0])
    assert list(recorded_steps(tmp_path)) == [8, 16, 24, 32, 40]


def test_a_step_that_is_larger_than_the_bound_is_said_and_not_kept(tmp_path: Path) -> None:
    said: list[str] = []
    TokenRecords(tmp_path, first_step=1, max_bytes=100, say=said.append).write(3, tables_of(3, [0])[0])
    assert not recorded_steps(tmp_path)
    assert len(said) == 1
    assert "the tokens of step 3" in said[0]
    assert "logging.record_tokens_max_mib" in said[0]


def test_a_resume_drops_later_steps_and_what_a_kill_left(tmp_path: Path) -> None:
    records = TokenRecords(tmp_path, first_step=1, max_bytes=2**20, say=print)
    for step in (1, 2, 3):
        records.write(step, tables_of(step, [0])[0])
    (tmp_path / "tokens" / ".step_000004.parquet").write_bytes(b"PAR1")
    TokenRecords(tmp_path, first_step=3, max_bytes=2**20, say=print)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "step_000001.parquet",
        "step_000002.parquet",
    ]


@pytest.mark.slow
def test_a_run_is_the_same_with_records_and_after_a_resume(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + f"logging: {{run_dir: {tmp_path}, tensorboard: false}}\n")
    train_ranks(recipe, "name=plain", "train.steps=3")
    record = "logging.record_tokens=2"
    train_ranks(recipe, "name=whole", "train.steps=3", record)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "plain")
    assert not (tmp_path / "plain" / "tokens").exists()

    train_ranks(recipe, "name=resumed", "train.steps=1", record)
    later = tmp_path / "resumed" / "tokens" / "step_000002.parquet"
    later.write_bytes(b"of a killed run")
    train_ranks(recipe, "name=resumed", "train.steps=3", record)
    whole, resumed = (recorded_steps(tmp_path / name) for name in ("whole", "resumed"))
    assert list(whole) == list(resumed) == [1, 2, 3]
    for step in whole:
        table = pq.read_table(whole[step])
        assert table.equals(pq.read_table(resumed[step]))
        assert len(table) == 8
