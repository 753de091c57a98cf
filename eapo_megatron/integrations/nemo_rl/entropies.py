"""Per-token entropies in NeMo-RL's layout, from the logits of its old-log-prob pass."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy


def token_entropies(
    logits: Tensor,
    *,
    num_sequences: int,
    seq_length: int,
    cu_seqlens_padded: Tensor | None,
    tp_group: torch.distributed.ProcessGroup | None,
    vocab_size: int,
) -> Tensor:
    """Entropy (nats) of the distribution that each token was drawn from, float32 [B, S]; 0 for the first.

    logits: [B, >= S, V/TP], or packed [1, total, V/TP] with the B + 1 offsets of the padded sequences in
    `cu_seqlens_padded`. Positions beyond a packed sequence are 0. One collective.
    """
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, entropies = vocab_parallel_log_probs_and_entropy(logits, targets, tp_group=tp_group, vocab_size=vocab_size)
    result = entropies.new_zeros(num_sequences, seq_length)
    if cu_seqlens_padded is None:
        result[:, 1:] = entropies[:, : seq_length - 1]
        return result
    for row, (start, end) in enumerate(pairwise(cu_seqlens_padded.tolist())):
        length = min(end - start, seq_length)
        result[row, 1:length] = entropies[0, start : start + length - 1]
    return result
