"""The recipe through NeMo-RL's configuration classes, and what is refused in them (`make test-nemo-rl`)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nemo_rl", reason="NeMo-RL has sources and an environment of its own: make test-nemo-rl")

from nemo_rl.algorithms.grpo import MasterConfig
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig
from nemo_rl.utils.config import parse_hydra_overrides, register_omegaconf_resolvers
from omegaconf import OmegaConf
from real_recipe import RECIPE, run_grpo_eapo

from eapo_megatron.algorithms import Algorithm, LossSettings
from eapo_megatron.integrations.nemo_rl import EAPOAdvantageEstimator, EAPOLossFn
from eapo_megatron.integrations.nemo_rl.settings import check_config


def config_with(*overrides: str) -> MasterConfig:
    register_omegaconf_resolvers()
    config = parse_hydra_overrides(run_grpo_eapo.load(str(RECIPE)), list(overrides))
    return MasterConfig(**OmegaConf.to_container(config, resolve=True))


def test_the_recipe_is_the_papers_setting() -> None:
    config = config_with()
    check_config(config)
    loss = EAPOLossFn.from_config(config.loss_fn)
    assert loss.algorithm == Algorithm(loss_settings=LossSettings(eps_low=0.2, eps_high=0.28))
    estimator = EAPOAdvantageEstimator(config.grpo.adv_estimator.model_dump(), entropies=None, log=None)
    assert estimator.algorithm.shaping is not None
    assert (config.grpo.num_prompts_per_step, config.grpo.num_generations_per_prompt) == (512, 8)
    assert config.policy["megatron_cfg"]["tensor_model_parallel_size"] == 2


def test_every_key_of_the_recipe_is_one_of_the_base_configurations() -> None:
    """But for the estimator's own: a key that NeMo-RL does not know would change nothing."""
    base = OmegaConf.load(run_grpo_eapo.BASE)
    own = {"advantage_estimator", "shaping", "correct_reward", "wrong_reward"}

    def unknown(section: object, known: object, path: str) -> list[str]:
        if not OmegaConf.is_dict(section):
            return []
        names = [f"{path}{name}" for name in section if name not in known]
        return names + [
            name for key in section if key in known for name in unknown(section[key], known[key], f"{path}{key}.")
        ]

    assert unknown(OmegaConf.load(RECIPE), base, "") == [f"grpo.adv_estimator.{name}" for name in own_in_order(own)]


def own_in_order(own: set[str]) -> list[str]:
    return [name for name in OmegaConf.load(RECIPE).grpo.adv_estimator if name in own]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss_fn.use_cispo=true", "loss_fn.use_cispo must be False"),
        ("+loss_fn.ratio_clip=0.2", "loss_fn.ratio_clip is not a key"),
        ("loss_fn.reference_policy_kl_penalty=0.01", "loss_fn.kl_output_clamp_value must be null"),
        ("grpo.async_grpo.enabled=true", "grpo.async_grpo.enabled must be false"),
        ("data_plane.enabled=true", "data_plane.enabled must be false"),
        ("+grpo.adv_estimator.shapping=1", "grpo.adv_estimator.shapping is not known"),
        ("policy.megatron_cfg.context_parallel_size=2", "policy.megatron_cfg.context_parallel_size must be 1"),
        ("policy.megatron_cfg.use_fused_linear_logprobs=true", "policy.megatron_cfg.use_fused_linear_logprobs must be"),
        ("policy.generation.top_p=0.9", "policy.generation.top_p must be 1"),
        ("policy.generation.top_k=20", "policy.generation.top_k must be null"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_config(config_with(override))


def test_every_setting_of_nemo_rls_loss_is_read_or_refused() -> None:
    """A setting that a later NeMo-RL adds would be dropped in silence."""
    source = Path(run_grpo_eapo.__file__).parents[2] / "eapo_megatron" / "integrations" / "nemo_rl"
    text = (source / "loss.py").read_text() + (source / "settings.py").read_text()
    assert [name for name in ClippedPGLossConfig.model_fields if name not in text] == []
