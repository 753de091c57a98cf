"""The credit of a token, measured: what entropy bounds (EAPO, arXiv 2604.11056, Prop. 1 and 2) and what it stands for.

At a state s with policy pi(v | s) and p(r | s, v), the probability of reward r after token v, the credit of the token
is the mutual information of token and reward

    I(o; r | s) = H(o | s) - H(o | r, s) <= H(o | s)                                                        (Prop. 1)
                = E_r [ KL( pi_hs(. | s, r) || pi(. | s) ) ],   pi_hs(v | s, r) ~ pi(v | s) p(r | s, v)     (Prop. 2)

The bound holds for any random variables; how tight it is must be measured. `token_credit` does so where p(r | s, v) is
known: `success_probabilities` finds it by going through all responses of a policy that is small enough. On recorded
runs, where it is not known, `proxy_credit` is the mutual information of entropy's value and reward (Eq. 14), and
`advantage_variance` says how much of the advantages' variance entropy explains. All numbers are float64, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

# Prefixes of one length, int64 [B, t], to log-probabilities of the next token [B, V].
NextLogProbs = Callable[[Tensor], Tensor]
# Finished or full-length responses as token lists, to whether each is correct.
Verdicts = Callable[[list[list[int]]], list[bool]]


@dataclass(frozen=True)
class Credit:
    """Of each state, float64 [B], nats."""

    credit: Tensor  # I(o; r | s)
    entropy: Tensor  # H(o | s), its bound
    hindsight: Tensor  # E_r KL(pi_hs || pi), equal to the credit
    success: Tensor  # p(r = 1 | s), no unit


def token_credit(log_probs: Tensor, success: Tensor) -> Credit:
    """The exact credit of the next token of B states.

    log_probs: float32 or float64 [B, V], normalised; success: [B, V], the probability of a correct response after
    each token, in [0, 1].

    Raises:
        ValueError: for shapes that differ, or probabilities outside [0, 1].
    """
    if log_probs.dim() != 2 or log_probs.shape != success.shape:
        raise ValueError(
            f"log_probs and success must have one shape [B, V], got {list(log_probs.shape)} and {list(success.shape)}"
        )
    probs, success = log_probs.double().exp(), success.double()
    if not bool(((success >= 0) & (success <= 1)).all()):
        raise ValueError("success must be probabilities in [0, 1]")
    joint = torch.stack([probs * success, probs * (1 - success)])  # p(r, v | s), [2, B, V]
    of_reward = joint.sum(dim=-1)  # p(r | s)
    entropy = _entropy(probs)
    given_reward = _entropy(joint).sum(dim=0) - _entropy(of_reward.transpose(0, 1))  # H(o, r) - H(r)
    hindsight = torch.where(of_reward > 0, of_reward, 1.0).unsqueeze(-1)
    ratio = joint / hindsight / torch.where(probs > 0, probs, 1.0)  # pi_hs / pi
    divergence = torch.special.xlogy(joint, ratio).sum(dim=(0, -1))
    return Credit(entropy - given_reward, entropy, divergence, of_reward[0])


def success_probabilities(
    next_log_probs: NextLogProbs, verdicts: Verdicts, *, max_tokens: int, stop_token_ids: Collection[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every state of a policy, by going through all of its responses.

    -> for each length t = 0 .. max_tokens - 1 the prefixes int64 [B, t] that are not done, the log-probabilities
    [B, V] of their next token, and the probability of a correct response after each, float64 [B, V]. Work and memory
    grow as V ** max_tokens.

    Raises:
        ValueError: when `max_tokens` is less than 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    prefixes, levels = torch.zeros(1, 0, dtype=torch.int64), []
    for length in range(max_tokens):
        log_probs = next_log_probs(prefixes).double()
        vocabulary = torch.arange(log_probs.shape[1])
        stops = torch.isin(vocabulary, torch.tensor(sorted(stop_token_ids), dtype=torch.int64))
        goes_on = ~stops if length + 1 < max_tokens else torch.zeros_like(stops)
        levels.append((prefixes, log_probs, goes_on))
        prefixes = _followed_by(prefixes, vocabulary[goes_on])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    value = torch.zeros(0, dtype=torch.float64)  # of the next level's prefixes, in their order
    for prefixes, log_probs, goes_on in reversed(levels):
        vocabulary = torch.arange(len(goes_on))
        success = torch.empty_like(log_probs)
        ended = verdicts(_followed_by(prefixes, vocabulary[~goes_on]).tolist())
        success[:, ~goes_on] = torch.tensor(ended, dtype=torch.float64).view(len(prefixes), -1)
        success[:, goes_on] = value.view(len(prefixes), -1)
        value = (log_probs.exp() * success).sum(dim=-1).clamp(0, 1)
        found.append((prefixes, log_probs, success))
    return found[::-1]


def sampled_credit(log_probs: Tensor, wins: Tensor, trials: Tensor) -> tuple[Credit, Tensor]:
    """The credit where continuations were sampled -> its estimate, and the estimate's standard error, [B].

    log_probs: [B, V]; wins, trials: int64 [B, V], the correct continuations after each token and all of them, at least
    two wherever the token has probability. The plug-in estimate is too large by about sum_v pi_v (1 - pi_v) / (2 n_v)
    in nats; the jackknife over continuations takes this off and gives the error.

    Raises:
        ValueError: for fewer than two continuations after a token that has probability.
    """
    probs = log_probs.double().exp()
    if bool(((trials < 2) & (probs > 0)).any()):
        raise ValueError("trials must be at least 2 after every token that has probability")
    n, won = trials.clamp(min=2).double(), wins.double()
    plain = token_credit(log_probs, won / n)
    without_win = _one_changed(log_probs, won / n, (won - 1).clamp(min=0) / (n - 1))
    without_loss = _one_changed(log_probs, won / n, won.clamp(max=n - 1) / (n - 1))
    left_out = torch.stack([without_win, without_loss]) - plain.credit.unsqueeze(-1)  # [2, B, V]
    weights = torch.stack([won, n - won])
    of_token = (weights * left_out).sum(dim=0) / n  # the mean change when one continuation of a token is left out
    bias = ((n - 1) * of_token).sum(dim=-1)
    spread = (weights * (left_out - of_token) ** 2).sum(dim=0) * (n - 1) / n
    corrected = Credit(plain.credit - bias, plain.entropy, plain.hindsight - bias, plain.success)
    return corrected, spread.sum(dim=-1).sqrt()


def proxy_credit(entropies: Tensor, positive: Tensor, *, bins: int = 20) -> tuple[Tensor, Tensor]:
    """I(H; r), the mutual information of the value of a token's entropy and the reward (Eq. 14).

    entropies: [M], nats, of recorded tokens; positive: bool [M], whether each token's response is correct. Tokens are
    cut into `bins` of equal counts -> each bin's share of the information (they sum to it), float64 [bins], and its
    mean entropy [bins]. The plug-in estimate of independent values is about (bins - 1) / (2 M), not 0.

    Raises:
        ValueError: for fewer tokens than bins, or shapes that differ.
    """
    order, parts = _equal_bins(entropies, bins)
    if positive.shape != entropies.shape:
        raise ValueError(f"positive must have the entropies' shape {list(entropies.shape)}")
    ordered, values = positive[order].double(), entropies[order].double()
    base = ordered.mean()
    shares, centres = [], []
    for part, value in zip(ordered.split(parts), values.split(parts), strict=True):
        rate, weight = part.mean(), len(part) / len(ordered)
        gain = torch.special.xlogy(rate, rate / base) + torch.special.xlogy(1 - rate, (1 - rate) / (1 - base))
        shares.append(weight * gain if 0 < base < 1 else base * 0)
        centres.append(value.mean())
    return torch.stack(shares), torch.stack(centres)


def advantage_variance(advantages: Tensor, entropies: Tensor, *, bins: int = 20) -> tuple[float, float]:
    """Var(A) = E[Var(A | H)] + Var(E[A | H]) over tokens -> the two parts, population variances.

    advantages, entropies: [M]; H is cut into `bins` of equal counts.

    Raises:
        ValueError: for fewer tokens than bins.
    """
    order, parts = _equal_bins(entropies, bins)
    ordered = advantages[order].double()
    mean, total = ordered.mean(), len(ordered)
    within = between = 0.0
    for part in ordered.split(parts):
        within += float(((part - part.mean()) ** 2).sum()) / total
        between += len(part) * float((part.mean() - mean) ** 2) / total
    return within, between


def logit_gradient(log_probs: Tensor, tokens: Tensor, advantages: Tensor) -> Tensor:
    """-dL/dz of the policy gradient's loss -A log pi(o): A (1 - pi(o)) at the token, -A pi(v) elsewhere (Eq. 5, 21).

    log_probs: [B, V]; tokens: int64 [B]; advantages: [B] -> float64 [B, V].
    """
    probs = log_probs.double().exp()
    chosen = torch.nn.functional.one_hot(tokens, probs.shape[-1])
    return advantages.double().unsqueeze(-1) * (chosen - probs)


def _entropy(probs: Tensor) -> Tensor:
    """Over the last axis, of a distribution or a part of one."""
    return torch.special.entr(probs).sum(dim=-1)


def _followed_by(prefixes: Tensor, tokens: Tensor) -> Tensor:
    """Each prefix [B, t] before each token [K] -> [B * K, t + 1]."""
    count = len(tokens)
    return torch.cat([prefixes.repeat_interleave(count, dim=0), tokens.repeat(len(prefixes)).unsqueeze(-1)], dim=-1)


def _one_changed(log_probs: Tensor, success: Tensor, changed: Tensor) -> Tensor:
    """The credit of each state when the success after one token alone is `changed`, [B, V]."""
    size = success.shape[-1]
    diagonal = torch.eye(size, dtype=torch.bool)
    all_rows = torch.where(diagonal, changed.unsqueeze(1), success.unsqueeze(1))  # [B, V, V]
    rows = log_probs.unsqueeze(1).expand(all_rows.shape).reshape(-1, size)
    return token_credit(rows, all_rows.reshape(-1, size)).credit.view(success.shape)


def _equal_bins(entropies: Tensor, bins: int) -> tuple[Tensor, list[int]]:
    """The tokens in the order of their entropies, and how many each bin holds."""
    if entropies.dim() != 1 or not 1 <= bins <= len(entropies):
        raise ValueError(f"entropies must be [M] with M at least {bins} bins, got {list(entropies.shape)}")
    size, larger = divmod(len(entropies), bins)
    return entropies.argsort(stable=True), [size + (index < larger) for index in range(bins)]
