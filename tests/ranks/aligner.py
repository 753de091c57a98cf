"""One rank of a launch: NeMo-Aligner's EAPO actor beside the native policy, with the same weights on the same batch.

Arguments: the folder for the results, the names of the layouts. Rank 0 writes, for each of them, how far the two are
apart over all ranks (relative to the largest value), and what the train script's loop logged.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_on_cpu  # noqa: F401  before NeMo

# isort: split
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from eapo_megatron.algorithms import QUADRANTS, loss_weights
from eapo_megatron.config import Model, Optimizer, Parallel
from eapo_megatron.data import arithmetic_examples
from eapo_megatron.data.arithmetic import ALPHABET
from eapo_megatron.data.tokenizers import character_tokenizer
from eapo_megatron.integrations.nemo_aligner import EAPOTrainer, MegatronGPTEAPOActorModel
from eapo_megatron.policy.batching import TokenData
from eapo_megatron.policy.optimizer import build_optimizer
from eapo_megatron.policy.policy_model import Policy, build_policy
from eapo_megatron.policy.runtime import Runtime, start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.weights.huggingface import RandomWeights
from eapo_megatron.weights.load import load_weights
from launch import cases, free_port
from layouts import MODELS, TEMPERATURE, VOCAB_SIZE, old_policy_offsets, training_batch

RECIPES = Path(__file__).parents[2] / "recipes" / "nemo_aligner"
sys.path.insert(0, str(RECIPES))
from train_gpt_eapo_actor import train  # noqa: E402

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
QWEN2 = MODELS["tied"]
LLAMA = {name: value for name, value in MODELS["llama"].items() if name != "rope_scaling"}


@dataclass(frozen=True)
class Case:
    """A layout, a model and a method; `method` are keys of trainer.reinforce.algorithm."""

    parallel: dict[str, int] = field(default_factory=dict)
    hf_config: dict[str, Any] = field(default_factory=lambda: QWEN2)
    method: dict[str, Any] = field(default_factory=dict)


CASES = {
    "single": Case(),
    "TP2": Case(TP2),
    "PP2": Case(PP2),
    "DP2": Case(),
    "TP2, quadrant": Case(TP2, method={"shaping": {"name": "quadrant", "only": ["phr", "nlr"]}}),
    "PP2, entropy_advantage": Case(PP2, method={"shaping": {"name": "entropy_advantage"}}),
    "DP2, w_reinforce": Case(method={"advantage_estimator": "w_reinforce", "shaping": {"name": "none"}}),
    "TP2 PP2, llama": Case(TP2 | PP2, LLAMA),
}
GROUP, FIT_STEPS = 4, 2
ENTROPY_COEF = 0.01
EOS = 1
ROLLOUT_ORDER = torch.arange(12).view(3, GROUP).T.flatten()  # one response to each prompt, then another to each
SGD = {"lr": 0.4, "momentum": 0.9, "weight_decay": 0.1}


class Records(Logger):
    """Keeps what is logged."""

    name, version = "records", 0

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.lines.append(metrics)

    def log_hyperparams(self, *_: Any) -> None: ...

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


def measure(name: str, folder: Path) -> None:
    case = CASES[name]
    parallel = Parallel(**case.parallel)
    runtime = start_runtime(parallel, seed=1, device="cpu")
    policy = build_policy(case.hf_config, Model(architecture=case.hf_config, dtype="float32"), parallel, runtime)
    load_weights(policy.modules, policy.hf_config, RandomWeights(case.hf_config, seed=5))
    records = Records()
    cfg = configuration(case, parallel, runtime, folder)
    ptl_trainer = pytorch_lightning_trainer(runtime, records)
    actor = MegatronGPTEAPOActorModel(cfg.model, ptl_trainer)
    trainer = train(cfg, ptl_trainer, actor)
    results: dict[str, Any] = {"fit": [line for line in records.lines if "timers/train_time" not in line]}
    copy_weights(policy, actor)
    trainer.optimizer.state.clear()
    records.lines.clear()
    results["differences"] = compare(policy, trainer, records)
    results["restored"] = compare_restored(actor, cfg, runtime, folder / f"{name}.nemo")
    if runtime.is_main:
        torch.save(results, folder / f"{name}.pt")
    os.environ["MASTER_PORT"] = str(runtime.broadcast_object(free_port()))
    stop_runtime()
    unset_num_microbatches_calculator()


class Differences:
    """The largest difference by name, relative to the largest value it was noted with."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def note(self, name: str, theirs: Tensor | list[float], ours: Tensor | list[float]) -> None:
        theirs, ours = torch.as_tensor(theirs).double(), torch.as_tensor(ours).double()
        error = float((theirs - ours).abs().max()) / (float(ours.abs().max()) or 1.0)
        self.largest[name] = max(error, self.largest.get(name, 0.0))

    def over_ranks(self, runtime: Runtime) -> dict[str, float]:
        ranks = runtime.gather_objects(self.largest)
        return {name: max(rank[name] for rank in ranks) for name in self.largest}


