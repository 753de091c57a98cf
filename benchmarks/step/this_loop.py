"""A process that takes a step of this loop each time it is asked.

A request is a line of JSON on the first rank's standard input, the keys of `Setting`; the answer is a line of JSON:
seconds of the step, of its phases, and the tokens that the responses and their prompts had. Every step samples the same
prompts anew. Weights hardly move (the learning rate is 1e-6 on both sides), so steps are alike.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step.cases import CASES, GROUP, Case
from eapo_megatron.config import Recipe
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.records.stopwatch import Stopwatch
from eapo_megatron.rollout.producer import open_producer
from eapo_megatron.stopping import StopRequest
from eapo_megatron.training.loop import train_step
from eapo_megatron.training.preflight import prepare
from eapo_megatron.training.session import Run, open_run
from eapo_megatron.vocab_parallel.products import product

if TYPE_CHECKING:
    from collections.abc import Iterator

PEAK_SIZE = 1536  # of the square matrices whose product is the measured peak


@dataclass(frozen=True)
class Setting:
    """What differs between rows. `count` counts floating-point operations of matrix products, and slows the step."""

    micro_batch_size: int
    old_policy: str = "rollout"
    packing: str = "segments"
    head: str = "tiles"
    trains_silent: bool = False
    count: bool = False


class TrainsAll(PolicyWorker):
    """Takes responses without a gradient through forward and backward too."""

    def trained_rows(self, batch: Any, rows: Sequence[int], *_: Any) -> Sequence[int]:
        return rows


class Counting(Stopwatch):
    """Counts floating-point operations of matrix products by phase."""

    def __init__(self) -> None:
        super().__init__()
        formulas = {
            torch.ops.mkldnn._linear_pointwise: _linear_flop,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_flop,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flop,
        }
        self.counter = FlopCounterMode(display=False, custom_mapping=formulas)
        self.gflop: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self.counter.get_total_flops()
        with super().__call__(phase):
            yield
        self.gflop[phase] = (self.counter.get_total_flops() - before) / 1e9


def _linear_flop(left: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * weight[0]


def _flash_flop(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products: query by key, and shares by value; causal ones count whole."""
    return 4 * math.prod(query) * key[2]


def _flash_backward_flop(_: Any, query: Sequence[int], key: Sequence[int], *__: Any, **___: Any) -> int:
    """Five products."""
    return 10 * math.prod(query) * key[2]


def recipe_of(case: Case, folder: str, longest_prompt: int, parallel: dict[str, int], setting: Setting) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "seed": 1,
            "cluster": {"device": "cpu"},
            "model": {
                "path": f"{folder}/model",
                "tokenizer": f"{folder}/tokenizer",
                "dtype": "float32",
                "head": {"backend": setting.head},
            },
            "parallel": parallel,
            "data": {
                "train_path": f"{folder}/prompts.jsonl",
                "prompt_field": "prompt",
                "answer_field": "answer",
                "template": "{prompt}",
                "max_prompt_tokens": longest_prompt,
            },
            "rollout": {
                "num_generations_per_prompt": GROUP,
                "max_response_tokens": case.response_tokens,
                "max_batch_size": case.responses,
            },
            "reward": {"function": "benchmarks.step.reward:reward", "num_workers": 1},
            "algorithm": {"old_policy": setting.old_policy},
            "train": {
                "num_prompts_per_step": case.prompts,
                "mini_batch_prompts": case.prompts,
                "micro_batch_size": setting.micro_batch_size,
                "packing": setting.packing,
            },
            "logging": {"run_dir": f"{folder}/runs-{os.environ['WORLD_SIZE']}"},
        }
    )


def use(run: Run, recipe: Recipe, setting: Setting) -> None:
    """Brings an open run to the recipe of another row."""
    run.recipe = recipe
    run.worker = (TrainsAll if setting.trains_silent else PolicyWorker).of_recipe(run.policy, recipe)
    run.producer = open_producer(run.sampler, run.ingredients.train, recipe)
    for module in run.policy.modules:
        module.head = recipe.model.head
    run.timer = Counting() if setting.count else Stopwatch()


def take_step(run: Run) -> dict[str, Any]:
    """One step between two barriers."""
    counting: AbstractContextManager[Any] = run.timer.counter if isinstance(run.timer, Counting) else nullcontext()
    dist.barrier()
    start = time.perf_counter()
    with counting:
        metrics = train_step(run)
    dist.barrier()
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {
        "seconds": seconds,
        "phases": {name.removeprefix("seconds/"): spent for name, spent in run.timer.lap().items()},
        "tokens": metrics["response_length/total"],
        "silent": metrics["rollout/groups_without_signal"],
    }
    if isinstance(run.timer, Counting):
        parts = run.runtime.gather_objects(run.timer.gflop)
        answer["gflop"] = {phase: sum(part[phase] for part in parts) for phase in run.timer.gflop}
        answer["peak_gflops"] = sum(run.runtime.gather_objects(peak_gflops()))
    return answer


def peak_gflops() -> float:
    """The most that this rank's threads reach in a square product, while the other ranks do the same: GFLOP/s."""
    left, right = torch.randn(2, PEAK_SIZE, PEAK_SIZE).unbind()
    best = 0.0
    for multiply in (torch.mm, product):
        for _ in range(8):
            dist.barrier()
            start = time.perf_counter()
            multiply(left, right)
            best = max(best, 2 * PEAK_SIZE**3 / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    name, folder, longest_prompt, parallel = sys.argv[1:]
    case, layout = CASES[name], json.loads(parallel)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def recipe(setting: Setting) -> Recipe:
        return recipe_of(case, folder, int(longest_prompt), layout, setting)

    first = recipe(Setting(micro_batch_size=1))
    ingredients = prepare(first, int(os.environ["WORLD_SIZE"]), source="benchmark")
    assert len(ingredients.train) == case.prompts
    runtime = start_runtime(first.parallel, seed=first.seed, device="cpu")
    with open_run(first, ingredients, runtime, StopRequest()) as run:
        while request := runtime.broadcast_object(sys.stdin.readline() if runtime.is_main else None):
            setting = Setting(**json.loads(request))
            use(run, recipe(setting), setting)
            answer = take_step(run)
            if runtime.is_main:
                print(json.dumps(asdict(setting) | answer), flush=True)
    stop_runtime()


if __name__ == "__main__":
    main()
