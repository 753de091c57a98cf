"""What one rank of a launch gets from the export of its weights: against the folder that they were loaded from."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.weights.export import export_weights, weight_value
from eapo_megatron.weights.families import family_of
from eapo_megatron.weights.huggingface import HuggingFaceWeights
from eapo_megatron.weights.load import shard_of
from eapo_megatron.weights.parameters import named_weights


def right_after_loading(policy: Policy, source: HuggingFaceWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    """`of_export` for every rank and for leaders alone."""
    return of_export(policy, source, leaders_only=False), of_export(policy, source, leaders_only=True)


def of_export(policy: Policy, source: HuggingFaceWeights, *, leaders_only: bool) -> dict[str, Any]:
    """The names in their order, those whose bits or dtype are not the source's on any rank, and the peak of memory."""
    names, different = [], []
    leads = policy.runtime.is_replica_leader
    for name, tensor in export_weights(policy.modules, policy.hf_config, leaders_only=leaders_only):
        kept_wide = name.endswith("e_score_correction_bias")
        expected = source.read(name).to(torch.float32 if kept_wide else policy.config.params_dtype)
        names.append(name)
        if leaders_only and not leads:
            right = tensor.is_meta and tensor.shape == expected.shape
        else:
            right = bits(tensor) == bits(expected)
        if tensor.dtype != expected.dtype or not right:
            different.append(name)
    ranks = policy.runtime.gather_objects((names, different))
    return {
        "names": names,
        "same_order": all(order == names for order, _ in ranks),
        "different": sorted({name for _, wrong in ranks for name in wrong}),
        "peak": max(policy.runtime.gather_objects(peak_of_parameters(policy, leaders_only=leaders_only))),
    }


def peak_of_parameters(policy: Policy, *, leaders_only: bool) -> float:
    """The most bytes that an export holds at once on this rank, as parts of the largest parameter's."""
    with Held(policy) as held:
        deque(export_weights(policy.modules, policy.hf_config, leaders_only=leaders_only), maxlen=0)
    weights = family_of(dict(policy.hf_config)).weights(policy.hf_config)
    largest = max(sum(torch.Size(shape).numel() for shape in weight.shapes) for weight in weights)
    return held.peak / (largest * policy.config.params_dtype.itemsize)


class Held(TorchDispatchMode):
    """The most bytes in tensors that operations made, the policy's own aside, and that live at once."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        named = (pair for module in policy.modules for pair in named_weights(module, policy.hf_config))
        self._own = {tensor.untyped_storage().data_ptr() for _, tensor, _ in named}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self._alive |= {
            storage._cdata: (StorageWeakRef(storage), storage.nbytes())
            for storage in storages
            if storage.data_ptr() not in self._own
        }
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def full_tensors(policy: Policy, value_of: Callable[[Tensor], Tensor | None] = weight_value) -> dict[str, Tensor]:
    """A value of each tensor in float32, by Hugging Face name; every rank's copies and shards must be equal to it."""
    pairs = export_weights(policy.modules, policy.hf_config, value_of=value_of)
    tensors = {name: tensor.float() for name, tensor in pairs}
    for module in policy.modules:
        for name, tensor, weight in named_weights(module, policy.hf_config):
            if (value := value_of(tensor)) is not None:
                expected = shard_of(weight, [tensors[hf_name] for hf_name in weight.hf_names])
                assert torch.equal(value.float(), expected), f"{name} is not what was exported"
    digest = hashlib.sha256(b"".join(map(bits, tensors.values()))).hexdigest()
    assert len(set(policy.runtime.gather_objects(digest))) == 1, "ranks export different tensors"
    return tensors


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
