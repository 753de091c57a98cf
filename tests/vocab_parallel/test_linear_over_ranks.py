"""Groups of two and four ranks with a shard of the output weight each, against the definitions in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rounding import assert_near
from test_linear import reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eapo_megatron.vocab_parallel import linear_log_probs_and_entropy
from eapo_megatron.vocab_parallel.linear_tiles import BLOCK
from processes import on_ranks

RANKS = 4  # as one group of four and as two groups of two, where the rank in the group is not the global one
WIDTH = BLOCK + 13  # rows of a rank
SIZE = 24


def cases(tp_size: int) -> dict[str, tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """Hidden, whole weight, targets and settings by name."""
    generator = torch.Generator().manual_seed(tp_size)
    total = WIDTH * tp_size

    def random(*shape: int, vocab_size: int = total, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        hidden = torch.randn(*shape, SIZE, generator=generator).to(dtype)
        weight = torch.randn(total, SIZE, generator=generator).to(dtype)
        return hidden, weight, torch.randint(vocab_size, shape, generator=generator)

    bias = torch.randn(total, generator=generator)
    bias[-WIDTH:] = -torch.inf
    return {
        "plain": (*random(4, 5), {}),
        "entropy without gradient": (*random(4, 5), {"entropy_grad": False}),
        "a temperature a token": (*random(3, 4), {"temperature": torch.linspace(0.5, 2, 12).view(3, 4)}),
        "small chunks": (*random(9), {"temperature": 0.6, "chunk_size": 2}),
        "a rank of -inf alone": (*random(9, vocab_size=total - WIDTH), {"bias": bias}),
        "padded rows": (*random(8, vocab_size=total - 3), {"vocab_size": total - 3}),
        "a rank of padding alone": (*random(8, vocab_size=WIDTH - 2), {"vocab_size": WIDTH - 2}),
        "a filtered rank of padding": (*random(8, vocab_size=9), {"vocab_size": WIDTH - 2, "grad_filter": 1e-7}),
        "all targets on the first rank": (*random(8)[:2], torch.arange(8), {}),
        "all targets on the last rank": (*random(8)[:2], total - 1 - torch.arange(8), {}),
        "half of the rows without gradient": (*random(40), {}),
        "no row with gradient": (*random(6), {}),
        "filtered": (*random(40), {"grad_filter": 1e-6}),
        "sequence parallel": (*random(8), {"allreduce_dgrad": False}),
        "frozen hidden": (*random(8), {}),
        "frozen weight": (*random(8), {}),
        "no tokens": (*random(0), {}),
        "one token": (*random(), {}),
        "bfloat16": (*random(8, dtype=torch.bfloat16), {}),
        "float64": (*random(8, dtype=torch.float64), {}),
        "logits": (*random(8), {"backend": "logits", "temperature": 0.9}),
        "logits, sequence parallel": (*random(8), {"backend": "logits", "allreduce_dgrad": False}),
    }


def upstream_of(name: str, targets: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linspace(-1, 2, 2 * targets.numel()).view(2, *targets.shape)
    if name == "half of the rows without gradient":
        values[:, ::2] = 0
    return (values[0], values[1]) if name != "no row with gradient" else (values[0] * 0, values[1] * 0)


def backward_collectives(name: str, settings: dict[str, Any]) -> int:
    return 0 if name == "frozen hidden" or not settings.get("allreduce_dgrad", True) else 1


def compute_shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pair, _ = dist.new_subgroups(2)
    results = {}
    for tp_group in (pair, dist.group.WORLD):
        tp_size, tp_rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
        own = slice(tp_rank * WIDTH, (tp_rank + 1) * WIDTH)
        for name, (hidden, whole, targets, settings) in cases(tp_size).items():
            hidden.requires_grad_(name != "frozen hidden")
            weight = whole[own].clone().requires_grad_(name != "frozen weight")
            settings = {"tp_group": tp_group, "entropy_grad": True} | settings
            if "bias" in settings:
                settings["bias"] = settings["bias"][own]
            with profile(activities=[ProfilerActivity.CPU]) as forward:
                outputs = linear_log_probs_and_entropy(hidden, weight, targets, **settings)
            differentiable = [output for output in outputs if output.requires_grad]
            upstream = [value.to(outputs[0].dtype) for value in upstream_of(name, targets)][: len(differentiable)]
            with profile(activities=[ProfilerActivity.CPU]) as backward:
                torch.autograd.backward(differentiable, upstream)
            collectives = [
                sum(event.name.startswith("c10d::") for event in profiler.events()) for profiler in (forward, backward)
            ]
            values = [output.detach() for output in outputs]
            results[tp_size, name] = (*values, hidden.grad, weight.grad, collectives)
        with pytest.raises(ValueError, match=f"vocab_size must be between 1 and the global width {WIDTH * tp_size}"):
            linear_log_probs_and_entropy(hidden, weight, targets, tp_group=tp_group, vocab_size=WIDTH * tp_size + 1)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_agree_with_the_whole_vocabulary(tmp_path: Path) -> None:
    on_ranks(compute_shards, str(tmp_path), size=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for group in (ranks[:2], ranks[2:], ranks):
        for name, (hidden, weight, targets, settings) in cases(len(group)).items():
            results = [rank[len(group), name] for rank in group]
            of_log_probs, of_entropy = upstream_of(name, targets)
            keys = ("bias", "vocab_size", "temperature", "grad_filter")
            known = {key: settings[key] for key in keys if key in settings}
            upstream = (of_log_probs, of_entropy * settings.get("entropy_grad", True))
            expected = reference(hidden, weight, targets, upstream, terms=WIDTH, **known)
            for result in results:
                assert torch.equal(result[0], results[0][0]), name
                assert torch.equal(result[1], results[0][1]), name
                assert result[4] == [1, backward_collectives(name, settings)], name
            assert_near(results[0][0], expected.log_probs, name)
            assert_near(results[0][1], expected.entropy, name)
            if name != "frozen hidden":
                parts = [result[2].double() for result in results]
                if settings.get("allreduce_dgrad", True):
                    assert all(torch.equal(part, parts[0]) for part in parts), name
                    parts = parts[:1]
                assert_near(sum(parts).to(hidden.dtype), expected.hidden, name)
            if name != "frozen weight":
                of_weight = torch.cat([result[3] for result in results])
                assert_near(of_weight, expected.weight, name)
                assert not of_weight[settings.get("vocab_size", len(weight)) :].any()
