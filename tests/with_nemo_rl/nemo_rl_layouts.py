"""One rank of a launch: entropies through NeMo-RL's policy, and EAPO's loss beside its own, in its training step.

Arguments: the folder for the results, the names of the layouts. Rank 0 writes for each layout and way of batching what
`get_logprobs` gave, and for each loss how the two compare over all ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nemo_rl_on_cpu  # noqa: F401  before NeMo-RL

# isort: split
import torch
import torch.distributed as dist
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from real_policy import PADDED, build_policy, start_ranks, stop_ranks
from real_recipe import real_config

from eapo_megatron.integrations.nemo_rl import EAPOLossFn
from eapo_megatron.integrations.nemo_rl.policy import EntropyPolicy
from launch import cases, free_port
from layouts import MODELS

LAYOUTS = {"single": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}
NUM_ROWS, LENGTH, PROMPT = 8, 16, 3
TOKENS_OF_A_MICRO_BATCH = {"train_mb_tokens": 32, "logprob_mb_tokens": 32, "sequence_length_round": 4}
BATCHING: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "packed": {"sequence_packing": {"enabled": True, **TOKENS_OF_A_MICRO_BATCH}},
    "packed, fused loss": {"sequence_packing": {"enabled": True, "fuse_loss": True, **TOKENS_OF_A_MICRO_BATCH}},
    "dynamic": {"dynamic_batching": {"enabled": True, **TOKENS_OF_A_MICRO_BATCH}},
}
LOSSES: dict[str, dict[str, Any]] = {
    "clip-higher": {"ratio_clip_max": 0.28},
    "by sequence": {"token_level_loss": False},
    "dual clip": {"ratio_clip_c": 1.5},
    "importance sampling": {"use_importance_sampling_correction": True},
    "tis": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.2,
    },
    "icepop": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": 1.5,
        "truncated_importance_sampling_ratio_min": 0.6,
    },
}


def temperature_of(layout: str) -> float:
    return 1.0 if layout == "PP2" else 0.8  # NeMo-RL divides hidden states between stages by it too


def batch() -> BatchedDataDict:
    """Responses of different lengths, right-padded; one is left out by its sample mask."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([16, 7, 12, 9, 5, 14, 10, 6])
    positions = torch.arange(LENGTH)
    token_mask = ((positions >= PROMPT) & (positions < lengths[:, None])).float()
    tokens = torch.randint(3, MODELS[PADDED]["vocab_size"], (NUM_ROWS, LENGTH), generator=generator)
    data = {
        "input_ids": torch.where(positions < lengths[:, None], tokens, 0),
        "input_lengths": lengths,
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        "advantages": torch.randn(NUM_ROWS, LENGTH, generator=generator) * token_mask,
    }
    for name in ("old", "generation"):
        data[f"{name}_offsets"] = torch.randn(NUM_ROWS, LENGTH, generator=generator) * 0.3
    return BatchedDataDict(data)


@contextmanager
def gradients_of_a_step(policy: EntropyPolicy) -> Iterator[list[torch.Tensor]]:
    """In the place of the optimizer's step: the gradients that it would take, on this rank."""
    worker, noted = policy.worker_group.worker, []

    def step() -> tuple[bool, float, int]:
        noted.extend(parameter.main_grad.clone() for parameter in worker.model.module.parameters())
        return True, 0.0, 0

    worker.optimizer.step, worker.optimizer.grad_norms_by_group = step, {}
    try:
        yield noted
    finally:
        del worker.optimizer.step


def compare(policy: EntropyPolicy, data: BatchedDataDict, config: ClippedPGLossConfig) -> dict[str, Any]:
    """One training step of each loss, from the same weights on the same data."""
    with gradients_of_a_step(policy) as theirs:
        expected = policy.train(data, ClippedPGLossFn(config))
    with gradients_of_a_step(policy) as ours:
        actual = policy.train(data, EAPOLossFn.from_config(config))
    metrics = [
        {name: sum(values) for name, values in result["all_mb_metrics"].items()} for result in (expected, actual)
    ]
    return {
        "loss": (float(expected["loss"]), float(actual["loss"])),
        "largest gradient": max(float(gradient.abs().max()) for gradient in theirs),
        "largest difference": max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True)),
        "metrics": metrics,
    }


def measure(layout: str, folder: Path) -> None:
    start_ranks(*LAYOUTS[layout])
    results: dict[str, Any] = {}
    for batching, settings in BATCHING.items():
        if batching == "dynamic" and layout == "PP2":
            continue  # NeMo-RL has no dynamic batches over pipeline stages
        tensor_parallel, pipeline_parallel = LAYOUTS[layout]
        config = real_config(
            folder / PADDED,
            f"policy.megatron_cfg.tensor_model_parallel_size={tensor_parallel}",
            f"policy.megatron_cfg.pipeline_model_parallel_size={pipeline_parallel}",
            f"policy.generation.temperature={temperature_of(layout)}",
            f"policy.train_global_batch_size={NUM_ROWS}",
            "policy.train_micro_batch_size=2",
            "policy.logprob_batch_size=2",
            "policy.sequence_packing.enabled=false",
        )
        for section, values in settings.items():
            config.policy[section] |= values
        policy, data = build_policy(config.policy), batch()
        scores = {name: data[name] for name in ("input_ids", "input_lengths", "token_mask", "sample_mask")}
        log_probs = policy.get_logprobs(BatchedDataDict(scores))["logprobs"]
        results[batching] = {"logprobs": log_probs, "entropies": policy.entropies, "losses": {}}
        data["prev_logprobs"] = log_probs + data.pop("old_offsets")
        data["generation_logprobs"] = data["prev_logprobs"] + data.pop("generation_offsets")
        data["reference_policy_logprobs"] = torch.zeros_like(log_probs)
        for name, changes in LOSSES.items():
            ranks: list[Any] = [None] * dist.get_world_size()
            loss_config = config.loss_fn.model_copy(update=changes)
            dist.all_gather_object(ranks, compare(policy, data, loss_config))
            results[batching]["losses"][name] = ranks
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{layout}.pt")
    port = [free_port()]
    dist.broadcast_object_list(port)
    os.environ["MASTER_PORT"] = str(port[0])
    stop_ranks()


def main(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in cases(folder, names):
        measure(name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
