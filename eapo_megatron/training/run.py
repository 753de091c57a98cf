"""A run's parts put together, and where it stands: what `loop.py` works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from eapo_megatron.config import Recipe
from eapo_megatron.models.assets import save_run_assets
from eapo_megatron.models.checkpoint import Checkpoints
from eapo_megatron.models.conversion import load_weights
from eapo_megatron.models.huggingface import weight_source
from eapo_megatron.models.policy_model import Policy, build_policy
from eapo_megatron.models.runtime import Runtime
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.megatron_engine import MegatronEngine
from eapo_megatron.saved_recipe import RECIPE_FILE, saved_form
from eapo_megatron.stopping import EXIT_INTERRUPTED, StopRequest
from eapo_megatron.training.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.training.policy_worker import PolicyWorker
from eapo_megatron.training.preflight import Ingredients
from eapo_megatron.training.records import Records, Stopwatch, write_json
from eapo_megatron.training.sampler import Sampler
from eapo_megatron.training.warm_start import warm_start


class TrainingStoppedError(RuntimeError):
    """A run that cannot go on; its last checkpoint is intact."""

    exit_code = 1


class InterruptedRunError(TrainingStoppedError):
    """A run that was asked to stop: all its steps are in its checkpoint, and the same command goes on from there."""

    exit_code = EXIT_INTERRUPTED


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # steps done
    position: int = 0  # prompts drawn
    optimizer_steps: int = 0
    skipped_updates: int = 0  # NaN or Inf in a loss, a gradient, or the old policy's scores
    skipped_in_a_row: int = 0
    skipped_steps: int = 0  # dynamic sampling found no group with differing rewards
    response_tokens: int = 0
    held_out: dict[str, float] = field(default_factory=dict)  # solve rate by step

    def score(self) -> float | None:
        """The held-out solve rate of this very step, which ranks its checkpoint."""
        return self.held_out.get(str(self.step))


@dataclass
class Run:
    """One run on this rank. `records` is on rank 0 alone."""

    recipe: Recipe
    ingredients: Ingredients
    runtime: Runtime
    policy: Policy
    worker: PolicyWorker
    optimizer: PolicyOptimizer
    sampler: Sampler
    checkpoints: Checkpoints
    records: Records | None
    progress: Progress
    stop_request: StopRequest  # to this rank
    stopping: bool = False  # some rank was asked to stop; the same on all
    timer: Stopwatch = field(default_factory=Stopwatch)

    def sampling(self, *, temperature: float, top_p: float, top_k: int = 0) -> SamplingParams:
        """The recipe's lengths and stop tokens at these sampling settings."""
        stops = {self.ingredients.tokenizer.eos_token_id, *self.recipe.rollout.stop_token_ids}
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_response_tokens=self.recipe.rollout.max_response_tokens,
            stop_token_ids=tuple(sorted(stops)),
        )

    def save(self) -> None:
        """A checkpoint of this step, once its records are on disk."""
        if self.records is not None:
            self.records.sync()
        state = {"progress": asdict(self.progress), "score": self.progress.score()}
        self.checkpoints.save(self.progress.step, self.policy, self.optimizer.megatron, self.optimizer.schedule, state)

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        rates = self.progress.held_out
        return {
            "name": self.recipe.name,
            **{key: value for key, value in asdict(self.progress).items() if key != "held_out"},
            "held_out": {
                "solve_rate_start": rates.get("0"),
                "solve_rate_end": rates.get(str(self.progress.step)),
                "solve_rates": rates,
            },
        }


@contextmanager
def open_run(recipe: Recipe, ingredients: Ingredients, runtime: Runtime, stop_request: StopRequest) -> Iterator[Run]:
    """Builds the policy and its optimizer, resumed from the run folder's last checkpoint where there is one."""
    folder = recipe.run_folder
    checkpoints = Checkpoints(
        folder / "checkpoints", keep_last=recipe.checkpoint.keep_last, keep_best=recipe.checkpoint.keep_best
    )
    steps = runtime.broadcast_object(checkpoints.steps())
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE_FILE, saved_form(recipe))
        save_run_assets(folder, recipe.model, ingredients.hf_config, ingredients.tokenizer)
    policy = build_policy(ingredients.hf_config, recipe.model, recipe.parallel, runtime)
    worker = PolicyWorker(
        policy, micro_batch_size=recipe.train.micro_batch_size, temperature=recipe.rollout.temperature
    )
    progress = Progress()
    if not steps:
        load_weights(policy, weight_source(recipe.model, ingredients.hf_config, recipe.seed))
    with ExitStack() as stack:
        records = None
        if runtime.is_main:
            records = stack.enter_context(Records(recipe, first_step=steps[-1] + 1 if steps else 0))
        if not steps and recipe.warm_start.steps:
            warm_start(recipe, ingredients, worker, records)
        # After the weights: a bf16 policy's optimizer copies them in float32 when it is built.
        optimizer = build_optimizer(policy, recipe.optimizer)
        if steps:
            state = checkpoints.load(steps[-1], policy, optimizer.megatron, optimizer.schedule)
            progress = Progress(**state["progress"])
        engine = MegatronEngine(
            policy,
            pad_token_id=ingredients.tokenizer.pad_token_id,
            max_batch_size=recipe.rollout.max_batch_size,
        )
        sampler = stack.enter_context(Sampler(engine, recipe.reward, ingredients.tokenizer, runtime))
        if records is not None and steps:
            records.say(f"resumed from step {progress.step} of {folder}")
        yield Run(
            recipe,
            ingredients,
            runtime,
            policy,
            worker,
            optimizer,
            sampler,
            checkpoints,
            records,
            progress,
            stop_request,
        )
