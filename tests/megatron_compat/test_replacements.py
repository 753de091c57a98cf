"""The list of replaced attributes: what is on it, that each exists, that blocks undo theirs, that nothing else is."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils

import eapo_megatron
from eapo_megatron.megatron_compat.importing import IMPORTED_UNCOMPILED
from eapo_megatron.megatron_compat.replacements import (
    CPU_RUNTIME,
    CUDA_TENSOR_TYPES,
    LATENT_ATTENTION,
    LOAD_WITHOUT_CODE,
    REPLACEMENTS,
    SAVE_IN_PROCESS,
    STEPS_KEPT_ON_LOAD,
)
from eapo_megatron.megatron_compat.replacing import Replacement, install, is_installed, replaced
from launch import run_ranks

PACKAGE = Path(eapo_megatron.__file__).parent
SCRIPT = Path(__file__).parents[1] / "ranks" / "cpu_beside_gpu.py"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
EXPECTED = [
    "torch.compile",
    "torch.cuda.current_device",
    "torch.cuda.synchronize",
    "torch.cuda.manual_seed",
    "torch.cuda.get_rng_state",
    "torch.cuda.set_rng_state",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "torch.Tensor.cuda",
    "torch.zeros",
    "torch.ones",
    "torch.empty",
    "torch.full",
    "torch.tensor",
    "torch.arange",
    "torch.rand",
    "torch.randn",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm",
    f"{DISPATCHER}.cuda_dtoh_stream",
    f"{DISPATCHER}._maybe_dtoh_and_synchronize",
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
    "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",
    "megatron.core.optimizer.SGD",
    "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
    "megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce",
    "megatron.core.transformer.mlp.bias_swiglu_impl",
    "megatron.core.transformer.mlp.weighted_bias_swiglu_impl",
    "megatron.core.optimizer.clip_grads.multi_tensor_applier",
    "megatron.core.optimizer.clip_grads.l2_norm_impl",
    "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
    "megatron.core.optimizer.optimizer.multi_tensor_applier",
    "megatron.core.optimizer.optimizer.multi_tensor_scale_impl",
    "torch.Tensor.type",
    "megatron.core.transformer.multi_latent_attention.HAVE_TE",
    "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
    "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
    "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
]
by_name = pytest.mark.parametrize("entry", REPLACEMENTS, ids=[entry.label for entry in REPLACEMENTS])


def test_the_list_holds_these_attributes() -> None:
    assert [entry.label for entry in REPLACEMENTS] == EXPECTED
    groups = (
        IMPORTED_UNCOMPILED,
        CPU_RUNTIME,
        CUDA_TENSOR_TYPES,
        LATENT_ATTENTION,
        SAVE_IN_PROCESS,
        STEPS_KEPT_ON_LOAD,
        LOAD_WITHOUT_CODE,
    )
    assert [entry for group in groups for entry in group] == list(REPLACEMENTS)


@by_name
def test_the_attribute_exists(entry: Replacement) -> None:
    entry.check()


@by_name
def test_a_renamed_attribute_is_an_error_that_names_it(entry: Replacement) -> None:
    renamed = dataclasses.replace(entry, name=f"{entry.name}_of_old")
    for use in (install, lambda entries: replaced(entries).__enter__()):
        with pytest.raises(AttributeError, match=rf"^{renamed.label} does not exist"):
            use([*SAVE_IN_PROCESS, renamed])
    assert not hasattr(entry.owner, renamed.name)
    assert not is_installed(SAVE_IN_PROCESS)


def test_an_attribute_gone_from_its_owner_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mappings, "_gather_along_first_dim")
    with (
        pytest.raises(AttributeError, match=r"megatron\.core\.tensor_parallel\.mappings\._gather_along_first_dim"),
        replaced(CPU_RUNTIME),
    ):
        pass


@by_name
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_undoes_its_replacements(entry: Replacement, fails: bool) -> None:
    owned = dict(vars(entry.owner))
    value = getattr(entry.owner, entry.name, None)

    def use() -> None:
        with replaced([entry]):
            assert entry.name in vars(entry.owner)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert dict(vars(entry.owner)) == owned
    assert getattr(entry.owner, entry.name, None) is value


def test_the_cpu_runtime_makes_on_the_cpu_what_is_asked_for_on_a_gpu() -> None:
    with replaced(CPU_RUNTIME):
        made = [
            torch.zeros(2, device="cuda"),
            torch.ones(2, device="cuda:1", dtype=torch.int32),
            torch.empty(2, device=torch.device("cuda"), pin_memory=True),
            torch.full((2,), 3.0, device="cuda"),
            torch.tensor([1, 2], device=torch.cuda.current_device()),
            torch.arange(2, device="cuda"),
            torch.rand(2, device="cuda"),
            torch.randn(2, device="cuda"),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert made[0].cuda() is made[0]
        assert moe_utils.te_general_gemm is None


def test_types_are_named_as_on_a_gpu_and_conversions_stay() -> None:
    with replaced(CUDA_TENSOR_TYPES):
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_a_policy_trains_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path) -> None:
    [output] = run_ranks(SCRIPT, 1, [tmp_path], fresh=True)
    results = json.loads(output.splitlines()[-1])
    resumed = {"applied": True, "moved": True, "loaded": True}
    assert results == {
        "steps": {
            "bfloat16, Adam": resumed,
            "bfloat16, Adam, distributed optimizer": resumed,
            "float32, SGD": {"applied": True, "moved": True},
            "float32, Adam, distributed optimizer": resumed,
        },
        "rng": ["torch", "tracker"],
        "tracker kept": dict.fromkeys(("model-parallel-rng", "expert-parallel-rng", "data-parallel-rng"), True),
    }


def test_nothing_else_in_the_package_replaces_an_attribute_of_torch_or_megatron() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in foreign_assignments(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "statement",
    [
        "torch.zeros = None",
        "torch.cuda.synchronize: object = None",
        "torch.Tensor.type, other = None, None",
        "nn.Linear.forward = None",
        "tracker.seed += 1",
        "T.type = None",
        "del T.type",
        "vars(torch)['zeros'] = None",
        "torch.__dict__.update(zeros=None)",
        "setattr(torch, 'zeros', None)",
        "delattr(T, 'type')",
        "with open('x') as torch.file: pass",
        "for torch.step in range(3): pass",
        "type(T.grad).x = None",
    ],
)
def test_the_search_finds_every_form_of_replacement(statement: str) -> None:
    imports = (
        "import torch.cuda\nimport torch.nn as nn\nfrom torch import Tensor as T\n"
        "def f():\n    from megatron.core.tensor_parallel import random as tracker\n"
    )
    own = "own = T(1)\nown.sequence_parallel = True\nsetattr(own, 'x', 1)\nx[torch.arange(2)] = 1\n"
    assert foreign_assignments(imports + own + statement) == [10]


def foreign_assignments(source: str) -> list[int]:
    """Lines that assign to an attribute of what is imported from torch or megatron, or delete one."""
    tree = ast.parse(source)
    foreign = {name for node in ast.walk(tree) for name in _foreign_names(node)}
    return sorted({line for node in ast.walk(tree) for root, line in _changed(node) if root in foreign})


def _foreign_names(node: ast.AST) -> Iterator[str]:
    """The names by which an import knows a part of either library."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] in ("torch", "megatron"):
                yield alias.asname or alias.name.split(".")[0]
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "megatron"):
        for alias in node.names:
            yield alias.asname or alias.name


def _changed(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names whose attributes a node changes."""
    if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        yield from _root(node.value)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            yield from _root(node.args[0])
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).endswith(".__dict__"):
            yield from _root(node.func.value)


def _root(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The name that an expression begins with; `type(x)` and `vars(x)` belong to x."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("type", "vars"):
            node = node.args[0]
        elif isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        else:
            return
    yield node.id, node.lineno
