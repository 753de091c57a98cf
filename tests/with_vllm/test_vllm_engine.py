"""The real vLLM behind the engine protocol: sampling, log-probs, new weights, and updates that are not complete."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from small_models import VOCAB_SIZE, log_probs, log_softmax, perturbed

from eapo_megatron.config import Recipe
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.vllm_client import Request
from eapo_megatron.rollout.vllm_engine import VLLMEngine, open_engine
from eapo_megatron.rollout.weight_transfer import buckets
from eapo_megatron.stopping import TrainingStoppedError
from eapo_megatron.weights.export import export_weights

LONG_PROMPT = [(7 * i) % VOCAB_SIZE for i in range(100)]  # several blocks of the prefix cache


@pytest.fixture(scope="module")
def engine(policy: Policy, recipe: Recipe) -> Iterator[VLLMEngine]:
    engine = open_engine(policy, recipe, None)  # type: ignore[arg-type]
    engine.update_weights(export_weights(policy.modules, policy.hf_config, leaders_only=True), 3)
    yield engine
    engine.close()


def test_log_probs_are_of_the_full_softmax(engine: VLLMEngine, float64: torch.nn.Module) -> None:
    prompts, seeds = [[5, 6, 7, 8], [9]], [[1, 2, 3], [4, 5, 6]]
    sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_response_tokens=12)
    responses = engine.generate(prompts, seeds, sampling)
    assert responses.versions.tolist() == [3] * 6
    assert responses.lengths.tolist() == [12] * 6
    outside = 0
    for row, (tokens, got) in enumerate(zip(responses.token_lists(), responses.log_prob_lists(), strict=True)):
        expected = log_probs(float64, prompts[row // 3], tokens, 0.7)
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, atol=1e-4, rtol=0)
        distribution = log_softmax(float64, prompts[row // 3], tokens, 0.7).exp()
        above = (distribution * (distribution > expected.exp().unsqueeze(-1) + 1e-6)).sum(-1)
        assert (above < 0.9).all()  # the nucleus
        outside += int((distribution < 0.05).sum())
    assert outside  # top-p has something to leave out


def test_a_response_depends_on_its_seed_alone(engine: VLLMEngine) -> None:
    sampling = SamplingParams(max_response_tokens=10)
    together = engine.generate([[5, 6], [7, 8, 9]], [[11, 12, 11], [11, 13]], sampling).token_lists()
    assert together[0] == together[2] != together[1]
    alone = engine.generate([[7, 8, 9]], [[13]], sampling).token_lists()
    assert alone == [together[4]]


def test_stop_tokens_end_a_response(engine: VLLMEngine) -> None:
    stops = tuple(range(0, VOCAB_SIZE, 4))
    responses = engine.generate(
        [[5, 6]], [list(range(12))], SamplingParams(max_response_tokens=6, stop_token_ids=stops)
    )
    for tokens, finished in zip(responses.token_lists(), responses.finished.tolist(), strict=True):
        assert finished == (tokens[-1] in stops)
        assert finished or len(tokens) == 6
        assert not set(tokens[:-1]) & set(stops)
    assert responses.finished.any()
    at_once = engine.generate([[5, 6]], [[0]], SamplingParams(max_response_tokens=6, stop_token_ids=tuple(range(37))))
    assert at_once.lengths.tolist() == [1]  # a response of nothing but its stop
    assert at_once.finished.all()


def test_no_prompts_give_no_responses(engine: VLLMEngine) -> None:
    assert len(engine.generate([], [], SamplingParams())) == 0


def assert_samples_from(engine: VLLMEngine, model: torch.nn.Module, version: int) -> None:
    """Long prompts, twice: the second reads the first one's prefix cache."""
    for _ in range(2):
        sampling = SamplingParams(temperature=0.7, top_p=0.9, max_response_tokens=8)
        responses = engine.generate([LONG_PROMPT], [[1, 2]], sampling)
        assert responses.versions.tolist() == [version] * 2
        for tokens, got in zip(responses.token_lists(), responses.log_prob_lists(), strict=True):
            expected = log_probs(model, LONG_PROMPT, tokens, 0.7)
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, atol=1e-4, rtol=0)


