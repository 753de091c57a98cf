"""Groups of two and four ranks with a shard of the vocabulary each, against the definitions in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rounding import assert_near
from test_logits import reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy
from processes import on_ranks

RANKS = 4  # as one group of four and as two groups of two, where the rank in the group is not the global one
WIDTH = 13  # columns of a rank: a multiple of nothing


def cases(tp_size: int) -> dict[str, tuple[Tensor, Tensor, dict]]:
    """Whole-vocabulary logits, targets and settings by name."""
    generator = torch.Generator().manual_seed(tp_size)
    total = WIDTH * tp_size

    def random(*shape: int, vocab_size: int = total) -> tuple[Tensor, Tensor]:
        logits = torch.randn(*shape, total, generator=generator) * 4
        return logits, torch.randint(vocab_size, shape, generator=generator)

    one_shard_hidden, targets_elsewhere = random(9)
    one_shard_hidden[:, -WIDTH:] = -torch.inf
    two_tops, _ = random(6)
    two_tops[:, 0] = two_tops[:, -1] = 60.0
    far_apart, _ = random(6)
    far_apart[:, :WIDTH] += 3e4
    return {
        "plain": (*random(4, 5), {}),
        "entropy without gradient": (*random(4, 5), {"entropy_grad": False}),
        "hot": (*random(3, 2, 4), {"temperature": 2.5, "chunk_size": 5}),
        "cold": (*random(7), {"temperature": 0.6, "chunk_size": 2}),
        "a rank of -inf alone": (one_shard_hidden, targets_elsewhere % (total - WIDTH), {}),
        "padded columns": (*random(8, vocab_size=total - 3), {"vocab_size": total - 3}),
        "a rank of padding alone": (*random(8, vocab_size=WIDTH - 2), {"vocab_size": WIDTH - 2}),
        "all targets on the first rank": (random(8)[0], torch.arange(8), {}),
        "all targets on the last rank": (random(8)[0], total - 1 - torch.arange(8), {}),
        "equal maxima on two ranks": (two_tops, torch.full((6,), total - 1), {}),
        "shards far apart": (far_apart, torch.full((6,), total - 1), {}),
        "no tokens": (*random(0), {}),
        "one token": (*random(), {}),
        "bfloat16": (random(8)[0].bfloat16(), torch.arange(8), {}),
        "float16": (random(8)[0].half(), torch.arange(8), {}),
        "float64": (random(8)[0].double(), torch.arange(8), {}),
    }


def compute_shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pair, _ = dist.new_subgroups(2)
    results = {}
    for tp_group in (pair, dist.group.WORLD):
        tp_size, tp_rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
        for name, (whole, targets, settings) in cases(tp_size).items():
            logits = whole[..., tp_rank * WIDTH : (tp_rank + 1) * WIDTH].clone().requires_grad_()
            settings = {"tp_group": tp_group, "entropy_grad": True} | settings
            with profile(activities=[ProfilerActivity.CPU]) as forward:
                outputs = vocab_parallel_log_probs_and_entropy(logits, targets, **settings)
            differentiable = [output for output in outputs if output.requires_grad]
            upstream = upstream_of(targets)[: len(differentiable)]
            with profile(activities=[ProfilerActivity.CPU]) as backward:
                (gradient,) = torch.autograd.grad(differentiable, [logits], upstream)
            collectives = [
                sum(event.name.startswith("c10d::") for event in profiler.events()) for profiler in (forward, backward)
            ]
            results[tp_size, name] = (outputs[0].detach(), outputs[1].detach(), gradient, collectives)
        bad_target, zeros = torch.tensor([WIDTH * tp_size]), torch.zeros(1, WIDTH)
        with pytest.raises(ValueError, match=f"vocab_size must be between 1 and the global width {WIDTH * tp_size}"):
            vocab_parallel_log_probs_and_entropy(
                zeros, bad_target - 1, tp_group=tp_group, vocab_size=WIDTH * tp_size + 1
            )
        with pytest.raises(ValueError, match="targets must be global token ids"):
            vocab_parallel_log_probs_and_entropy(zeros, bad_target, tp_group=tp_group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def upstream_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linspace(-1, 2, 2 * targets.numel()).view(2, *targets.shape)
    return values[0], values[1]


def test_shards_agree_with_the_whole_vocabulary(tmp_path: Path) -> None:
    on_ranks(compute_shards, str(tmp_path), size=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for group in (ranks[:2], ranks[2:], ranks):
        for name, (logits, targets, settings) in cases(len(group)).items():
            results = [rank[len(group), name] for rank in group]
            vocab_size, temperature = settings.get("vocab_size", logits.shape[-1]), settings.get("temperature", 1.0)
            of_log_probs, of_entropy = upstream_of(targets)
            upstream = (of_log_probs, of_entropy * settings.get("entropy_grad", True))
            log_probs, entropy, gradient = reference(logits, targets, vocab_size, temperature, upstream)
            for result in results:
                assert torch.equal(result[0], results[0][0]), name
                assert torch.equal(result[1], results[0][1]), name
                assert result[3] == [1, 0], name
            assert_near(results[0][0], log_probs, name)
            assert_near(results[0][1], entropy, name)
            assert_near(torch.cat([result[2] for result in results], -1), gradient, name)
