"""Servers of the real vLLM that die, hang or find their port taken."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from eapo_megatron.config import Recipe
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.rollout import vllm_server
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.vllm_engine import VLLMEngine, open_engine
from eapo_megatron.stopping import TrainingStoppedError
from eapo_megatron.weights.export import export_weights

SAMPLING = SamplingParams(max_response_tokens=64)
PROMPTS, SEEDS = [[5, 6], [7, 8, 9]], [list(range(16)), list(range(16, 32))]


@pytest.fixture(scope="module")
def engine(policy: Policy, recipe: Recipe) -> Iterator[VLLMEngine]:
    """A server whose first port was taken, and that must answer within 10 seconds."""
    with socket.socket() as occupied, pytest.MonkeyPatch.context() as patch:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        ports = iter([occupied.getsockname()[1], vllm_server.free_port(), vllm_server.free_port()])
        patch.setattr(vllm_server, "free_port", lambda: next(ports))
        settings = recipe.rollout.vllm.model_copy(update={"request_timeout_seconds": 10.0, "max_restarts": 6})
        rollout = recipe.rollout.model_copy(update={"vllm": settings, "max_batch_size": 4})
        engine = open_engine(policy, recipe.model_copy(update={"rollout": rollout}), None)  # type: ignore[arg-type]
        assert not engine._clients[0].address.endswith(f":{occupied.getsockname()[1]}")
    engine.update_weights(export_weights(policy.modules, policy.hf_config, leaders_only=True), 1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def undisturbed(engine: VLLMEngine) -> list[list[int]]:
    return engine.generate(PROMPTS, SEEDS, SAMPLING).token_lists()


def processes(engine: VLLMEngine) -> dict[str, psutil.Process]:
    """The server's three, by what they do."""
    server = psutil.Process(engine._own[0].pid)  # type: ignore[union-attr]
    family = [child for child in server.children(recursive=True) if "VLLM::" in " ".join(child.cmdline())]
    named = {"EngineCore" if "EngineCore" in " ".join(p.cmdline()) else "Worker": p for p in family}
    assert named.keys() == {"EngineCore", "Worker"}
    return {"APIServer": server, **named}


@pytest.mark.parametrize("victim", ["Worker", "APIServer"])
def test_a_server_killed_in_the_middle_of_a_batch(
    engine: VLLMEngine, undisturbed: list[list[int]], victim: str
) -> None:
    """All its responses come, each once: with their seeds they are those of an undisturbed batch."""
    family = processes(engine)
    killer = threading.Timer(0.4, family[victim].kill)
    killer.start()
    before = engine.restarts
    responses = engine.generate(PROMPTS, SEEDS, SAMPLING)
    killer.join()
    assert engine.restarts == before + 1
    assert responses.token_lists() == undisturbed
    assert responses.versions.tolist() == [1] * 32
    _, alive = psutil.wait_procs(list(family.values()), timeout=10)
    assert not alive


def test_a_server_that_hangs_is_started_again(engine: VLLMEngine, undisturbed: list[list[int]]) -> None:
    family = processes(engine)
    family["Worker"].suspend()
    responses = engine.generate(PROMPTS, SEEDS, SAMPLING)
    assert responses.token_lists() == undisturbed
    _, alive = psutil.wait_procs(list(family.values()), timeout=10)
    assert not alive


def test_the_end_when_restarts_are_used_up(engine: VLLMEngine, undisturbed: list[list[int]]) -> None:
    engine.restarts = 6
    processes(engine)["EngineCore"].kill()
    with pytest.raises(TrainingStoppedError, match=r"rollout\.vllm\.max_restarts 6 are used up: vLLM's server"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
