"""Token log-probabilities and entropies over a vocabulary sharded across tensor-parallel ranks."""

from eapo_megatron.vocab_parallel.kept import linear_kept_log_probs_and_entropy
from eapo_megatron.vocab_parallel.linear import linear_log_probs_and_entropy
from eapo_megatron.vocab_parallel.logits import vocab_parallel_log_probs_and_entropy

__all__ = [
    "linear_kept_log_probs_and_entropy",
    "linear_log_probs_and_entropy",
    "vocab_parallel_log_probs_and_entropy",
]
