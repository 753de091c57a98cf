"""EAPO on a Hugging Face model in one process, response by response: the reference of every parallel layout.

Weights, activations and statistics are float64; in float32 they show what float32 costs. Equations are those of EAPO,
arXiv 2604.11056.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from layouts import MINI_BATCHES, MODELS, TEMPERATURE, old_policy_offsets, training_batch

ALPHA, PHI, EPS_LOW, EPS_HIGH = 0.2, 2.0, 0.2, 0.28


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors are tiny: more threads wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    return {
        key: part.clone()
        for name, tensor in _saved(model)
        if (value := value_of(tensor)) is not None
        for key, part in _file_tensors(model.config.model_type, name, value.detach())
    }


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of tensors_of."""
    for name, tensor in _saved(model):
        for key, part in _file_tensors(model.config.model_type, name, tensor.detach()):
            part.copy_(tensors[key])


def _saved(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict().keys()
    return [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]


def _file_tensors(model_type: str, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views of a tensor by their names in checkpoint files."""
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
        gate, up, down = ("w1", "w3", "w2")
    prefix, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        for expert, half in product(range(len(value)), (0, 1)):
            yield f"{prefix}.experts.{expert}.{(gate, up)[half]}.weight", value[expert].chunk(2)[half]
    elif kind == "down_proj":
        for expert in range(len(value)):
            yield f"{prefix}.experts.{expert}.{down}.weight", value[expert]
    else:
        yield name, value


def write_models(folder: Path) -> None:
    """Each of MODELS as a Hugging Face folder."""
    for name in MODELS:
        tiny_model(name).save_pretrained(folder / name)


class Reference:
    """One model's log-probs, entropies, losses and gradients on the training batch, at whatever weights it is given."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.batch = training_batch()
        self.responses = self.batch.responses.token_lists()
        self.model = copy.deepcopy(tiny_model(name)).to(dtype)
        self.start = tensors_of(self.model, lambda tensor: tensor)
        with torch.no_grad():
            scores = [self.score(row) for row in range(self.batch.size)]
        self.log_probs, self.entropies = ([score[i] for score in scores] for i in range(2))
        offsets = old_policy_offsets(self.batch).to(dtype)
        self.old_log_probs = [
            log_probs + offsets[row, : len(log_probs)] for row, log_probs in enumerate(self.log_probs)
        ]
        self.advantages = self._eapo_advantages()

    @one_thread()
    def score(self, row: int) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the tokens of one response."""
        prompt, response = self.batch.prompts[row], self.responses[row]
        logits = self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs[torch.arange(len(response)), response], entropies

    def _eapo_advantages(self) -> list[Tensor]:
        """A^CA of each response's tokens (Eq. 6 and 7)."""
        groups = self.batch.group_ids.tolist()
        shaped = []
        for row, group in enumerate(groups):
            members = [other for other in range(len(groups)) if groups[other] == group]
            rewards = self.batch.rewards[members].to(self.dtype)
            advantage = (self.batch.rewards[row].to(self.dtype) - rewards.mean()) / (rewards.std() + 1e-6)
            tokens = torch.cat([self.entropies[member] for member in members])
            term = (self.entropies[row] - tokens.mean()) / tokens.std(correction=0)
            term = term.clamp(-advantage.abs() / PHI, advantage.abs() / PHI)
            shaped.append(advantage + ALPHA * advantage.sign() * term)
        return shaped

    def loss(self, rows: Sequence[int], aggregation: str) -> Tensor:
        """Eq. 2, over all tokens of `rows` or group by group."""
        groups = self.batch.group_ids.tolist()
        lengths = {row: len(self.responses[row]) for row in rows}
        total = torch.zeros((), dtype=self.dtype)
        for row in rows:
            ratio = (self.score(row)[0] - self.old_log_probs[row]).exp()
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

    @one_thread()
    def gradients(
        self, rows: Sequence[int], aggregation: str, weights: Mapping[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss of `rows` at these weights and its gradient, both by Hugging Face name."""
        load_tensors(self.model, weights)
        self.model.zero_grad()
        loss = self.loss(rows, aggregation)
        loss.backward()
        return loss.item(), tensors_of(self.model, lambda parameter: parameter.grad)

    @cache  # noqa: B019
    def gradients_at_start(self, rows: tuple[int, ...], aggregation: str) -> tuple[float, dict[str, Tensor]]:
        return self.gradients(rows, aggregation, self.start)


@cache
def reference_of(name: str) -> Reference:
    return Reference(name)


@cache
def cost_of_float32(name: str) -> float:
    """How far gradients of the same model in float32 lie from these: the largest share of a tensor's largest element.

    Over the mini-batches, at weights around the model's own that differ by 1%: other roundings each time.
    """
    exact, rounded = reference_of(name), Reference(name, torch.float32)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2):
        weights = {
            key: (tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=generator))).float()
            for key, tensor in exact.start.items()
        }
        for rows, aggregation in MINI_BATCHES:
            _, expected = exact.gradients(rows, aggregation, weights)
            _, actual = rounded.gradients(rows, aggregation, weights)
            shares += [
                float((actual[key] - tensor).abs().max() / tensor.abs().max())
                for key, tensor in expected.items()
                if tensor.any()
            ]
    return max(shares)