def compare(policy: Policy, trainer: EAPOTrainer, records: Records) -> dict[str, float]:
    """Scores, advantages, gradients, and three optimizer steps with their metrics, against the native policy's."""
    batch, differences = training_batch(), Differences()
    algorithm = trainer.algorithm
    worker = PolicyWorker(policy, micro_batch_size=2, temperature=TEMPERATURE)
    rollouts, places = rollout_batch()

    def spread(values: Tensor) -> Tensor:
        """Values of response tokens [N, T] at their places in the sequence [N, S-1]."""
        return torch.zeros(places.shape).masked_scatter(places, values[batch.mask])

    log_probs, entropies = worker.log_probs_and_entropies(batch)
    trainer._add_scores(rollouts)
    for theirs, ours in (("logprobs", log_probs), ("entropies", entropies)):
        differences.note(theirs, rollouts[theirs] * places[ROLLOUT_ORDER], spread(ours)[ROLLOUT_ORDER])

    old_log_probs = log_probs + old_policy_offsets(batch) * batch.mask
    rollouts["logprobs"] = spread(old_log_probs)[ROLLOUT_ORDER]
    advantages = algorithm.advantages(
        batch.rewards, batch.group_ids, batch.mask, log_probs=old_log_probs, entropies=entropies
    )
    data, metrics = trainer.generate_reinforce_data(rollouts)
    steps = torch.arange(batch.size).split(GROUP)
    rank, size = policy.runtime.data_parallel_rank, policy.runtime.data_parallel_size
    mine = torch.cat([rows.chunk(size)[rank] for rows in steps])
    differences.note("advantages", data["advantages"], spread(advantages)[mine])
    differences.note("token shares", [sum(metrics[f"quadrants/{name}/token_share"] for name in QUADRANTS)], [1.0])

    inputs = {"old_log_probs": old_log_probs, "advantages": advantages}
    weights = [loss_weights(batch.mask_of(rows.tolist()), batch.group_ids) for rows in steps]
    note_gradients(
        differences,
        trainer,
        next(get_iterator_k_split(data, len(steps))),
        policy,
        lambda: worker.accumulate(batch, steps[0].tolist(), algorithm, TokenData(weights=weights[0], **inputs)),
    )

    settings = Optimizer(
        name="sgd", lr=SGD["lr"], sgd_momentum=SGD["momentum"], weight_decay=SGD["weight_decay"], clip_grad=1.0
    )
    optimizer = build_optimizer(policy, settings)
    updates = [
        worker.update(batch, rows.tolist(), optimizer, algorithm, TokenData(weights=step_weights, **inputs))
        for rows, step_weights in zip(steps, weights, strict=True)
    ]
    trainer.run_training(get_iterator_k_split(data, len(steps)))
    for name in ("grad_norm", "loss/policy", "loss/entropy", "clip_fraction/low", "clip_fraction/high"):
        ours = [update.metrics[name] for update in updates]
        differences.note(f"{name} of the steps", records.values(f"train_optim/{name}"), ours)
    native = dict(policy.modules[0].named_parameters())
    for name, parameter in trainer.model.model.named_parameters():
        differences.note("weights after the steps", parameter.data, native[name].data)
    return differences.over_ranks(policy.runtime)


