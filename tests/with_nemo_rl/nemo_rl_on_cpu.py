"""What NeMo-RL needs to run on a machine without a GPU; imported before anything of NeMo-RL or Megatron-LM.

NeMo-RL is written for Python 3.13 and CUDA, and imports Megatron Bridge, which wants Transformer Engine. Nothing of
this is part of the product.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections.abc import Callable
from contextlib import nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

typing.TypedDict = typing_extensions.TypedDict  # pydantic takes no other before Python 3.12
typing.override = typing_extensions.override
os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"  # NeMo-RL's policy asks for it and does nothing with it


class OnCPU(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU, and CPU tensors name the GPU type where asked."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.type and len(args) == 1:  # Megatron's optimizer compares it with GPU types
            return function(*args).replace("torch.", "torch.cuda.")
        kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return function(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    is_cuda = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
    return "cpu" if is_cuda else value


class BridgeStandIn(MetaPathFinder, Loader):
    """Finds any module of Megatron Bridge, empty but for what NeMo-RL's worker calls in a step."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if f"{name}.".startswith("megatron.bridge.") else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Bridge(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Bridge(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _CALLED.get(name) or type(name, (), {})


def _process_groups(model: torch.nn.Module) -> types.SimpleNamespace:
    from megatron.core import parallel_state

    return types.SimpleNamespace(mp=parallel_state.get_model_parallel_group())


def _over_ranks(operation: Any) -> Callable[..., Any]:
    def reduce(value: Any, mp_group: Any) -> Any:
        values: list[Any] = [None] * mp_group.size()
        torch.distributed.all_gather_object(values, value, group=mp_group)
        return operation((value for value in values if value is not None), default=None)

    return reduce


_CALLED = {
    "get_pg_collection": _process_groups,
    "logical_and_across_model_parallel_group": _over_ranks(min),
    "reduce_max_stat_across_model_parallel_group": _over_ranks(max),
}

sys.meta_path.insert(0, BridgeStandIn())
OnCPU().__enter__()
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
torch.cuda.current_stream = lambda *_: None
torch.cuda.get_device_name = lambda *_: "CPU"
torch.cuda.nvtx.range = lambda *_: nullcontext()
for _name in ("range_push", "range_pop"):
    setattr(torch.cuda.nvtx, _name, lambda *_: None)
