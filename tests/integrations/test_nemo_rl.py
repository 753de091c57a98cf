"""The NeMo-RL adapter against its documented types: a stand-in takes the place of each module that it imports."""

from __future__ import annotations

import enum
import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from eapo_megatron.algorithms import LOSSES, Algorithm, Correction, LossInputs, LossSettings, reads
from eapo_megatron.integrations.nemo_rl import EAPOAdvantageEstimator, EAPOLossFn
from eapo_megatron.integrations.nemo_rl.entropies import token_entropies
from eapo_megatron.integrations.nemo_rl.settings import check_config

RECIPE = Path(__file__).parents[2] / "recipes/nemo_rl/grpo-qwen2.5-math-7b-1n8g-megatron-eapo.yaml"


class BatchedDataDict(dict[str, Any]):
    """NeMo-RL's batch: a dict of tensors whose first dimension is the batch's; `slice` cuts all of them."""

    def slice(self, start: int, end: int) -> BatchedDataDict:
        return BatchedDataDict({key: value[start:end] for key, value in self.items()})


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


@pytest.fixture(autouse=True)
def nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of NeMo-RL that the loss imports."""
    _module(
        monkeypatch,
        "nemo_rl.algorithms.loss.interfaces",
        LossType=LossType,
        LossInputType=LossInputType,
        MetricNormalizer=MetricNormalizer,
    )


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or _module(monkeypatch, parent), child, module)
    return module


def random_data(seed: int = 0) -> BatchedDataDict:
    """Six responses of different lengths, one of them left out by its sample mask; NaN where nothing may look."""
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.zeros(6, 11)
    for row in range(6):
        token_mask[row, 2 : 4 + row] = 1
    data = BatchedDataDict(token_mask=token_mask, sample_mask=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]))
    for name in ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
        values = torch.randn(6, 11, generator=generator)
        data[name] = torch.where(token_mask.bool(), values if name == "advantages" else -values.abs(), torch.nan)
    return data


def valid(data: BatchedDataDict) -> Tensor:
    return (data["token_mask"] * data["sample_mask"][:, None])[:, 1:].bool()


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_micro_batches_add_up_to_the_loss(aggregation: str, kl_coef: float) -> None:
    data = random_data()
    log_probs = (data["prev_logprobs"][:, 1:] + torch.linspace(-0.5, 0.5, 10)).requires_grad_()
    loss_fn = EAPOLossFn(Algorithm(loss_settings=LossSettings(aggregation=aggregation, kl_coef=kl_coef)))
    mask = valid(data)
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    loss = torch.zeros(())
    sums: dict[str, float] = {}
    for start, end in ((0, 1), (1, 3), (3, 6)):
        part, metrics = loss_fn(data.slice(start, end), **counts, next_token_logprobs=log_probs[start:end])
        loss = loss + part
        sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
    (gradient,) = torch.autograd.grad(loss, log_probs)

    reference = log_probs.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        for column in range(10):
            if not mask[row, column]:
                continue
            old, advantage, ref = (
                data[name][row, column + 1].double()
                for name in ("prev_logprobs", "advantages", "reference_policy_logprobs")
            )
            ratio = (reference[row, column] - old).exp()
            token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            gap = ref - reference[row, column]
            token = token + kl_coef * (gap.exp() - gap - 1)
            denominator = mask.sum() if aggregation == "token_mean" else mask[row].sum() * data["sample_mask"].sum()
            expected = expected + token / denominator
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums["loss"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    gap = (data["generation_logprobs"] - data["prev_logprobs"])[:, 1:][mask].double()
    assert sums["token_mult_prob_error"] == pytest.approx(gap.abs().exp().mean().item(), rel=1e-5)
    assert sums["gen_kl_error"] == pytest.approx(((-gap).exp() + gap - 1).mean().item(), rel=1e-5)
    assert sums["num_valid_samples"] == 5


def test_the_loss_names_its_protocol() -> None:
    loss_fn = EAPOLossFn(Algorithm())
    assert (loss_fn.loss_type, loss_fn.input_type) == (LossType.TOKEN_LEVEL, LossInputType.LOGPROB)
    by_sequence = Algorithm(loss_settings=LossSettings(aggregation="seq_mean_token_mean"))
    assert EAPOLossFn(by_sequence).loss_type == LossType.SEQUENCE_LEVEL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LossSettings(aggregation="group_token_mean"), "aggregation 'group_token_mean' needs whole groups"),
        (LossSettings("kl_cov"), "the loss 'kl_cov' marks tokens over the optimizer step"),
        (LossSettings(entropy_target=0.2), "entropy_target makes entropy_coef a state of the run"),
        (LossSettings(entropy_coef=0.1), "the loss 'clipped_surrogate' with entropy_coef 0.1 needs entropies"),
    ],
)
def test_the_loss_refuses_what_it_cannot_see(settings: LossSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EAPOLossFn(Algorithm(loss_settings=settings))


def test_a_loss_may_read_the_samplers_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    @reads("rollout_log_probs")
    def gap(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs.log_probs - inputs.rollout_log_probs, {}

    monkeypatch.setitem(LOSSES, "gap", gap)
    data = random_data()
    mask, log_probs = valid(data), data["prev_logprobs"][:, 1:]
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    loss, _ = EAPOLossFn(Algorithm(loss_settings=LossSettings("gap")))(data, **counts, next_token_logprobs=log_probs)
    expected = (log_probs - data["generation_logprobs"][:, 1:])[mask].double().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_corrected_for_the_sampler() -> None:
    data = random_data()
    mask, log_probs = valid(data), data["prev_logprobs"][:, 1:]
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    algorithm = Algorithm(correction=Correction("tis", options={"high": 1.5}))
    loss, _ = EAPOLossFn(algorithm)(data, **counts, next_token_logprobs=log_probs)
    weights = (log_probs - data["generation_logprobs"][:, 1:])[mask].double().exp().clamp(max=1.5)
    assert (weights < 1.5).any()
    expected = -(weights * data["advantages"][:, 1:][mask].double()).mean()  # the ratio to the old policy is 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"^grpo\.adv_estimator\.correction is no part of an advantage estimator"):
        EAPOAdvantageEstimator({"correction": {"name": "tis"}}, lambda: torch.zeros(1, 1), lambda _: None)


def test_advantages_are_shaped_by_group() -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.tensor([[5, 6, 0], [5, 7, 8]])[[0, 1, 1, 0, 1, 0]]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.25, 1.0])
    mask = (torch.rand(6, 9, generator=generator) < 0.6).float()
    mask[:, 0], mask[:, 4] = 0, 1
    entropies = torch.where(mask.bool(), torch.rand(6, 9, generator=generator), torch.nan)
    logged: list[dict[str, float]] = []
    estimator = EAPOAdvantageEstimator({"name": "eapo"}, lambda: entropies, logged.append)
    advantages = estimator.compute_advantage(
        prompt_ids=prompts,
        rewards=rewards,
        mask=mask,
        repeated_batch=BatchedDataDict(),
        logprobs_policy=torch.zeros(6, 9),
        logprobs_reference=None,
    )

    for rows in ([0, 3, 5], [1, 2, 4]):
        signed = 2 * rewards[rows].double() - 1
        tokens = entropies[rows][mask[rows].bool()].double()
        for row, reward in zip(rows, signed, strict=True):
            advantage = (reward - signed.mean()) / (signed.std() + 1e-6)
            term = ((entropies[row].double() - tokens.mean()) / tokens.std(correction=0)).clamp(
                -advantage.abs() / 2, advantage.abs() / 2
            )
            expected = torch.where(mask[row].bool(), advantage + 0.2 * advantage.sign() * term, 0.0)
            torch.testing.assert_close(advantages[row].double(), expected, rtol=1e-5, atol=1e-6)
    assert sum(logged[0][f"quadrants/{name}/token_share"] for name in ("phr", "plr", "nhr", "nlr")) == pytest.approx(1)
    # A reward of 0.25 lies below the middle of wrong (0) and correct (1): its tokens count as wrong.
    positive = mask[[0, 2, 5]].sum() / mask.sum()
    assert logged[0]["quadrants/phr/token_share"] + logged[0]["quadrants/plr/token_share"] == pytest.approx(positive)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shaping": {"name": "hapo"}}, "grpo.adv_estimator.shaping.name must be one of"),
        ({"advantage_estimator": "gae"}, "grpo.adv_estimator.advantage_estimator must be one of"),
        ({"correct_reward": 0.0}, "grpo.adv_estimator.correct_reward 0.0 must be larger"),
    ],
)
def test_a_wrong_estimator_key_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EAPOAdvantageEstimator(config, torch.empty, lambda metrics: None)


def test_entropies_of_other_responses_are_refused() -> None:
    estimator = EAPOAdvantageEstimator({}, lambda: torch.zeros(2, 5), lambda metrics: None)
    with pytest.raises(ValueError, match=r"entropies are \[2, 5\] for responses \[2, 6\]"):
        estimator.compute_advantage(
            prompt_ids=torch.zeros(2, 1),
            rewards=torch.ones(2),
            mask=torch.ones(2, 6),
            logprobs_policy=torch.zeros(2, 6),
        )


def loss_config(**changes: Any) -> types.SimpleNamespace:
    """The section `loss_fn` of NeMo-RL's examples/configs/grpo_math_1B.yaml, without its KL penalty."""
    defaults = {
        "reference_policy_kl_penalty": 0.0,
        "reference_policy_kl_type": "k3",
        "kl_input_clamp_value": 20.0,
        "kl_output_clamp_value": 10.0,
        "ratio_clip_min": 0.2,
        "ratio_clip_max": 0.2,
        "ratio_clip_c": None,
        "use_on_policy_kl_approximation": False,
        "use_importance_sampling_correction": False,
        "truncated_importance_sampling_type": None,
        "truncated_importance_sampling_ratio": None,
        "truncated_importance_sampling_ratio_min": None,
        "sequence_level_importance_ratios": False,
        "token_level_loss": True,
        "force_on_policy_ratio": False,
        "use_kl_in_reward": False,
        "use_cispo": False,
        "disable_ppo_ratio": False,
        "positive_example_nll_weight": 0.0,
    }
    return types.SimpleNamespace(**defaults | changes)


