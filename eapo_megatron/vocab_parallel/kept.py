"""Log-probability of every token among the tokens that the sampler kept, beside the entropy of the full softmax.

    log p_K(t) = z_t - log sum_{v in K_t} exp(z_v)

K_t is the set that top-k and top-p kept when token t was drawn; it is given, so that the current policy is scored on
the set that its token came from. Logits are materialised, and so is their masked copy: the sets are ragged lists of
ids, which no tile of a fused head could look up as it goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_megatron.vocab_parallel.linear import SumGradient
from eapo_megatron.vocab_parallel.logits import vocab_parallel_log_probs_and_entropy


def linear_kept_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept: tuple[Tensor, Tensor],
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    allreduce_dgrad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target among the kept tokens, and entropy (nats) of the full softmax, [M] each.

    hidden: [M, H]; weight: [V / TP, H]; targets: int64 [M]; kept: which of the M rows (int64 [K]) keeps which global
    token id (int64 [K]), the row's target among them. The other arguments and the results are those of
    `linear_log_probs_and_entropy`.

    Raises:
        ValueError: as `vocab_parallel_log_probs_and_entropy`.
    """
    if tp_group is not None and allreduce_dgrad:
        hidden = SumGradient.apply(hidden, tp_group)
    logits = torch.nn.functional.linear(hidden, weight)
    first = 0 if tp_group is None else torch.distributed.get_rank(tp_group) * len(weight)
    rows, columns = kept[0], kept[1] - first
    own = (columns >= 0) & (columns < len(weight))
    dropped = torch.ones_like(logits, dtype=torch.bool)
    dropped[rows[own], columns[own]] = False
    log_probs, _ = vocab_parallel_log_probs_and_entropy(
        logits.masked_fill(dropped, -torch.inf),
        targets,
        tp_group=tp_group,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    _, entropies = vocab_parallel_log_probs_and_entropy(
        logits if entropy_grad else logits.detach(),
        targets,
        tp_group=tp_group,
        vocab_size=vocab_size,
        temperature=temperature,
        entropy_grad=entropy_grad,
    )
    return log_probs, entropies
