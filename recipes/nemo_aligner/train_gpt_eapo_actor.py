"""Trains a policy with EAPO in NeMo-Aligner 0.7.0; in its container, with this package installed:

    torchrun --nproc-per-node 8 recipes/nemo_aligner/train_gpt_eapo_actor.py \
        --config-name eapo-qwen2.5-math-7b-1n8g-tp2 pretrained_checkpoint.restore_from_path=qwen2.5-math-7b.nemo \
        "model.data.data_prefix={train:[train.jsonl],validation:[math500.jsonl],test:[math500.jsonl]}"

`train` runs in the tests on CPU; `main`, which needs a NeMo checkpoint and GPUs, was not run here.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_rlhf_datasets,
    collate_with_pad_to_max_batch,
)
from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo, retrieve_model_state_dict_in_cpu
from omegaconf import DictConfig, OmegaConf

from eapo_megatron.integrations.nemo_aligner import (
    EAPOTrainer,
    MegatronGPTEAPOActorModel,
    VerifierRewards,
    check_config,
    read_answers,
)
from eapo_megatron.rewards import RewardPool

OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("subtract", lambda x, y: x - y, replace=True)


def train(cfg: DictConfig, ptl_trainer: Any, actor: MegatronGPTEAPOActorModel) -> EAPOTrainer:
    """Builds data, optimizer and rewards around an actor and trains it to the end."""
    restored = None if ptl_trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(ptl_trainer)
    init_distributed(ptl_trainer, actor, cfg.model.get("transformer_engine", False))
    train_set, validation_set, _ = build_train_valid_test_rlhf_datasets(
        cfg=cfg.model,
        data_prefix=cfg.model.data.data_prefix,
        data_impl=cfg.model.data.data_impl,
        splits_string=cfg.model.data.splits_string,
        train_valid_test_num_samples=[-1, -1, -1],
        seq_length=cfg.model.data.seq_length,
        seed=cfg.model.seed,
        tokenizer=actor.tokenizer,
    )
    settings = cfg.model.reinforce
    collate = collate_with_pad_to_max_batch(
        settings.length_params.max_length, actor.tokenizer.eos_id, cfg, generate_masks_and_position_ids=False
    )
    dataloader = partial(build_dataloader, cfg=cfg, collate_fn=collate, load_gbs=False)
    # NeMo counts the scheduler's steps on this loader, whose batches are optimizer steps; nothing reads from it.
    counting = torch.utils.data.DataLoader(train_set, batch_size=cfg.model.global_batch_size)
    init_using_ptl(ptl_trainer, actor, counting, train_set)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    logger = CustomLoggerWrapper(ptl_trainer.loggers)
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    files = cfg.model.data.data_prefix
    answers = read_answers([*files.train, *files.validation], actor.tokenizer.text_to_ids)
    pool = RewardPool(**cfg.verifier)
    with VerifierRewards(answers, actor.tokenizer, pool) as rewards:
        trainer = EAPOTrainer(
            cfg.trainer.reinforce,
            actor,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader_builder=partial(
                dataloader,
                dataset=train_set,
                mbs=settings.rollout_micro_batch_size,
                gbs=settings.num_rollout_samples,
            ),
            val_dataloader_builder=partial(
                dataloader,
                dataset=validation_set,
                mbs=settings.val_rollout_micro_batch_size,
                gbs=settings.num_val_samples,
                use_random_sampler=False,
            ),
            collate_fn=collate,
            rm=rewards,
            batch_iterator_cls=get_batch_iterator_cls(cfg.trainer.reinforce.batch_iterator),
            logger=logger,
            ckpt_callback=add_custom_checkpoint_callback(ptl_trainer, actor),
            run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
        )
        if restored is not None:
            trainer.load_state_dict(restored)
        trainer.fit()
    return trainer


@hydra_runner(config_path="conf", config_name="gpt_eapo_actor")
def main(cfg: DictConfig) -> None:
    """Restores the checkpoint as an EAPO actor and trains it."""
    try:
        check_config(cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    checkpoint = cfg.pretrained_checkpoint.restore_from_path
    cfg.model = load_and_override_model_config(checkpoint, cfg.model)
    ptl_trainer = resolve_and_create_trainer(cfg, "reinforce")
    exp_manager(ptl_trainer, cfg.exp_manager)
    actor = load_from_nemo(MegatronGPTEAPOActorModel, cfg.model, ptl_trainer, strict=True, restore_path=checkpoint)
    init_peft(actor, cfg.model)
    if cfg.trainer.reinforce.initial_policy_kl_penalty > 0 and cfg.model.peft.peft_scheme == "none":
        actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
            actor, megatron_amp_O2=cfg.model.megatron_amp_O2
        )
    train(cfg, ptl_trainer, actor)


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    main()