def exported(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    return export_weights(policy.modules, policy.hf_config, leaders_only=True)


def test_new_weights_and_no_stale_prefix(engine: VLLMEngine, policy: Policy, float64: torch.nn.Module) -> None:
    assert_samples_from(engine, float64, 3)
    moved = copy.deepcopy(float64)
    state = moved.state_dict()
    for name, tensor in perturbed(exported(policy), seed=5):
        state[name].copy_(tensor)
    engine.update_weights(perturbed(exported(policy), seed=5), 4)
    assert_samples_from(engine, moved, 4)
    engine.update_weights(exported(policy), 5)
    assert_samples_from(engine, float64, 5)


def test_a_sleeping_server_wakes_for_weights_and_for_prompts(
    engine: VLLMEngine, policy: Policy, float64: torch.nn.Module
) -> None:
    def is_asleep() -> bool:
        return bool(engine._clients[0]._call("GET", "/is_sleeping")["is_sleeping"])

    engine.sleep()
    assert is_asleep()
    engine.update_weights(exported(policy), 5)
    assert not is_asleep()
    engine.sleep()
    assert_samples_from(engine, float64, 5)
    assert not is_asleep()


def test_weights_that_are_not_the_trainers_end_the_run(engine: VLLMEngine, policy: Policy) -> None:
    engine._verify()
    engine.update_weights(perturbed(exported(policy), seed=7), 5)
    with pytest.raises(TrainingStoppedError, match=r"rollout\.verify_weights: the engine's log-probs differ from"):
        engine._verify()
    engine.update_weights(exported(policy), 5)
    engine._verify()


def test_responses_in_flight_go_on_with_new_weights(engine: VLLMEngine, policy: Policy) -> None:
    sampling = SamplingParams(max_response_tokens=64)
    for in_flight, versions in (("wait", {6}), ("keep", {6, 7, 8}), ("abort", {8, 9})):
        engine.in_flight = in_flight  # type: ignore[assignment]
        engine.update_weights(exported(policy), min(versions))
        with ThreadPoolExecutor() as pool:
            sampled = pool.submit(engine.sample_here, [[5, 6]], [list(range(40))], sampling, on_sent=list)
            time.sleep(0.3)
            engine.update_weights(exported(policy), max(versions) if in_flight != "wait" else 7)
            responses = sampled.result()
        assert responses.lengths.tolist() == [64] * 40  # none is lost, none cut
        assert set(responses.versions.tolist()) <= versions | {7}
    engine.in_flight = "wait"


def test_an_interrupted_transfer_is_never_served(engine: VLLMEngine, policy: Policy, float64: torch.nn.Module) -> None:
    assert engine._sender is not None
    client, transport = engine._clients[0], engine._sender._transport
    client.pause("wait")
    client.start_weight_update()
    first = next(buckets(perturbed(exported(policy), seed=6), transport, 2**16))
    transport.send(client, first)  # and no more: its trainer is gone
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.generate, Request([5, 6], 1, SamplingParams(max_response_tokens=4)))
        time.sleep(1)
        assert not waiting.done()
        engine.update_weights(exported(policy), 10)
        answer = waiting.result()
    assert answer is not None
    assert answer.version == 10
    assert_samples_from(engine, float64, 10)


def test_an_incomplete_transfer_is_refused_by_name(
    engine: VLLMEngine, policy: Policy, float64: torch.nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    """A part of a parameter, a layer, the embedding: each is named. The server ends rather than serve them, and comes
    back with the policy's weights."""
    version = engine.version + 1
    left_out = ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.", "model.embed_tokens")
    kept = (pair for pair in perturbed(exported(policy), seed=7) if not pair[0].startswith(left_out))
    engine.update_weights(kept, version)
    log = (engine._recipe.run_folder / "rollout" / "server-0.log.1").read_text()
    assert "the weight update lacks" in log
    for named in ("layers.1.self_attn.qkv_proj", "layers.2.mlp.down_proj.weight", "embed_tokens.weight"):
        assert named in log
    assert "rollout server 0 is started again" in capfd.readouterr().err
    assert_samples_from(engine, float64, version)
