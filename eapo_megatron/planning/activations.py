"""What a transformer layer holds for its backward pass, counted tensor by tensor.

The method is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198, section 4), for the layers that this package builds: grouped-query or latent attention through a fused
kernel (nothing of size s x s), gated MLPs computed without fusion, RMSNorm that holds its input, no dropout. With
tensor parallelism t, widths inside attention and MLP are divided by t, and under sequence parallelism so is all else.
"""

from __future__ import annotations

from eapo_megatron.planning.layout import Layout
from eapo_megatron.planning.shape import Layer

FLOAT32 = 4
INT64 = 8


def layer_bytes(layout: Layout, layer: Layer) -> float:
    """Bytes a token of one micro-batch that a layer holds under the recipe's `model.recompute`."""
    if layout.recipe.model.recompute == "full":
        return layout.dtype_bytes * layout.shape.hidden_size / layout.sp  # the layer's input
    return recomputed_layer_bytes(layout, layer)


def recomputed_layer_bytes(layout: Layout, layer: Layer) -> float:
    """Bytes a token that a layer holds while it is not recomputed in full."""
    attention = {
        (False, False): _grouped_query_attention,
        (False, True): _packed_grouped_query_attention,
        (True, False): _latent_attention,
        (True, True): _packed_latent_attention,
    }[layout.shape.is_mla, layout.is_packed]
    mlp = _mixture if layer.is_mixture else _mlp
    return 2 * _norm(layout) + attention(layout) + mlp(layout)


def _norm(layout: Layout) -> float:
    """Input, reciprocal deviation, and output (the input of the linear layer behind it)."""
    return (2 * layout.dtype_bytes * layout.shape.hidden_size + FLOAT32) / layout.sp


def _grouped_query_attention(layout: Layout) -> float:
    shape, dtype = layout.shape, layout.dtype_bytes
    heads, groups = shape.heads // layout.tp, max(shape.groups // layout.tp, 1)
    queries, keys = heads * shape.key_width, groups * shape.key_width
    repeats, recomputes = heads > groups, layout.recipe.model.recompute == "selective"
    qk_norm = shape.settings.get("qk_layernorm", False)
    merged = queries + 2 * keys  # the linear layer's output: held while values or norms look into it
    held = merged if recomputes or qk_norm or not repeats else 0
    held += queries + queries  # rotated queries, attention's output
    if recomputes or not repeats:
        held += keys  # rotated
    else:
        held += 2 * queries  # keys and values, repeated for the queries of their group
    if qk_norm and repeats and groups > 1:
        held += queries  # the norm's input is a copy where a group's queries are cut out of the merged tensor
    rotary = 4 * shape.key_width / layout.recipe.train.micro_batch_size  # cosines and sines of queries and of keys
    statistics = 0 if recomputes else heads  # log-sum-exp
    statistics += heads + groups if qk_norm else 0
    return dtype * (held + rotary) + FLOAT32 * statistics


def _latent_attention(layout: Layout) -> float:
    shape, settings, dtype = layout.shape, layout.shape.settings, layout.dtype_bytes
    heads = shape.heads // layout.tp
    queries = settings.get("q_lora_rank") or 0
    latents = 2 * settings["kv_lora_rank"] + settings["qk_pos_emb_head_dim"] + 2 * queries  # before and behind norms
    norms = 1 + (queries > 0)
    held = 2 * heads * (shape.key_width + shape.value_width)  # queries and keys, values and attention's output
    rotary = 4 * settings["qk_pos_emb_head_dim"] / layout.recipe.train.micro_batch_size
    log_sum_exp = 0 if layout.recipe.model.recompute == "selective" else heads
    return dtype * (held + rotary + latents / layout.sp) + FLOAT32 * (log_sum_exp + norms / layout.sp)


def _packed_grouped_query_attention(layout: Layout) -> float:
    """Queries of a group read its keys where they are; context-parallel ranks hold those of all, unless recomputed."""
    shape, dtype = layout.shape, layout.dtype_bytes
    heads, groups = shape.heads // layout.tp, max(shape.groups // layout.tp, 1)
    queries, keys = heads * shape.key_width, groups * shape.key_width
    recomputes = layout.recipe.model.recompute == "selective"
    gathers, qk_norm = layout.cp > 1 and not recomputes, shape.settings.get("qk_layernorm", False)
    held = queries + queries  # rotated queries, attention's output
    held += layout.cp * 2 * keys if gathers else keys  # gathered keys and values, or rotated keys
    if qk_norm or not gathers:
        held += queries + 2 * keys  # the linear layer's output, which values or norms look into
    if qk_norm and heads > groups > 1:
        held += queries  # the norm's input is a copy where a group's queries are cut out of the merged tensor
    statistics = 0 if recomputes else heads  # log-sum-exp
    statistics += heads + groups if qk_norm else 0
    return dtype * (held + 4 * shape.key_width) + FLOAT32 * statistics


def _packed_latent_attention(layout: Layout) -> float:
    """As `_latent_attention`; the kernel wants values as wide as keys, and gives as wide an output."""
    shape, settings, dtype = layout.shape, layout.shape.settings, layout.dtype_bytes
    heads, recomputes = shape.heads // layout.tp, layout.recipe.model.recompute == "selective"
    keys, values = heads * shape.key_width, heads * shape.value_width
    queries = settings.get("q_lora_rank") or 0
    latents = 2 * settings["kv_lora_rank"] + settings["qk_pos_emb_head_dim"] + 2 * queries  # before and behind norms
    norms = 1 + (queries > 0)
    held = keys + values  # queries, attention's output
    padded = keys > values and not recomputes
    if padded:
        held += keys  # output as the kernel gives it
    copies = 1 if recomputes else layout.cp  # context-parallel ranks hold the keys and values of all
    held += copies * (keys + (keys if padded else values))
    rotary = 4 * settings["qk_pos_emb_head_dim"]
    log_sum_exp = 0 if recomputes else heads
    return dtype * (held + rotary + latents / layout.sp) + FLOAT32 * (log_sum_exp + norms / layout.sp)


def _mlp(layout: Layout) -> float:
    return layout.dtype_bytes * 5 * layout.shape.settings["ffn_hidden_size"] / layout.tp


def _mixture(layout: Layout) -> float:
    """Routing and experts, each rank's tokens evenly spread over all experts, and shared experts beside them."""
    shape, settings, dtype = layout.shape, layout.shape.settings, layout.dtype_bytes
    copies = shape.experts_per_token / layout.sp  # of each token
    # The experts of one group of expert-tensor-parallel ranks all see the copies of each of these ranks.
    gathered = copies * layout.etp
    width = settings["moe_ffn_hidden_size"] / layout.etp
    experts = gathered * (dtype * (shape.hidden_size + 6 * width) + FLOAT32)
    # Scores and mask of all experts; choice, weight and destination of each copy.
    router = (FLOAT32 + 1) * shape.num_experts / layout.sp + copies * (INT64 + FLOAT32 + INT64)
    shared = 5 * (settings.get("moe_shared_expert_intermediate_size") or 0) / layout.tp
    return experts + router + dtype * shared
