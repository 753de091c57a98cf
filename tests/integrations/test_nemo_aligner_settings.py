"""NeMo-Aligner: the configurations that are shipped, wrong ones, and how rollouts become groups and masks."""

from __future__ import annotations

import json
from pathlib import Path

import nemo_on_cpu  # noqa: F401  before NeMo

# isort: split
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from eapo_megatron.algorithms import LOSSES, LossInputs, reads
from eapo_megatron.integrations.nemo_aligner import check_config, read_answers
from eapo_megatron.integrations.nemo_aligner.trainer import prompt_groups, response_mask

CONF = Path(__file__).parents[2] / "recipes" / "nemo_aligner" / "conf"
OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("subtract", lambda x, y: x - y, replace=True)


def configuration(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, list(overrides))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_configuration_is_sound(name: str) -> None:
    cfg = configuration(name)
    check_config(cfg)
    OmegaConf.resolve(cfg)
    ranks = cfg.trainer.num_nodes * cfg.trainer.devices
    assert ranks % (cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.reinforce.algorithm.shaping.name=hapo", "trainer.reinforce.algorithm.shaping.name must be one of"),
        ("trainer.reinforce.algorithm.advantage_estimator=gae", "trainer.reinforce.algorithm.advantage_estimator must"),
        ("trainer.reinforce.algorithm.loss.eps_low=0", "trainer.reinforce.algorithm.loss.eps_low must be in"),
        ("+trainer.reinforce.algorithm.loss.clip=0.2", "trainer.reinforce.algorithm.loss.clip is not a key of"),
        ("+trainer.reinforce.algorithm.correction={name: tis}", "trainer.reinforce.algorithm.correction needs log-pr"),
        ("+trainer.reinforce.algorithm.loss.entropy_target=0.2", "trainer.reinforce.algorithm.loss.entropy_target mak"),
        ("trainer.reinforce.initial_policy_kl_penalty=0.1", "trainer.reinforce.initial_policy_kl_penalty must be"),
        ("trainer.reinforce.num_rollouts_per_prompt=1", "trainer.reinforce.num_rollouts_per_prompt is 1"),
        ("model.global_batch_size=100", "model.global_batch_size 100 must be a multiple of"),
        ("model.reinforce.num_rollout_samples=33", "model.reinforce.num_rollout_samples x "),
    ],
)
def test_a_wrong_key_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_config(configuration("gpt_eapo_actor", override))


@pytest.mark.parametrize("field", ["rollout_log_probs", "ref_log_probs", "selected"])
def test_a_loss_that_reads_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    @reads(field)
    def gap(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return inputs.log_probs - getattr(inputs, field), {}

    monkeypatch.setitem(LOSSES, "gap", gap)
    key = "trainer.reinforce.algorithm.loss"
    sentence = "'gap' marks tokens over" if field == "selected" else r"needs log-probs of the (rollouts|initial policy)"
    with pytest.raises(ValueError, match=rf"^{key} {sentence}"):
        check_config(configuration("gpt_eapo_actor", f"{key}.name=gap", f"~{key}.eps_low", f"~{key}.eps_high"))


def test_equal_prompts_are_a_group_whatever_pads_them() -> None:
    prompts = torch.tensor([[5, 6, 1, 0], [5, 6, 1, 1], [7, 1, 1, 1], [5, 6, 0, 9], [7, 7, 0, 0]])
    groups = prompt_groups(prompts, torch.tensor([2, 2, 1, 3, 1]))
    assert groups.tolist() == [0, 0, 2, 3, 2]


def test_the_response_is_masked_where_its_tokens_are_predicted() -> None:
    mask = response_mask(torch.zeros(2, 6), torch.tensor([2, 1]), torch.tensor([4, 6]))
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_answers_are_found_by_the_tokens_of_their_prompt(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = [{"text": "ab", "answer": "1"}, {"text": "c", "answer": "2"}, {"text": "ab", "answer": "1"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_answers([file], lambda text: list(text.encode())) == {(97, 98): "1", (99,): "2"}
    file.write_text(json.dumps({"text": "ab"}))
    with pytest.raises(ValueError, match="line 1: answer is missing"):
        read_answers([file], lambda text: list(text.encode()))
    file.write_text("\n".join(map(json.dumps, [*lines, {"text": "c", "answer": "3"}])))
    with pytest.raises(ValueError, match="line 4: another line answers the same prompt differently"):
        read_answers([file], lambda text: list(text.encode()))
