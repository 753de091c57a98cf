"""Log-probs over the kept tokens against float64, on one rank and over two with a shard of the vocabulary each."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from eapo_megatron.vocab_parallel import linear_kept_log_probs_and_entropy, linear_log_probs_and_entropy
from processes import on_ranks

RANKS, WIDTH, HIDDEN, TOKENS, VOCAB = 2, 11, 7, 24, 20  # two columns of the last rank are padding
TEMPERATURE = 0.7
UPSTREAM = torch.linspace(-1, 2, 2 * TOKENS).view(2, TOKENS)


def case(entropy_grad: bool) -> tuple[Tensor, Tensor, Tensor, list[list[int]], bool]:
    """Hidden states, weight, targets, and each token's kept set: one id, those of one rank alone, or some of both."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(RANKS * WIDTH, HIDDEN, generator=generator)
    sizes = [1, 2, 5, WIDTH, VOCAB]
    pools = [range(VOCAB), range(WIDTH), range(WIDTH, VOCAB)]
    sets = []
    for token in range(TOKENS):
        pool = torch.tensor(pools[token % 3])
        chosen = pool[torch.randperm(len(pool), generator=generator)[: sizes[token % 5]]]
        sets.append(sorted(chosen.tolist()))
    targets = torch.tensor([ids[token % len(ids)] for token, ids in enumerate(sets)])
    return hidden, weight, targets, sets, entropy_grad


def reference(case: tuple[Tensor, Tensor, Tensor, list[list[int]], bool]) -> list[Tensor]:
    """Log-probs, entropies and the gradients of hidden and weight, token by token."""
    hidden, weight, targets, sets, entropy_grad = case
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_probs, entropies = [], []
    for token, ids in enumerate(sets):
        logits = weight[:VOCAB] @ hidden[token] / TEMPERATURE
        log_probs.append(logits[targets[token]] - logits[ids].logsumexp(0))
        full = logits.log_softmax(0)
        entropies.append(-(full.exp() * full).sum())
    results = [torch.stack(log_probs), torch.stack(entropies)]
    loss = (UPSTREAM[0] * results[0]).sum() + entropy_grad * (UPSTREAM[1] * results[1]).sum()
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, [hidden, weight]))


def measure(
    case: tuple[Tensor, Tensor, Tensor, list[list[int]], bool],
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    hidden, weight, targets, sets, entropy_grad = case
    width = len(weight) // size
    hidden = hidden.clone().requires_grad_()
    weight = weight[rank * width : (rank + 1) * width].clone().requires_grad_()
    kept = (
        torch.arange(TOKENS).repeat_interleave(torch.tensor([len(ids) for ids in sets])),
        torch.tensor([token for ids in sets for token in ids]),
    )
    settings = {"tp_group": group, "vocab_size": VOCAB, "temperature": TEMPERATURE, "entropy_grad": entropy_grad}
    log_probs, entropies = linear_kept_log_probs_and_entropy(hidden, weight, targets, kept, **settings)
    assert entropies.requires_grad == entropy_grad
    _, full = linear_log_probs_and_entropy(hidden, weight, targets, backend="logits", **settings)
    torch.testing.assert_close(entropies, full)
    loss = (UPSTREAM[0] * log_probs).sum() + (UPSTREAM[1] * entropies).sum() * entropy_grad
    return [log_probs.detach(), entropies.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_one_rank() -> None:
    for entropy_grad in (False, True):
        assert_same(measure(case(entropy_grad)), reference(case(entropy_grad)))


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = [measure(case(entropy_grad), rank, RANKS, dist.group.WORLD) for entropy_grad in (False, True)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_of_the_vocabulary(tmp_path: Path) -> None:
    on_ranks(on_rank, str(tmp_path), size=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for entropy_grad, one, other in zip((False, True), first, second, strict=True):
        for value, same in zip(one[:3], other[:3], strict=True):
            assert torch.equal(value, same)
        assert_same([*one[:3], torch.cat([one[3], other[3]])], reference(case(entropy_grad)))
