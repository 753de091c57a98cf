"""NeMo-RL's GRPO with EAPO's advantages and loss: its examples/run_grpo.py with three parts put in.

From NeMo-RL's repository, with EAPO the folder of this one:

PYTHONPATH=$EAPO uv run python $EAPO/recipes/nemo_rl/run_grpo_eapo.py \\
    --config $EAPO/recipes/nemo_rl/grpo-qwen2.5-math-7b-1n8g-megatron-eapo.yaml [key.path=value ...]

NeMo-RL's workers have environments of their own, which `pip install` does not reach, and PYTHONPATH does. The recipe
extends NeMo-RL's examples/configs/grpo_math_1B.yaml.
"""

import sys
from itertools import count
from pathlib import Path

import nemo_rl
from nemo_rl.algorithms import grpo
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_response_data
from nemo_rl.distributed.virtual_cluster import init_ray
from nemo_rl.models.generation import configure_generation_config
from nemo_rl.utils.config import load_config, merge_with_override, parse_hydra_overrides, register_omegaconf_resolvers
from nemo_rl.utils.logger import get_next_experiment_dir
from omegaconf import DictConfig, OmegaConf

from eapo_megatron.integrations.nemo_rl import EAPOAdvantageEstimator, EAPOLossFn
from eapo_megatron.integrations.nemo_rl.policy import EntropyPolicy
from eapo_megatron.integrations.nemo_rl.settings import check_config

BASE = Path(nemo_rl.__file__).parents[1] / "examples" / "configs" / "grpo_math_1B.yaml"


def load(config_path: str) -> DictConfig:
    """The recipe over NeMo-RL's base configuration."""
    if not BASE.is_file():
        sys.exit(f"{BASE} is not there: run NeMo-RL from its repository, which holds it")
    return merge_with_override(load_config(BASE), load_config(config_path))


def main(config_path: str, overrides: list[str]) -> None:
    register_omegaconf_resolvers()
    config = parse_hydra_overrides(load(config_path), overrides)
    config = grpo.MasterConfig(**OmegaConf.to_container(config, resolve=True))
    config.logger["log_dir"] = get_next_experiment_dir(config.logger["log_dir"])
    settings = config.grpo.adv_estimator.model_dump()
    check_config(config)
    EAPOAdvantageEstimator(settings, entropies=None, log=None)  # a wrong value is an error before anything starts
    loss_fn = EAPOLossFn.from_config(config.loss_fn)

    init_ray()
    tokenizer = get_tokenizer(config.policy["tokenizer"])
    config.policy["generation"] = configure_generation_config(config.policy["generation"], tokenizer)
    dataset, val_dataset, task_to_env, val_task_to_env = setup_response_data(tokenizer, config.data, config.env)
    policy, generation, _, _, dataloader, val_dataloader, _, logger, checkpointer, state, config, *_ = grpo.setup(
        config, tokenizer, dataset, val_dataset, policy_factory=EntropyPolicy
    )
    steps = count(state.total_steps + 1)
    estimator = EAPOAdvantageEstimator(
        settings,
        entropies=lambda: policy.entropies,
        log=lambda metrics: logger.log_metrics(metrics, next(steps), prefix="train"),
    )
    grpo._create_advantage_estimator = lambda _: estimator
    try:
        with checkpointer:
            grpo.grpo_train(
                policy, generation, dataloader, val_dataloader, tokenizer, loss_fn,
                task_to_env, val_task_to_env, logger, checkpointer, state, config,
            )  # fmt: skip
    finally:
        grpo.shutdown_environments(task_to_env, val_task_to_env)
        generation.shutdown()


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--config") + 1], [argument for argument in sys.argv[1:] if "=" in argument])
