"""Whether a model fits a layout and its lengths, told from config.json's numbers alone, before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eapo_megatron.config import Parallel, Recipe, RecipeError
from eapo_megatron.weights.families import family_of


def check_layout(parallel: Parallel, hf_config: Mapping[str, Any], world_size: int) -> None:
    """Whether the model divides over the layout and the layout over the ranks.

    Raises:
        RecipeError: naming the key and the numbers that do not divide.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, dp = parallel.context_parallel_size, parallel.data_parallel_size
    sizes = f"tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}"
    if cp > 1:
        sizes += f" x context_parallel_size {cp}"
    if world_size % (tp * pp * cp):
        raise RecipeError(f"parallel: {sizes} = {tp * pp * cp} does not divide the world of {world_size} ranks")
    if dp is not None and tp * pp * cp * dp != world_size:
        raise RecipeError(
            f"parallel: {sizes} x data_parallel_size {dp} = {tp * pp * cp * dp} is not the world of {world_size} ranks"
        )
    settings = family_of(dict(hf_config)).transformer_config(hf_config)
    _check_experts(parallel, settings, world_size)
    sharded = [("num_attention_heads", hf_config["num_attention_heads"])]
    if settings.get("moe_layer_freq", 1) != 1 or "num_moe_experts" not in settings:
        sharded.append(("intermediate_size", hf_config["intermediate_size"]))
    if shared := settings.get("moe_shared_expert_intermediate_size"):
        sharded.append(("shared experts' width", shared))
    for key, size in sharded:
        if size % tp:
            raise RecipeError(f"parallel.tensor_model_parallel_size {tp} does not divide the model's {key} {size}")
    groups = settings["num_query_groups"]
    if groups % tp and tp % groups:
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} and the model's num_key_value_heads {groups} "
            "do not divide one another"
        )
    _check_pipeline(parallel, hf_config["num_hidden_layers"])


def check_routing(recipe: Recipe, hf_config: Mapping[str, Any]) -> None:
    """Whether there are routes to replay.

    Raises:
        RecipeError: naming the key.
    """
    experts = family_of(dict(hf_config)).transformer_config(hf_config).get("num_moe_experts")
    if recipe.model.routing_replay != "none" and experts is None:
        raise RecipeError(f"model.routing_replay {recipe.model.routing_replay}: the model has no experts")


def _check_experts(parallel: Parallel, settings: Mapping[str, Any], world_size: int) -> None:
    """Whether the experts of Megatron's `settings` divide over the layout, and the layout over the ranks."""
    tp, ep, etp = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tensor_size
    experts = settings.get("num_moe_experts")
    if experts is None:
        if ep > 1:
            raise RecipeError(f"parallel.expert_model_parallel_size {ep}: the model has no experts")
        return
    if tp > 1 and not parallel.sequence_parallel:
        raise RecipeError(
            f"parallel.tensor_model_parallel_size {tp} needs sequence_parallel: true for a mixture of experts"
        )
    if experts % ep:
        raise RecipeError(f"parallel.expert_model_parallel_size {ep} does not divide the model's {experts} experts")
    if settings["moe_ffn_hidden_size"] % etp:
        raise RecipeError(
            f"parallel.expert_tensor_parallel_size {etp} does not divide the experts' width "
            f"{settings['moe_ffn_hidden_size']}"
        )
    sizes = f"expert_tensor_parallel_size {etp} x expert_model_parallel_size {ep} = {etp * ep}"
    ranks = world_size // parallel.pipeline_model_parallel_size
    if ranks % (etp * ep):
        raise RecipeError(f"parallel: {sizes} does not divide the {ranks} ranks of a pipeline stage")
    if etp * ep % tp and tp % (etp * ep):
        raise RecipeError(f"parallel: {sizes} and tensor_model_parallel_size {tp} do not divide one another")


def _check_pipeline(parallel: Parallel, layers: int) -> None:
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    edges = [size for size in (first, last) if size is not None]
    middle_layers, middle_stages = layers - sum(edges), stages - len(edges)
    split = f"{layers} layers over pipeline_model_parallel_size {stages}"
    if edges:
        split += f" with {first or 'any'} in the first and {last or 'any'} in the last stage"
    if edges and stages == 1:
        raise RecipeError("parallel: uneven first and last stages need pipeline_model_parallel_size > 1")
    if middle_layers < middle_stages or (middle_stages == 0 and middle_layers > 0):
        raise RecipeError(f"parallel: {split} leaves a stage empty or layers over")
    if middle_stages and middle_layers % middle_stages:
        raise RecipeError(f"parallel: {split} does not divide evenly")
    if chunks > 1 and middle_stages == 0:
        raise RecipeError(f"parallel: {split} leaves no stage between them, which interleaving needs: give one of them")
    for size in [*edges, middle_layers // middle_stages if middle_stages else layers]:
        if size % chunks:
            raise RecipeError(
                f"parallel.virtual_pipeline_model_parallel_size {chunks} does not divide the {size} layers of a stage"
            )


def check_lengths(recipe: Recipe, hf_config: Mapping[str, Any]) -> None:
    """Whether prompts and responses fit the model's positions.

    Raises:
        RecipeError: naming the keys.
    """
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    positions = family_of(dict(hf_config)).gpt_model(hf_config)["max_sequence_length"]
    if longest > positions:
        raise RecipeError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings {positions}"
        )
