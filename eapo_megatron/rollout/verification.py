"""Whether an engine samples from the trainer's weights: log-probs of a few sampled tokens, by both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.stopping import TrainingStoppedError

PROBE_TOKENS = 16
# Mean |difference| of the log-probs, nats. With equal weights they agree to 1e-4 in float32 (tests/with_vllm); bfloat16
# was not measured. Stale weights, or another model's, differ by 0.1 to 10.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def probe_prompt(vocab_size: int, longest: int) -> list[int]:
    """A fixed prompt of at most 8 tokens."""
    return [(7 * place + 1) % vocab_size for place in range(min(8, longest))]


def check_weights(policy: Policy, prompt: Sequence[int], sampled: Responses, temperature: float) -> None:
    """Compares the log-probs of responses to `prompt`, the same on all ranks, with the policy's own.

    Raises:
        TrainingStoppedError: on all ranks, with the largest mean difference of a response.
    """
    count = len(sampled)
    batch = make_batch([list(prompt)] * count, sampled, torch.arange(count), torch.zeros(count), policy.runtime.device)
    worker = PolicyWorker(policy, micro_batch_size=1, temperature=temperature)
    own, _ = worker.log_probs_and_entropies(batch)
    means = ((own - batch.rollout_log_probs).abs() * batch.mask).sum(-1) / batch.mask.sum(-1)
    worst, tolerance = float(means.max()), TOLERANCE[policy.config.params_dtype]
    if not worst <= tolerance:  # NaN neither
        raise TrainingStoppedError(
            f"rollout.verify_weights: the engine's log-probs differ from the trainer's by {worst:.3g} nats on average, "
            f"at most {tolerance:g} are allowed: it does not sample from the weights that were sent"
        )
