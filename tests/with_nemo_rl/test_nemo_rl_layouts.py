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
from real_policy import PADDED, write_model_folder

from eapo_megatron.weights.families import padded_vocab_size
from hf_reference import one_thread, tiny_model
from launch import result_of, run_cases
from layouts import MODELS

SCRIPT = Path(__file__).parent / "nemo_rl_layouts.py"
CASES = [(layout, batching) for layout in LAYOUTS for batching in BATCHING if (layout, batching) != ("PP2", "dynamic")]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo_rl")
    write_model_folder(folder, PADDED)
    for world_size in (1, 2):
        names = [name for name in LAYOUTS if (name == "single") == (world_size == 1)]
        run_cases(SCRIPT, world_size, [], folder, names, timeout=1500, fresh=True)
    return folder


@cache
@one_thread()
def reference(temperature: float, padded_vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, S] in float64, each response by itself in transformers' model; 0 elsewhere.

    NeMo-RL's log-probs count the columns that pad the vocabulary, whose weights are 0 here; entropies do not.
    """
    data, model = batch(), copy.deepcopy(tiny_model(PADDED)).double()
    log_probs, entropies = torch.zeros(2, *data["input_ids"].shape, dtype=torch.float64)
    for row, length in enumerate(data["input_lengths"].tolist()):
        tokens = data["input_ids"][row, :length]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1] / temperature
        padded = torch.nn.functional.pad(logits, (0, padded_vocab_size - logits.shape[-1])).log_softmax(-1)
        log_probs[row, 1:length] = padded.gather(-1, tokens[1:, None]).squeeze(-1)
        scores = logits.log_softmax(-1)
        entropies[row, 1:length] = -(scores.exp() * scores).sum(-1)
    return log_probs, entropies


@pytest.mark.parametrize(("layout", "batching"), CASES)
def test_entropies_come_with_the_log_probs(launches: Path, layout: str, batching: str) -> None:
    scores = result_of(launches, layout)[batching]
    response = batch()["token_mask"].bool()
    assert scores["entropies"].shape == scores["logprobs"].shape == response.shape
    assert scores["entropies"].dtype == torch.float32
    padded = padded_vocab_size(MODELS[PADDED]["vocab_size"], LAYOUTS[layout][0])
    assert padded > MODELS[PADDED]["vocab_size"]
    expected_log_probs, expected = reference(temperature_of(layout), padded)
    for name, values in (("entropies", expected), ("logprobs", expected_log_probs)):
        torch.testing.assert_close(scores[name][response].double(), values[response], rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("layout", "batching"), CASES)
def test_a_step_takes_the_gradients_of_nemo_rls_own_loss(launches: Path, layout: str, batching: str, loss: str) -> None:
    ranks: list[dict[str, Any]] = result_of(launches, layout)[batching]["losses"][loss]
    for rank in ranks:
        assert rank["largest gradient"] > 1e-2
        # By sequence the weights are one product here and two means there: they round apart.
        assert rank["largest difference"] <= (1e-6 * rank["largest gradient"] if loss == "by sequence" else 0.0)
        theirs, ours = rank["loss"]
        assert ours == pytest.approx(theirs, abs=2e-6)
        expected, actual = rank["metrics"]
        assert {"loss", "token_mult_prob_error", "gen_kl_error", "global_valid_toks"} <= expected.keys() & actual.keys()
        for name in expected.keys() & actual.keys():
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-6), name
    assert ranks[0]["metrics"][1]["num_valid_samples"] == NUM_ROWS - 1
