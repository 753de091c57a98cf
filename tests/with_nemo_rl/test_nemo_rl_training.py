"""The recipe's `main` through NeMo-RL's `grpo_train`: two steps on a tiny model, against a float64 reference of all of
them (`make test-nemo-rl`)."""

from __future__ import annotations

import copy
import json
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("nemo_rl", reason="NeMo-RL has sources and an environment of its own: make test-nemo-rl")

from nemo_rl.algorithms import grpo
from nemo_rl.data.collate_fn import rl_collate_fn
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.experience import rollouts
from nemo_rl.utils.checkpoint import CheckpointManager
from nemo_rl.utils.logger import Logger
from real_policy import UNPADDED, build_policy, start_ranks, stop_ranks, write_model_folder
from real_recipe import RECIPE, TINY, run_grpo_eapo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchdata.stateful_dataloader import StatefulDataLoader

from eapo_megatron.integrations.nemo_rl.policy import EntropyPolicy
from eapo_megatron.weights.export import export_weights
from hf_reference import one_thread, tiny_model
from launch import free_port
from layouts import MODELS

PROMPTS, GENERATIONS, STEPS, NEW_TOKENS, EOS = 4, 4, 2, 8, 1
BATCH = PROMPTS * GENERATIONS
LEARNING_RATE, ALPHA, PHI, CLIP_LOW, CLIP_HIGH = 0.5, 0.2, 2.0, 0.2, 0.28