def note_gradients(
    differences: Differences,
    trainer: EAPOTrainer,
    rows: dict[str, Tensor],
    policy: Policy,
    accumulate: Callable[[], dict[str, float]],
) -> None:
    """Loss, metrics and gradients of one optimizer step that is not taken."""
    trainer.model.prepare_for_training()
    trainer.optimizer.zero_grad()
    trainer.model.prepare_for_training_step()
    loss, theirs = trainer.model.get_loss_and_metrics(rows, forward_only=False)
    trainer.model.finish_training_step()
    for name, ours in accumulate().items():
        differences.note(name, [theirs[name]], [ours])
    total = theirs["loss/policy"] - ENTROPY_COEF * theirs["loss/entropy"]
    differences.note("loss", [loss], [total])
    native = dict(policy.modules[0].named_parameters())
    names = [name for name, _ in trainer.model.model.named_parameters()]
    gradients = [parameter.grad.flatten() for parameter in trainer.model.model.parameters()]
    differences.note("gradients", torch.cat(gradients), torch.cat([native[name].main_grad.flatten() for name in names]))


def compare_restored(
    actor: MegatronGPTEAPOActorModel, cfg: DictConfig, runtime: Runtime, file: Path
) -> dict[str, float]:
    """The trained actor saved as a .nemo file, and a new one restored from it as the train script does."""
    tokens = rollout_batch()[0]["response_tokens"]
    log_probs = actor.get_inference_log_probs(tokens)
    actor.save_to(str(file))
    torch.distributed.barrier()
    unset_num_microbatches_calculator()
    restored = load_from_nemo(
        MegatronGPTEAPOActorModel, cfg.model, pytorch_lightning_trainer(runtime, Records()), restore_path=str(file)
    )
    differences, trained = Differences(), dict(actor.model.named_parameters())
    for name, parameter in restored.model.named_parameters():
        differences.note("weights", parameter.data, trained[name].data)
    restored.prepare_for_inference()
    differences.note("log-probs", restored.get_inference_log_probs(tokens), log_probs)
    return differences.over_ranks(runtime)