class Section(types.SimpleNamespace):
    def model_dump(self) -> dict[str, Any]:
        return vars(self)


def whole_config(section: str = "", **changes: Any) -> types.SimpleNamespace:
    """NeMo-RL's configuration with the recipe in it, and with changes in a section of it."""
    recipe = yaml.safe_load(RECIPE.read_text())
    inherited = {"normalize_rewards": True, "minus_baseline": True, "reward_weights": None}
    sections: dict[str, Any] = {
        "grpo": {"use_dynamic_sampling": False, "async_grpo": Section(enabled=False)} | recipe["grpo"],
        "adv_estimator": inherited | recipe["grpo"]["adv_estimator"],
        "loss_fn": vars(loss_config(**recipe["loss_fn"])),
        "policy": recipe["policy"],
        "data_plane": {},
    }
    if section:
        sections[section] = sections[section] | changes
    sections["grpo"]["adv_estimator"] = Section(**sections.pop("adv_estimator"))
    sections["grpo"] = Section(**sections["grpo"])
    sections["loss_fn"] = Section(**sections["loss_fn"])
    return types.SimpleNamespace(**sections)


def test_the_recipe_is_sound() -> None:
    config = whole_config()
    check_config(config)
    EAPOAdvantageEstimator(config.grpo.adv_estimator.model_dump(), torch.empty, lambda metrics: None)
    assert EAPOLossFn.from_config(config.loss_fn).algorithm == Algorithm(
        loss_settings=LossSettings(eps_low=0.2, eps_high=0.28)
    )


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("loss_fn", {"use_cispo": True}, "loss_fn.use_cispo must be False"),
        ("loss_fn", {"disable_ppo_ratio": True}, "loss_fn.disable_ppo_ratio must be False"),
        ("loss_fn", {"positive_example_nll_weight": 0.1}, "loss_fn.positive_example_nll_weight must be 0.0"),
        ("loss_fn", {"use_kl_in_reward": True}, "loss_fn.use_kl_in_reward must be False"),
        ("loss_fn", {"force_on_policy_ratio": True}, "loss_fn.force_on_policy_ratio must be False"),
        ("loss_fn", {"sequence_level_importance_ratios": True}, "loss_fn.sequence_level_importance_ratios must be"),
        ("loss_fn", {"reference_policy_kl_penalty": 0.01}, "loss_fn.kl_output_clamp_value must be null"),
        ("loss_fn", {"model_extra": {"ratio_clip": 1}}, "loss_fn.ratio_clip is not a key"),
        (
            "loss_fn",
            {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 2.0},
            "loss_fn.truncated_importance_sampling_type needs use_importance_sampling_correction",
        ),
        (
            "loss_fn",
            {"truncated_importance_sampling_type": "seq-mask-tis", "use_importance_sampling_correction": True},
            "loss_fn.truncated_importance_sampling_type must be tis or icepop, got 'seq-mask-tis'",
        ),
        ("adv_estimator", {"shapping": {}}, "grpo.adv_estimator.shapping is not known: the keys are"),
        ("grpo", {"async_grpo": Section(enabled=True)}, "grpo.async_grpo.enabled must be false"),
        (
            "grpo",
            {"use_dynamic_sampling": True, "use_leave_one_out_baseline": True},
            "grpo.use_leave_one_out_baseline must be false with grpo.use_dynamic_sampling",
        ),
        ("data_plane", {"enabled": True}, "data_plane.enabled must be false"),
        ("policy", {"generation": {"top_p": 0.9}}, "policy.generation.top_p must be 1"),
        ("policy", {"generation": {"top_k": 20}}, "policy.generation.top_k must be null"),
        (
            "policy",
            {
                "generation": {"temperature": 0.7},
                "megatron_cfg": {"enabled": True, "pipeline_model_parallel_size": 2},
            },
            "policy.generation.temperature must be 1 with pipeline_model_parallel_size above 1",
        ),
        ("policy", {"megatron_cfg": {"enabled": False}}, "policy.megatron_cfg.enabled must be true"),
        ("policy", {"megatron_cfg": {"enabled": True, "context_parallel_size": 2}}, "policy.megatron_cfg.context"),
        ("policy", {"megatron_cfg": {"enabled": True, "use_fused_linear_logprobs": True}}, "policy.megatron_cfg.use_f"),
    ],
)
def test_settings_without_an_effect_are_refused(section: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_config(whole_config(section, **changes))


def test_dual_clip_and_correction_are_nemo_rls() -> None:
    """Against the formula of ClippedPGLossFn, in float64."""
    data = random_data()
    mask = valid(data)
    shift = torch.linspace(-0.9, 0.9, 10)
    log_probs = (data["prev_logprobs"][:, 1:] + shift).requires_grad_()
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    ratio = shift.double().exp().expand(6, 10)[mask]
    advantages = data["advantages"][:, 1:].double()[mask]
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    surrogate = torch.where(advantages < 0, torch.minimum(surrogate, -advantages * 1.5), surrogate)
    weight = (data["prev_logprobs"] - data["generation_logprobs"])[:, 1:].double().exp()[mask]
    expected = {
        None: weight,
        "tis": weight.clamp(0, 1.5),
        "icepop": torch.where((weight >= 0.5) & (weight <= 1.5), weight, 0.0),
    }
    assert (weight > 1.5).any()
    assert (weight < 0.5).any()
    for name, weights in expected.items():
        config = loss_config(
            ratio_clip_c=1.5,
            use_importance_sampling_correction=True,
            truncated_importance_sampling_type=name,
            truncated_importance_sampling_ratio=name and 1.5,
            truncated_importance_sampling_ratio_min=0.5 if name == "icepop" else None,
        )
        loss, metrics = EAPOLossFn.from_config(config)(data, **counts, next_token_logprobs=log_probs)
        assert loss.item() == pytest.approx((weights * surrogate).mean().item(), rel=1e-5)
        assert metrics["sampling_importance_ratio"] == pytest.approx(weights.mean().item(), rel=1e-5)
    gap = (data["prev_logprobs"] - data["generation_logprobs"])[:, 1:].double()[mask]
    current = log_probs.detach().double()[mask]
    assert metrics["probs_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert metrics["policy_kl_error"] == pytest.approx(((-gap).exp() - 1 + gap).mean().item(), rel=1e-5)
    sampler = data["generation_logprobs"][:, 1:].double()[mask]
    assert metrics["approx_entropy"] == pytest.approx(-((current - sampler).exp() * current).mean().item(), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_a_batch_without_valid_tokens_has_loss_0(aggregation: str) -> None:
    data = random_data()
    data["sample_mask"] = torch.zeros(6)
    log_probs = torch.full((6, 10), -1.0, requires_grad=True)
    loss_fn = EAPOLossFn(Algorithm(loss_settings=LossSettings(aggregation=aggregation)))
    counts = {"global_valid_seqs": torch.tensor(0), "global_valid_toks": torch.tensor(0)}
    loss, metrics = loss_fn(data, **counts, next_token_logprobs=log_probs)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == 0
    assert set(metrics.values()) == {0.0}
    assert torch.equal(gradient, torch.zeros(6, 10))


def test_bfloat16_is_taken() -> None:
    data = random_data()
    mask = valid(data)
    halves = BatchedDataDict({name: values.bfloat16() for name, values in data.items()})
    log_probs = halves["prev_logprobs"][:, 1:] + 0.1
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    loss_fn = EAPOLossFn(Algorithm())
    loss, _ = loss_fn(halves, **counts, next_token_logprobs=log_probs)
    whole = BatchedDataDict({name: values.float() for name, values in halves.items()})
    expected, _ = loss_fn(whole, **counts, next_token_logprobs=log_probs.float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def reference_entropies(logits: Tensor) -> Tensor:
    log_probs = logits.double().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def test_entropies_in_rows_and_packed() -> None:
    vocab_size, lengths, padded = 13, [4, 6, 3], [4, 8, 4]
    rows = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))  # 3 padded columns, 2 padded positions
    expected = torch.zeros(3, 6, dtype=torch.float64)
    expected[:, 1:] = reference_entropies(rows[..., :vocab_size])[:, :5]
    options: dict[str, Any] = {"num_sequences": 3, "seq_length": 6, "tp_group": None, "vocab_size": vocab_size}
    entropies = token_entropies(rows, cu_seqlens_padded=None, **options)
    torch.testing.assert_close(entropies.double(), expected, rtol=1e-5, atol=1e-6)

    packed = torch.cat([row[:length] for row, length in zip(rows, padded, strict=True)])[None]
    offsets = torch.tensor([0, *padded]).cumsum(0)
    entropies = token_entropies(packed, cu_seqlens_padded=offsets, **options)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(entropies[row, :length].double(), expected[row, :length], rtol=1e-5, atol=1e-6)


class Worker:
    """As NeMo-RL's: runs micro-batches through its module's post-processor and pads them to the batch's width."""

    def __init__(self, logits: Tensor, vocab_size: int) -> None:
        self.logits = logits
        self.megatron_cfg = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=vocab_size))

    def get_logprobs(self, *, data: BatchedDataDict, micro_batch_size: int) -> BatchedDataDict:
        make = sys.modules["nemo_rl.models.policy.workers.megatron_policy_worker"].LogprobsPostProcessor
        processor = make(cfg={}, sampling_params=None, use_fused_linear_logprobs=False)
        parts = []
        for start in range(0, len(self.logits), micro_batch_size):
            micro = data.slice(start, start + micro_batch_size)
            width = int(micro["input_lengths"].max())
            micro["input_ids"] = micro["input_ids"][:, :width]
            process = processor(data_dict=micro, input_ids=micro["input_ids"], cu_seqlens_padded=None)
            _, output = process(self.logits[start : start + micro_batch_size, :width])
            parts.append(torch.nn.functional.pad(output["logprobs"], (0, data["input_ids"].shape[1] - width)))
        return BatchedDataDict(logprobs=torch.cat(parts))