@dataclass
class Sampler:
    """In the place of vLLM: samples from the policy's own model, token by token."""

    policy: EntropyPolicy
    weight_synchronizer: Any = field(
        default_factory=lambda: types.SimpleNamespace(is_stale=True, sync_weights=lambda **_: None)
    )
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # by Hugging Face name, at each step's start

    @torch.no_grad()
    def generate(self, data: BatchedDataDict, greedy: bool) -> BatchedDataDict:
        model = self.policy.worker_group.worker.model.eval().module
        self.weights.append(dict(export_weights([model], MODELS[UNPADDED])))
        generator = torch.Generator().manual_seed(len(self.weights))
        lengths = data["input_lengths"].clone()
        tokens = torch.nn.functional.pad(data["input_ids"], (0, NEW_TOKENS))
        log_probs, ended = torch.zeros(tokens.shape), torch.zeros(len(tokens), dtype=torch.bool)
        rows = torch.arange(len(tokens))
        for _ in range(NEW_TOKENS):
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[rows, lengths - 1]
            scores = logits[:, : MODELS[UNPADDED]["vocab_size"]].log_softmax(-1)
            drawn = torch.multinomial(scores.exp(), 1, generator=generator).squeeze(-1)
            open_rows = rows[~ended]
            tokens[open_rows, lengths[open_rows]] = drawn[open_rows]
            log_probs[open_rows, lengths[open_rows]] = scores[open_rows, drawn[open_rows]]
            lengths[open_rows] += 1
            ended |= drawn == EOS
        return BatchedDataDict(
            output_ids=tokens,
            generation_lengths=lengths - data["input_lengths"],
            unpadded_sequence_lengths=lengths,
            logprobs=log_probs,
            truncated=~ended,
        )

    def prepare_for_generation(self, **_: Any) -> None: ...

    def finish_generation(self) -> None: ...

    def clear_logger_metrics(self) -> None: ...

    def get_logger_metrics(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None: ...


def reward(text: str) -> float:
    """Something that responses of one prompt differ in."""
    return float(sum(map(ord, text)) % 2)


def judge(messages: list[Any], infos: list[Any]) -> EnvironmentReturn:
    rewards = torch.tensor([reward(log[-1]["content"]) for log in messages])
    return EnvironmentReturn(
        observations=[{"role": "environment", "content": ""}] * len(messages),
        metadata=infos,
        next_stop_strings=[None] * len(messages),
        rewards=rewards,
        terminateds=torch.ones(len(messages)),
        answers=None,
    )


def dataset(tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of different lengths."""
    examples = []
    for index, text in enumerate(["1+2=?", "34+5=?", "6+7+8=?", "9+1=?"] * STEPS):
        tokens = torch.tensor(tokenizer.encode(text))
        message = {"role": "user", "content": text, "token_ids": tokens}
        examples.append(
            {
                "message_log": [message],
                "length": len(tokens),
                "extra_env_info": {},
                "loss_multiplier": 1.0,
                "idx": index,
                "task_name": "math",
            }
        )
    return examples


@dataclass
class Run:
    folder: Path
    sampler: Sampler
    entropies: list[Tensor]

    def of_step(self, step: int) -> dict[str, Any]:
        """The step's training data, as NeMo-RL logged them: a response a line."""
        (path,) = self.folder.rglob(f"train_data_step{step}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {
            name: torch.tensor([line[name][0] for line in lines]) for name in lines[0] if name not in ("content", "idx")
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`main` with the recipe; in the place of `setup` stands what it would have built, Ray and data sets aside."""
    folder = tmp_path_factory.mktemp("run")
    model = write_model_folder(folder, UNPADDED)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start_ranks()
    made: dict[str, Any] = {"entropies": []}

    def setup(config: Any, tokenizer: Any, *_: Any, policy_factory: Any) -> tuple[Any, ...]:
        assert policy_factory is EntropyPolicy
        policy = build_policy(config.policy)
        scored = policy.get_logprobs

        def get_logprobs(*args: Any, **options: Any) -> Any:
            result = scored(*args, **options)
            made["entropies"].append(policy.entropies)
            return result

        policy.get_logprobs = get_logprobs
        made["sampler"] = Sampler(policy)
        loader = StatefulDataLoader(dataset(tokenizer), batch_size=PROMPTS, collate_fn=rl_collate_fn, drop_last=True)
        state = grpo._initial_grpo_save_state()
        config.grpo.skip_reference_policy_logprobs_calculation = True  # as NeMo-RL's own does without a KL penalty
        return (
            policy, made["sampler"], None, None, loader, None, None, Logger(config.logger),
            CheckpointManager(config.checkpointing), state, config, {}, {},
        )  # fmt: skip

    immediate = types.SimpleNamespace(get=lambda futures, **_: futures)
    environment = types.SimpleNamespace(
        step=types.SimpleNamespace(remote=lambda *args: _Future(judge(*args))),
        shutdown=types.SimpleNamespace(remote=lambda: None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "setup", setup)
        patch.setattr(grpo, "ray", immediate)
        patch.setattr(rollouts, "ray", types.SimpleNamespace(get=lambda futures: [future.value for future in futures]))
        patch.setattr(grpo, "MemoryTracker", lambda: types.SimpleNamespace(snapshot_start_of_stage=lambda *_: None))
        patch.setattr(run_grpo_eapo, "init_ray", lambda: None)
        patch.setattr(
            run_grpo_eapo, "setup_response_data", lambda *_: (None, None, {"math": environment}, {"math": environment})
        )
        run_grpo_eapo.main(
            str(RECIPE),
            [
                *TINY,
                f"policy.model_name={model}",
                f"grpo.num_prompts_per_step={PROMPTS}",
                f"grpo.num_generations_per_prompt={GENERATIONS}",
                f"grpo.max_num_steps={STEPS}",
                "grpo.val_period=0",
                f"policy.train_global_batch_size={BATCH // 2}",
                "policy.train_micro_batch_size=2",
                "policy.logprob_batch_size=2",
                f"policy.generation.max_new_tokens={NEW_TOKENS}",
                "policy.generation.vllm_cfg.enable_vllm_metrics_logger=false",
                "checkpointing.enabled=false",
                "logger.tensorboard_enabled=true",
                "logger.monitor_gpus=false",
                f"logger.log_dir={folder / 'logs'}",
            ],
        )
    yield Run(folder / "logs", made["sampler"], made["entropies"])
    stop_ranks()


@dataclass(eq=False)
class _Future:
    value: EnvironmentReturn


def model_of(weights: dict[str, Tensor]) -> torch.nn.Module:
    model = copy.deepcopy(tiny_model(UNPADDED)).double()
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    return model


def scores_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Log-probs over the vocabulary [S-1, V] that tokens 1 to S-1 are drawn from."""
    return model(tokens[None]).logits[0, :-1].log_softmax(-1)


@one_thread()
def entropies_of(model: torch.nn.Module, data: dict[str, Any]) -> Tensor:
    result = torch.zeros(data["token_ids"].shape, dtype=torch.float64)
    for row, length in enumerate(data["input_lengths"].tolist()):
        with torch.no_grad():
            scores = scores_of(model, data["token_ids"][row, :length])
        result[row, 1:length] = -(scores.exp() * scores).sum(-1)
    return result


def eapo_advantages(entropies: Tensor, data: dict[str, Any]) -> Tensor:
    """Eq. 6 and 7 of arXiv 2604.11056; groups are of GENERATIONS responses in a row."""
    response, expected = data["token_loss_mask"].bool(), torch.zeros_like(entropies)
    for start in range(0, BATCH, GENERATIONS):
        rows = slice(start, start + GENERATIONS)
        signed = 2 * data["rewards"][rows].double() - 1
        advantages = (signed - signed.mean()) / (signed.std() + 1e-6)
        tokens = entropies[rows][response[rows]]
        deviations = (entropies[rows] - tokens.mean()) / tokens.std(correction=0)
        for row, advantage, deviation in zip(range(start, start + GENERATIONS), advantages, deviations, strict=True):
            term = deviation.clamp(-advantage.abs() / PHI, advantage.abs() / PHI)
            expected[row] = torch.where(response[row], advantage + ALPHA * advantage.sign() * term, 0.0)
    return expected


@pytest.mark.parametrize("step", range(STEPS))
def test_advantages_are_those_of_the_policys_entropies(run: Run, step: int) -> None:
    data = run.of_step(step + 1)
    response = data["token_loss_mask"].bool()
    assert response.sum() > 2 * BATCH
    entropies = entropies_of(model_of(run.sampler.weights[step]), data)
    torch.testing.assert_close(run.entropies[step][response].double(), entropies[response], rtol=0, atol=2e-6)
    expected = eapo_advantages(entropies, data)
    assert (expected != 0).any(dim=1).sum() > BATCH / 2
    torch.testing.assert_close(data["advantages"].double(), expected, rtol=0, atol=1e-5)


@one_thread()
def test_a_step_moves_the_weights_along_the_gradient_of_eq_2(run: Run) -> None:
    """Two optimizer steps of plain SGD, half of the rollouts each: the second is off the policy that scored them."""
    data, model = run.of_step(1), model_of(run.sampler.weights[0])
    response = data["token_loss_mask"].bool()
    advantages = eapo_advantages(entropies_of(model, data), data)
    old = {}
    for row, length in enumerate(data["input_lengths"].tolist()):
        tokens = data["token_ids"][row, :length]
        old[row] = scores_of(model, tokens).detach().gather(-1, tokens[1:, None]).squeeze(-1)
    for rows in torch.arange(BATCH).split(BATCH // 2):
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows.tolist():
            length = int(data["input_lengths"][row])
            tokens, mask = data["token_ids"][row, :length], response[row, 1:length]
            log_probs = scores_of(model, tokens).gather(-1, tokens[1:, None]).squeeze(-1)
            ratio, advantage = (log_probs - old[row]).exp(), advantages[row, 1:length]
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage)[mask].sum() / response[rows].sum()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    before, after = run.sampler.weights
    for name, expected in model.state_dict().items():
        moved = float((expected - before[name].double()).abs().max())
        assert moved > 0
        assert float((after[name].double() - expected).abs().max()) < 1e-3 * moved + 1e-7, name


def test_metrics_are_in_tensorboard(run: Run) -> None:
    events = EventAccumulator(str(next(run.folder.rglob("events.out.tfevents*")).parent)).Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for step in range(STEPS):
        data = run.of_step(step + 1)
        response = data["token_loss_mask"].bool()
        assert values["train/entropy/mean"][step] == pytest.approx(
            float(run.entropies[step][response].mean()), rel=1e-5
        )
        shares = [values[f"train/quadrants/{name}/token_share"][step] for name in ("phr", "plr", "nhr", "nlr")]
        assert sum(shares) == pytest.approx(1)
        assert values["train/reward"][step] == pytest.approx(float(data["rewards"].mean()))
        # What samples and what trains is one model, rounded alike but for batching.
        assert values["train/token_mult_prob_error"][step] == pytest.approx(1.0, abs=1e-5)
        assert values["train/gen_kl_error"][step] == pytest.approx(0.0, abs=1e-6)
