"""Every method by one name: the recipe's `method` key, a small set of ordinary settings.

They stand below all that the recipe, its parents and the command line say themselves: a method gives defaults, and
`eapo-megatron train --dry-run` prints what came out. Where a recipe names another shaping or loss than the method's,
the options of the method's own one are left out. docs/methods.md says what of each paper was checked, and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from eapo_megatron.config.experience import Rollout
from eapo_megatron.config.section import Section
from eapo_megatron.config.training import Loss, Shaping

SHAPING, LOSS, SAMPLING = "algorithm.shaping", "algorithm.loss", "algorithm.dynamic_sampling_rounds"
# Sections whose name chooses a function, which has options of its own.
CHOICES: dict[str, type[Section]] = {SHAPING: Shaping, LOSS: Loss}


@dataclass(frozen=True)
class OfResponse:
    """A number of tokens: this share of rollout.max_response_tokens."""

    share: Fraction


# What GRPO as EAPO's paper writes it (Eq. 2) has: group advantages, PPO's clip, the mean over all tokens.
PLAIN: dict[str, Any] = {
    "algorithm.advantage_estimator": "grpo",
    f"{SHAPING}.name": "none",
    f"{LOSS}.name": "clipped_surrogate",
    f"{LOSS}.eps_low": 0.2,
    f"{LOSS}.eps_high": 0.2,
    f"{LOSS}.aggregation": "token_mean",
    f"{LOSS}.kl_coef": 0.0,
    f"{LOSS}.entropy_coef": 0.0,
    SAMPLING: 1,
    "reward.overlong.buffer_tokens": 0,
}
CLIP_HIGHER: dict[str, Any] = PLAIN | {f"{LOSS}.eps_high": 0.28, SAMPLING: 4}
DAPO: dict[str, Any] = CLIP_HIGHER | {"reward.overlong.buffer_tokens": OfResponse(Fraction(1, 5))}  # 4,096 of 20,480


def _with_loss(base: Mapping[str, Any], name: str, **options: Any) -> dict[str, Any]:
    """Another loss in the place of the clipped surrogate and its clip range."""
    others = {key: value for key, value in base.items() if not key.startswith(f"{LOSS}.eps")}
    return others | {f"{LOSS}.name": name} | {f"{LOSS}.{option}": value for option, value in options.items()}


def _with_shaping(base: Mapping[str, Any], name: str, **options: Any) -> dict[str, Any]:
    return {**base, f"{SHAPING}.name": name} | {f"{SHAPING}.{option}": value for option, value in options.items()}


METHODS: dict[str, dict[str, Any]] = {  # dotted keys of the recipe
    # EAPO, 2604.11056, Eq. 6 and 7: A + alpha sign(A) clip(z-score of H in the group, -+ |A| / phi)
    "eapo": _with_shaping(CLIP_HIGHER, "eapo", alpha=0.2, phi=2.0),
    # GRPO, 2402.03300, with its KL term (beta 0.04, k3), averaged over tokens as in EAPO's Eq. 2
    "grpo": PLAIN | {f"{LOSS}.kl_coef": 0.04, f"{LOSS}.kl_estimator": "k3"},
    # DAPO, 2503.14476: clip-higher, dynamic sampling, token-level loss, soft overlong punishment
    "dapo": DAPO,
    # W-REINFORCE, 2506.01347: advantage +0.1 for a correct response, -1 for an incorrect one
    "w_reinf": PLAIN | {"algorithm.advantage_estimator": "w_reinforce"},
    # Entropy bonus with an adaptive coefficient, Skywork-OR1, 2505.22312
    "entro_reg": DAPO | {f"{LOSS}.entropy_target": 0.2, f"{LOSS}.entropy_coef_step": 0.005},
    # EntroAdv, 2506.14758: A + min(a H, |A| / kappa)
    "entro_adv": _with_shaping(DAPO, "entropy_advantage", a=0.4, kappa=2.0),
    # Forking tokens, 2506.01939: a gradient at the top 20 % of the batch's tokens by entropy
    "forking": _with_shaping(DAPO, "forking_tokens", fraction=0.2),
    # KL-Cov, 2505.22617: no PPO clip, |log rho| at the top tokens by covariance
    "kl_cov": _with_loss(DAPO, "kl_cov", fraction=2e-3, coefficient=1.0),
    # Clip-Cov, 2505.22617: no gradient at tokens drawn among those of high covariance
    "clip_cov": _with_loss(
        DAPO, "clip_cov", fraction=2e-4, covariance_low=1.0, covariance_high=5.0, eps_low=1.0, eps_high=1.0
    ),
    # CE-GPPO, 2509.20712: clipped tokens keep a bounded gradient
    "ce_gppo": _with_loss(DAPO, "ce_gppo", eps_low=0.2, eps_high=0.28, beta_low=0.75, beta_high=1.0),
    # Dr.GRPO, 2503.20783: r - mean, and a sum over tokens divided by a constant
    "dr_grpo": PLAIN
    | {
        "algorithm.advantage_estimator": "dr_grpo",
        f"{LOSS}.aggregation": "seq_mean_token_sum",
        f"{LOSS}.aggregation_length": OfResponse(Fraction(1)),
    },
    # RLOO, 2402.14740: r - mean of the others; the log-probability of a response is a sum over its tokens
    "rloo": PLAIN
    | {
        "algorithm.advantage_estimator": "rloo",
        f"{LOSS}.aggregation": "seq_mean_token_sum",
        f"{LOSS}.aggregation_length": OfResponse(Fraction(1)),
    },
    # GSPO, 2507.18071: one ratio a response, the mean over responses
    "gspo": _with_loss(PLAIN, "gspo", eps_low=3e-4, eps_high=4e-4) | {f"{LOSS}.aggregation": "seq_mean_token_mean"},
    # CISPO, 2506.13585: the ratio clipped as a weight, every token keeps its gradient
    "cispo": _with_loss(DAPO, "cispo", eps_low=1.0, eps_high=0.28),
    # The four quadrants alone, EAPO's Sec. 4.1
    **{name: _with_shaping(CLIP_HIGHER, "quadrant", only=[name]) for name in ("phr", "plr", "nhr", "nlr")},
}


def check_method(name: object) -> None:
    """Refuse a name that is not a method.

    Raises:
        ValueError: listing the known ones.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"must be one of {', '.join(METHODS)}, got {name!r}")


def method_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings["method"]` says, as nested settings to go below `settings`.

    Raises:
        ValueError: the method is not known.
    """
    check_method(settings["method"])
    nested: dict[str, Any] = {}
    for key, value in METHODS[settings["method"]].items():
        section, _, last = key.rpartition(".")
        if section in CHOICES and last not in CHOICES[section].model_fields:
            chosen = _at(settings, f"{section}.name")
            if chosen is not None and chosen != METHODS[settings["method"]][f"{section}.name"]:
                continue  # an option of a function that the recipe replaces
        held = nested
        for part in section.split("."):
            held = held.setdefault(part, {})
        held[last] = _tokens(value, settings) if isinstance(value, OfResponse) else value
    return nested


def _tokens(of_response: OfResponse, settings: Mapping[str, Any]) -> int:
    longest = _at(settings, "rollout.max_response_tokens")
    if not isinstance(longest, int) or longest < 1:  # left out, or refused later on
        longest = Rollout.model_fields["max_response_tokens"].default
    return int(longest * of_response.share)


def _at(settings: Mapping[str, Any], key: str) -> Any:
    held: Any = settings
    for part in key.split("."):
        held = held.get(part) if isinstance(held, Mapping) else None
    return held