def rollout_batch() -> tuple[dict[str, Tensor], Tensor]:
    """The training batch as the trainer gets it from its rollouts, and where its response tokens are, bool [N, S-1]."""
    batch, length = training_batch(), 24
    tokens = torch.full((batch.size, length), EOS)
    prompts = torch.full((batch.size, length), EOS)
    places = torch.zeros(batch.size, length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(batch.prompts, batch.responses.token_lists(), strict=True)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        prompts[row, : len(prompt)] = torch.tensor(prompt)
        places[row, len(prompt) : len(prompt) + len(response)] = True
    prompt_lengths = torch.tensor([len(prompt) for prompt in batch.prompts])
    rollouts = {
        "response_tokens": tokens,
        "prompt_tokens": prompts,
        "prompt_lengths": prompt_lengths,
        "response_lengths": prompt_lengths + batch.mask.sum(dim=1),
        "rewards": batch.rewards,
    }
    return {name: values[ROLLOUT_ORDER] for name, values in rollouts.items()}, places[:, 1:]


def configuration(case: Case, parallel: Parallel, runtime: Runtime, folder: Path) -> DictConfig:
    """The base configuration, for the tiny model and the arithmetic task on CPU."""
    tokenizer = folder / "tokenizer"
    data = {name: folder / f"{name}.jsonl" for name in ("train", "validation")}
    if runtime.is_main:
        extra = "".join(chr(ord("A") + i) for i in range(VOCAB_SIZE - 3 - len(ALPHABET)))
        character_tokenizer(ALPHABET + extra).save_pretrained(tokenizer)
        for name, split in (("train", "train"), ("validation", "held_out")):
            examples = arithmetic_examples(split, seed=1, size=16, num_terms=[2])
            lines = (json.dumps({"text": example.prompt, "answer": example.answer}) + "\n" for example in examples)
            data[name].write_text("".join(lines))
    torch.distributed.barrier()
    with initialize_config_dir(str(RECIPES / "conf"), version_base=None):
        cfg = compose("gpt_eapo_actor")
    cpu = {
        "trainer": {
            "accelerator": "cpu",
            "precision": 32,
            "reinforce": {
                "max_steps": FIT_STEPS,
                "val_check_interval": FIT_STEPS,
                "num_rollouts_per_prompt": GROUP,
                "algorithm": {"loss": {"entropy_coef": ENTROPY_COEF}},
                "trt_llm": {"enable": False},
            },
        },
        "verifier": {"reward": "nemo_reward:mostly_digits", "num_workers": 1},
        "model": {
            "reinforce": {
                "num_rollout_samples": 4,
                "rollout_micro_batch_size": 2,
                "num_val_samples": 4,
                "offload_adam_states": False,
                "sampling_params": {"temperature": TEMPERATURE, "end_strings": ["<eos>"]},
                "length_params": {"max_length": 8},
            },
            **parallel.model_dump(include={"tensor_model_parallel_size", "pipeline_model_parallel_size"}),
            "micro_batch_size": 2,
            "global_batch_size": GROUP,
            "megatron_amp_O2": False,
            "encoder_seq_length": 32,
            "max_position_embeddings": case.hf_config["max_position_embeddings"],
            "num_layers": case.hf_config["num_hidden_layers"],
            "hidden_size": case.hf_config["hidden_size"],
            "ffn_hidden_size": case.hf_config["intermediate_size"],
            "num_attention_heads": case.hf_config["num_attention_heads"],
            "num_query_groups": case.hf_config["num_key_value_heads"],
            "init_method_std": case.hf_config["initializer_range"],
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "normalization": "rmsnorm",
            "layernorm_epsilon": 1e-6,
            "activation": "fast-swiglu",
            "bias": False,
            "qkv_bias": case.hf_config["model_type"] == "qwen2",
            "kv_channels": case.hf_config.get("head_dim"),
            "share_embeddings_and_output_weights": case.hf_config["tie_word_embeddings"],
            "position_embedding_type": "rope",
            "rotary_base": int(case.hf_config.get("rope_theta", 10000)),
            "make_vocab_size_divisible_by": 8,
            "bias_activation_fusion": False,
            "bias_dropout_add_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
            "transformer_engine": False,
            "activations_checkpoint_granularity": None,
            "activations_checkpoint_method": None,
            "activations_checkpoint_num_layers": None,
            "activations_checkpoint_layers_per_pipeline": None,
            "use_cpu_initialization": True,
            "tokenizer": {"library": "huggingface", "type": str(tokenizer), "use_fast": True},
            "data": {
                "data_prefix": {
                    "train": [str(data["train"])],
                    "validation": [str(data["validation"])],
                    "test": [str(data["validation"])],
                }
            },
        },
    }
    OmegaConf.set_struct(cfg, False)
    cfg.model.optim = {"name": "sgd", **SGD}
    for key, value in case.method.items():
        cfg.trainer.reinforce.algorithm[key] = value
    return OmegaConf.merge(cfg, cpu)


def pytorch_lightning_trainer(runtime: Runtime, records: Records) -> Trainer:
    """On the ranks of this launch, as torchrun would have named them."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "LOCAL_WORLD_SIZE": str(runtime.world_size), "GROUP_RANK": "0"}
    return Trainer(
        accelerator="cpu",
        devices=runtime.world_size,
        strategy=NLPDDPStrategy(no_ddp_communication_hook=True, find_unused_parameters=False),
        precision=32,
        logger=records,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=1,
        max_steps=-1,
    )


def copy_weights(policy: Policy, actor: MegatronGPTEAPOActorModel) -> None:
    native = dict(policy.modules[0].named_parameters())
    theirs = dict(actor.model.named_parameters())
    assert theirs.keys() == native.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(native[name].data)


def main(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in cases(folder, names):
        measure(name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
