"""The smallest layout of a recipe that fits its GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eapo_megatron.config import Cluster, Parallel, Recipe, RecipeError
from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.memory import worst_rank
from eapo_megatron.planning.shape import ModelShape
from eapo_megatron.policy.layout_checks import check_layout

MAX_NODES = 128
MAX_TENSOR_PARALLEL = 8  # a node's fast links


def smallest_layout(recipe: Recipe, shape: ModelShape, hf_config: Mapping[str, Any], usable: int) -> Layout | None:
    """The fewest GPUs on which every rank needs at most `usable` bytes, None if MAX_NODES nodes do not suffice.

    Batch sizes and lengths stay as they are; with as many GPUs, a layout that need not recompute more and divides the
    model over fewer ranks comes first.
    """
    for cluster in _clusters(recipe.cluster):
        for candidate in _candidates(recipe, cluster, shape):
            layout = Layout(candidate, shape)
            try:
                check_layout(layout.parallel, hf_config, layout.world_size)
            except RecipeError:
                continue
            if worst_rank(layout).peak <= usable:
                return layout
    return None


def overrides_of(layout: Layout, recipe: Recipe) -> list[str]:
    """What to add to the recipe's command line to run it on `layout`."""
    before, after = recipe.model_dump(mode="json"), layout.recipe.model_dump(mode="json")
    return [
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section in ("cluster", "model", "parallel")
        for key, value in after[section].items()
        if value != before[section][key]
    ]


def _clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Parts of one node, then full nodes, doubling."""
    size = 1
    while size < cluster.gpus_per_node:
        yield cluster.model_copy(update={"num_nodes": 1, "gpus_per_node": size})
        size *= 2
    nodes = 1
    while nodes <= MAX_NODES:
        yield cluster.model_copy(update={"num_nodes": nodes})
        nodes *= 2


def _candidates(recipe: Recipe, cluster: Cluster, shape: ModelShape) -> list[Recipe]:
    """Every layout on this cluster, the preferred ones first."""
    layers = len(shape.layers)
    found: list[tuple[tuple, Recipe]] = []
    for recompute in dict.fromkeys((recipe.model.recompute, "full")):
        model = recipe.model.model_copy(update={"recompute": recompute})
        for tp, cp in _tensor_and_context_sizes(recipe, cluster):
            for pp in _powers(min(cluster.world_size // (tp * cp), layers)):
                for ep, etp in _expert_sizes(cluster.world_size // pp, shape.num_experts):
                    parallel = Parallel(
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        context_parallel_size=cp,
                        num_layers_in_last_pipeline_stage=_shorter_last_stage(layers, pp),
                        sequence_parallel=tp > 1,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=etp,
                        use_distributed_optimizer=True,
                    )
                    preference = (recompute != recipe.model.recompute, tp * pp, cp, pp, ep, etp is not None)
                    update = {"cluster": cluster, "model": model, "parallel": parallel}
                    found.append((preference, recipe.model_copy(update=update)))
    return [candidate for _, candidate in sorted(found, key=lambda entry: entry[0])]


def _tensor_and_context_sizes(recipe: Recipe, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Context parallelism divides packed micro-batches alone."""
    for tp in _powers(min(cluster.gpus_per_node, MAX_TENSOR_PARALLEL)):
        for cp in _powers(cluster.world_size // tp) if recipe.train.packing == "segments" else (1,):
            yield tp, cp


def _expert_sizes(ranks: int, num_experts: int) -> Iterator[tuple[int, int | None]]:
    """Expert-parallel sizes, with experts divided as the rest of the model is (None), or not at all (1)."""
    yield 1, None
    for ep in _powers(min(ranks, num_experts)):
        if ep > 1:
            yield ep, None
            yield ep, 1


def _shorter_last_stage(layers: int, stages: int) -> int | None:
    """The last stage's layers where they do not divide evenly and the other stages take one more each."""
    left = layers - -(-layers // stages) * (stages - 1)
    return left if layers % stages and left > 0 else None


def _powers(limit: int) -> list[int]:
    return [2**exponent for exponent in range(max(limit, 1).bit_length())]
