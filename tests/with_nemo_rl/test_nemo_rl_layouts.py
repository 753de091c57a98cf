"""Entropies from NeMo-RL's policy and Megatron worker, and EAPO's loss in its training step, under every layout
(`make test-nemo-rl`)."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("nemo_rl", reason="NeMo-RL has sources and an environment of its own: make test-nemo-rl")

from nemo_rl_layouts import BATCHING, LAYOUTS, LOSSES, NUM_ROWS, batch, temperature_of
from real_policy import NAME, write_model_folder

from hf_reference import one_thread, tiny_model
from launch import result_of, run_cases

SCRIPT = Path(__file__).parent / "nemo_rl_layouts.py"
CASES = [(layout, batching) for layout in LAYOUTS for batching in BATCHING if (layout, batching) != ("PP2", "dynamic")]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo_rl")
    write_model_folder(folder / "model")
    for world_size in (1, 2):
        names = [name for name in LAYOUTS if (name == "single") == (world_size == 1)]
        run_cases(SCRIPT, world_size, [], folder, names, timeout=1500)
    return folder


@cache
@one_thread()
def reference(temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, S] in float64, each response by itself in transformers' model; 0 elsewhere."""
    data, model = batch(), copy.deepcopy(tiny_model(NAME)).double()
    log_probs, entropies = torch.zeros(2, *data["input_ids"].shape, dtype=torch.float64)
    for row, length in enumerate(data["input_lengths"].tolist()):
        tokens = data["input_ids"][row, :length]
        with torch.no_grad():
            scores = (model(tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
        log_probs[row, 1:length] = scores.gather(-1, tokens[1:, None]).squeeze(-1)
        entropies[row, 1:length] = -(scores.exp() * scores).sum(-1)
    return log_probs, entropies


@pytest.mark.parametrize(("layout", "batching"), CASES)
def test_entropies_come_with_the_log_probs(launches: Path, layout: str, batching: str) -> None:
    scores = result_of(launches, layout)[batching]
    response = batch()["token_mask"].bool()
    assert scores["entropies"].shape == scores["logprobs"].shape == response.shape
    assert scores["entropies"].dtype == torch.float32
    expected_log_probs, expected = reference(temperature_of(layout))
    torch.testing.assert_close(scores["entropies"][response].double(), expected[response], rtol=0, atol=2e-6)
    torch.testing.assert_close(scores["logprobs"][response].double(), expected_log_probs[response], rtol=0, atol=5e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("layout", "batching"), CASES)
def test_a_step_takes_the_gradients_of_nemo_rls_own_loss(launches: Path, layout: str, batching: str, loss: str) -> None:
    ranks: list[dict[str, Any]] = result_of(launches, layout)[batching]["losses"][loss]
    assert all(rank["equal gradients"] for rank in ranks)
    assert max(rank["largest gradient"] for rank in ranks) > 1e-3
    for rank in ranks:
        theirs, ours = rank["loss"]
        assert ours == pytest.approx(theirs, abs=2e-6)
        expected, actual = rank["metrics"]
        assert {"loss", "token_mult_prob_error", "gen_kl_error", "global_valid_toks"} <= expected.keys() & actual.keys()
        for name in expected.keys() & actual.keys():
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-6), name
    assert ranks[0]["metrics"][1]["num_valid_samples"] == NUM_ROWS - 1