class LogprobsPostProcessor:
    def __init__(self, cfg: Any, sampling_params: Any, use_fused_linear_logprobs: bool) -> None:
        self.cfg = cfg

    def __call__(self, data_dict: BatchedDataDict, input_ids: Tensor, cu_seqlens_padded: Tensor | None) -> Any:
        def process(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            log_probs = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
            return torch.zeros(()), {"logprobs": torch.nn.functional.pad(log_probs, (1, 0))}

        return process


@pytest.fixture
def worker_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """`worker` over stand-ins of Ray and of NeMo-RL's modules, on a single rank."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda ignore_virtual: True)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    _module(monkeypatch, "ray", remote=lambda **_: lambda cls: cls)
    train = "nemo_rl.models.megatron.train"
    _module(monkeypatch, train, LogprobsPostProcessor=LogprobsPostProcessor)
    _module(
        monkeypatch,
        "nemo_rl.models.megatron.pipeline_parallel",
        broadcast_tensors_from_last_stage=lambda tensors: tensors,
    )
    _module(monkeypatch, "nemo_rl.models.policy.utils", get_runtime_env_for_policy_worker=lambda name: {})
    _module(
        monkeypatch,
        "nemo_rl.models.policy.workers.megatron_policy_worker",
        LogprobsPostProcessor=LogprobsPostProcessor,
        MegatronPolicyWorkerImpl=Worker,
    )
    name = "eapo_megatron.integrations.nemo_rl.worker"
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_workers_return_entropies_beside_log_probs(worker_module: types.ModuleType) -> None:
    vocab_size, lengths = 13, torch.tensor([5, 4, 7, 3, 6])
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, 16, generator=generator)
    data = BatchedDataDict(input_ids=torch.randint(vocab_size, (5, 7), generator=generator), input_lengths=lengths)
    plain = Worker(logits, vocab_size).get_logprobs(data=data, micro_batch_size=2)
    result = worker_module.EntropyWorkerImpl(logits, vocab_size).get_logprobs(data=data, micro_batch_size=2)
    assert torch.equal(result["logprobs"], plain["logprobs"])
    expected = torch.zeros(5, 7, dtype=torch.float64)
    expected[:, 1:] = reference_entropies(logits[..., :vocab_size])[:, :-1]
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            result["entropies"][row, :length].double(), expected[row, :length], rtol=1e-5, atol=1e-6
        )
    module = sys.modules["nemo_rl.models.policy.workers.megatron_policy_worker"]
    assert module.LogprobsPostProcessor is LogprobsPostProcessor


@pytest.fixture
def policy_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """`policy` over a stand-in of NeMo-RL's policy, whose workers answer with both tensors."""

    class Policy:
        def __init__(self, **options: Any) -> None:
            self.options = options

        def get_logprobs(self, data: BatchedDataDict, timer: Any = None) -> BatchedDataDict:
            return BatchedDataDict(logprobs=-data["input_ids"], entropies=data["input_ids"])

    _module(
        monkeypatch,
        "nemo_rl.distributed.ray_actor_environment_registry",
        ACTOR_ENVIRONMENT_REGISTRY={},
        MCORE_EXECUTABLE="uv run mcore",
    )
    _module(monkeypatch, "nemo_rl.utils.venvs", DEFAULT_VENV_DIR="nowhere")
    _module(monkeypatch, "nemo_rl.models.policy.lm_policy", Policy=Policy)
    name = "eapo_megatron.integrations.nemo_rl.policy"
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_the_policy_keeps_the_entropies(policy_module: types.ModuleType) -> None:
    policy = policy_module.EntropyPolicy(config={"megatron_cfg": {"enabled": True}}, cluster="cluster")
    assert policy.options["cluster"] == "cluster"
    assert policy.options["worker_extension_cls_fqn"] == policy_module.WORKER
    assert policy_module.ACTOR_ENVIRONMENT_REGISTRY == {policy_module.WORKER: "uv run mcore"}
    result = policy.get_logprobs(BatchedDataDict(input_ids=torch.ones(2, 3)))
    assert result.keys() == {"logprobs"}
    assert torch.equal(policy.entropies, torch.ones(2, 3))


def test_workers_share_the_environment_that_is_built(
    policy_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / policy_module.MEGATRON_WORKER / "bin" / "python"
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path))
    assert policy_module.worker_environment() == "uv run mcore"
    python.parent.mkdir(parents=True)
    python.touch()
    assert policy_module.worker_environment() == str(python)


def test_policies_without_entropies_are_refused(policy_module: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^policy\.megatron_cfg\.enabled must be true"):
        policy_module.EntropyPolicy(config={"megatron_cfg": {"enabled": False}})
