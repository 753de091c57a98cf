"""EAPO on a Hugging Face model in one process, response by response: the reference of every parallel layout.

Weights, activations and statistics are float64. Equations are those of EAPO, arXiv 2604.11056.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from layouts import DECAY_STEPS, MINI_BATCHES, MODELS, OPTIMIZERS, TEMPERATURE, old_policy_offsets, training_batch

ALPHA, PHI, EPS_LOW, EPS_HIGH = 0.2, 2.0, 0.2, 0.28


@cache
def tiny_model(name: str) -> torch.nn.Module:
    """The transformers model of MODELS, float32, every weight random: biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**MODELS[name]), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model.eval()


def tensors_of(model: torch.nn.Module, value_of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """A value of each parameter and saved buffer by its name in checkpoint files, where experts are apart."""
    kept = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *buffers]:
        if (value := value_of(tensor)) is not None:
            tensors |= _file_tensors(model.config.model_type, name, value.detach())
    return tensors


def _file_tensors(model_type: str, name: str, value: Tensor) -> dict[str, Tensor]:
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
        gate, up, down = ("w1", "w3", "w2")
    prefix, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        halves = ((expert, half) for expert in range(len(value)) for half in (0, 1))
        return {
            f"{prefix}.experts.{expert}.{(gate, up)[half]}.weight": value[expert].chunk(2)[half].clone()
            for expert, half in halves
        }
    if kind == "down_proj":
        return {f"{prefix}.experts.{expert}.{down}.weight": value[expert].clone() for expert in range(len(value))}
    return {name: value.clone()}


def write_models(folder: Path) -> None:
    """Each of MODELS as a Hugging Face folder."""
    for name in MODELS:
        tiny_model(name).save_pretrained(folder / name)


class Reference:
    """One model's log-probs, entropies, losses and gradients on the training batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.batch = training_batch()
        self.responses = self.batch.responses.token_lists()
        self.model = self.fresh_model()
        with torch.no_grad():
            scores = [self.score(self.model, row) for row in range(self.batch.size)]
        self.log_probs, self.entropies = ([score[i] for score in scores] for i in range(2))
        offsets = old_policy_offsets(self.batch).double()
        self.old_log_probs = [
            log_probs + offsets[row, : len(log_probs)] for row, log_probs in enumerate(self.log_probs)
        ]
        self.advantages = self._eapo_advantages()

    def fresh_model(self) -> torch.nn.Module:
        return copy.deepcopy(tiny_model(self.name)).double()

    def score(self, model: torch.nn.Module, row: int) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the tokens of one response."""
        prompt, response = self.batch.prompts[row], self.responses[row]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs[torch.arange(len(response)), response], entropies

    def _eapo_advantages(self) -> list[Tensor]:
        """A^CA of each response's tokens (Eq. 6 and 7)."""
        groups = self.batch.group_ids.tolist()
        shaped = []
        for row, group in enumerate(groups):
            members = [other for other in range(len(groups)) if groups[other] == group]
            rewards = self.batch.rewards[members].double()
            advantage = (self.batch.rewards[row].double() - rewards.mean()) / (rewards.std() + 1e-6)
            tokens = torch.cat([self.entropies[member] for member in members])
            term = (self.entropies[row] - tokens.mean()) / tokens.std(correction=0)
            term = term.clamp(-advantage.abs() / PHI, advantage.abs() / PHI)
            shaped.append(advantage + ALPHA * advantage.sign() * term)
        return shaped

    def loss(self, model: torch.nn.Module, rows: Sequence[int], aggregation: str) -> Tensor:
        """Eq. 2, over all tokens of `rows` or group by group."""
        groups = self.batch.group_ids.tolist()
        lengths = {row: len(self.responses[row]) for row in rows}
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            ratio = (self.score(model, row)[0] - self.old_log_probs[row]).exp()
            surrogate = torch.minimum(
                ratio * self.advantages[row], ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * self.advantages[row]
            )
            if aggregation == "token_mean":
                denominator = sum(lengths.values())
            else:
                of_group = sum(length for other, length in lengths.items() if groups[other] == groups[row])
                denominator = of_group * len({groups[other] for other in rows})
            total = total - surrogate.sum() / denominator
        return total

    @cache  # noqa: B019
    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Loss over the whole batch and its gradient by Hugging Face name."""
        self.model.zero_grad()
        loss = self.loss(self.model, range(self.batch.size), "token_mean")
        loss.backward()
        return loss.item(), tensors_of(self.model, lambda parameter: parameter.grad)

    @cache  # noqa: B019
    def steps(self, optimizer_name: str) -> tuple[list[float], dict[str, Tensor]]:
        """Gradient norms of the optimizer steps on MINI_BATCHES, and the weights after them."""
        model = self.fresh_model()
        settings = OPTIMIZERS[optimizer_name]
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if settings["name"] == "sgd":
            optimizer = torch.optim.SGD(groups, lr=settings["lr"], momentum=settings.get("sgd_momentum", 0))
        else:
            optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.999), eps=settings["adam_eps"])
        norms = []
        for step, (rows, aggregation) in enumerate(MINI_BATCHES):
            model.zero_grad()
            self.loss(model, rows, aggregation).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_grad"]).item())
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - step / DECAY_STEPS)
            optimizer.step()
        return norms, tensors_of(model, lambda tensor: tensor)


@cache
def reference_of(name: str) -> Reference:
    return Reference(name)
