"""Parameters, layers of stages and floating-point operations against public counts, Megatron and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from eapo_megatron.config import Parallel
from eapo_megatron.planning.layout import stage_layers
from eapo_megatron.planning.shape import model_shape
from eapo_megatron.planning.work import attention_flops, head_flops, matmul_flops
from eapo_megatron.weights.families.public_configs import PUBLIC_CONFIGS
from planned_runs import MODELS


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),  # tied
    ],
)
def test_public_parameter_counts(name: str, total: int) -> None:
    assert model_shape(PUBLIC_CONFIGS[name]).total_parameters == total


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("Qwen/Qwen3-30B-A3B", 3.35e9),
        ("Qwen/Qwen3-235B-A22B", 22.2e9),
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9),
        ("moonshotai/Moonlight-16B-A3B", 2.9e9),
    ],
)
def test_active_parameters_of_mixtures(name: str, active: float) -> None:
    assert model_shape(PUBLIC_CONFIGS[name]).active_parameters == pytest.approx(active, rel=0.01)


def test_a_dense_model_is_active_whole() -> None:
    shape = model_shape(PUBLIC_CONFIGS["Qwen/Qwen2.5-7B"])
    assert shape.active_parameters == shape.total_parameters


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Parallel, int]:
    stages, chunks = draw(st.integers(2, 5)), draw(st.sampled_from([None, 2, 3]))
    multiple = chunks or 1
    middle = draw(st.integers(1, 3)) * multiple
    edges = [draw(st.none() | st.integers(1, 3).map(lambda n: n * multiple)) for _ in range(2)]
    assume(not (chunks and stages == 2 and all(edges)))  # refused: Megatron divides by the stages between
    layers = sum(size for size in edges if size) + middle * (stages - sum(size is not None for size in edges))
    parallel = Parallel(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=edges[0],
        num_layers_in_last_pipeline_stage=edges[1],
    )
    return parallel, layers


@given(pipelines())
def test_layers_of_stages_are_megatrons(pipeline: tuple[Parallel, int]) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    parallel, layers = pipeline
    chunks = parallel.virtual_pipeline_model_parallel_size
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        pipeline_dtype=torch.float32,
    )
    for rank, held in enumerate(stage_layers(parallel, layers)):
        expected: list[int] = []
        for chunk in range(chunks or 1):
            vp_stage = chunk if chunks else None
            start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
            expected += range(start, start + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank))
        assert held == expected


@pytest.mark.parametrize("name", ["qwen2", "qwen2, tied", "qwen3", "qwen3_moe", "moonlight", "deepseek_v3"])
def test_flops_of_a_forward_pass(name: str) -> None:
    """Transformers' own attention computes the whole square: a context of all tokens, not half of them."""
    config: dict[str, Any] = MODELS[name]
    tokens = 64
    hf_config = AutoConfig.for_model(**config)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(hf_config, **eager)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(config["vocab_size"], (1, tokens)))
    shape = model_shape(config)
    predicted = tokens * (matmul_flops(shape) + head_flops(shape) + attention_flops(shape, tokens))
    rotary = 2 * tokens * hf_config.head_dim // 2  # positions times frequencies, as a matrix product
    assert counter.get_total_flops() == pytest.approx(predicted + rotary, rel=1e-3)
