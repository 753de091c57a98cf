"""A run's parts put together, and where it stands: what `loop.py` works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapo_megatron.algorithms import Algorithm, SelectionInputs, group_advantages, uniform_draws
from eapo_megatron.config import Model, Recipe, RecipeError
from eapo_megatron.data.prompts import Prompt
from eapo_megatron.durable import write_json
from eapo_megatron.policy.batching import Batch, TokenData, mini_batches
from eapo_megatron.policy.checkpoint import Checkpoints
from eapo_megatron.policy.checkpoint_files import inspect
from eapo_megatron.policy.optimizer import PolicyOptimizer, build_optimizer
from eapo_megatron.policy.policy_model import Policy, open_policy
from eapo_megatron.policy.reference import Reference, open_reference
from eapo_megatron.policy.runtime import Runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.records.records import Records
from eapo_megatron.records.samples import describe_samples
from eapo_megatron.records.stopwatch import Stopwatch
from eapo_megatron.records.tokens import sampled_groups, token_tables
from eapo_megatron.rollout.engine import open_engine
from eapo_megatron.rollout.producer import Producer, open_producer
from eapo_megatron.rollout.rollouts import Rollouts, Sampler
from eapo_megatron.run_lock import RunLock
from eapo_megatron.saved_recipe import RECIPE_FILE, saved_form
from eapo_megatron.stopping import StopRequest, TrainingStoppedError
from eapo_megatron.training.preflight import Ingredients
from eapo_megatron.training.warm_start import warm_start
from eapo_megatron.weights.assets import save_run_assets
from eapo_megatron.weights.export import export_weights
from eapo_megatron.weights.huggingface import weight_source
from eapo_megatron.weights.integrity import check_tensor_files
from eapo_megatron.weights.megatron_weights import find_checkpoint


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # steps done
    position: int = 0  # prompts drawn
    optimizer_steps: int = 0
    skipped_updates: int = 0  # NaN or Inf in a loss, a gradient, or the old policy's log-probs or entropies
    skipped_in_a_row: int = 0
    skipped_steps: int = 0  # dynamic sampling found no group with differing rewards
    response_tokens: int = 0
    evaluations: dict[str, float] = field(default_factory=dict)  # solve rate by step
    entropy_coef: float | None = None  # of the next step, where the bonus adapts; None: as the recipe has it

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Progress:
        """Reads what `Run.save` wrote, by this version of the package or an earlier one.

        Raises:
            RecipeError: naming what is missing or not known.
        """
        saved = state.get("progress")
        if not isinstance(saved, dict):
            raise RecipeError(f"state.json of step {state['step']} is damaged: it lacks progress")
        saved = dict(saved)
        if state["version"] == 1:
            saved["evaluations"] = saved.pop("held_out", {})
        if state["version"] <= 2:
            saved["entropy_coef"] = None
        names = {field.name for field in fields(cls)}
        if saved.keys() != names:
            raise RecipeError(
                f"state.json of step {state['step']}: progress lacks {sorted(names - saved.keys())} "
                f"and has {sorted(saved.keys() - names)} too much"
            )
        return cls(**saved)

    def ranking(self) -> float | None:
        """The solve rate of the evaluation of this very step, which says how good its checkpoint is."""
        return self.evaluations.get(str(self.step))


@dataclass
class Run:
    """One run on this rank. `records` and `lock` are on rank 0 alone."""

    recipe: Recipe
    ingredients: Ingredients
    runtime: Runtime
    policy: Policy
    worker: PolicyWorker
    reference: Reference | None  # None: the algorithm needs none
    optimizer: PolicyOptimizer
    sampler: Sampler
    producer: Producer
    checkpoints: Checkpoints
    records: Records | None
    lock: RunLock | None
    progress: Progress
    stop_request: StopRequest  # to this rank
    stopping: bool = False  # some rank was asked to stop; the same on all
    timer: Stopwatch = field(default_factory=Stopwatch)

    def update_engine(self) -> None:
        """Brings the policy's weights to the rollout engine; their version is the number of steps done."""
        weights = export_weights(self.policy.modules, self.policy.hf_config, leaders_only=True)
        self.sampler.engine.update_weights(weights, self.progress.step)

    def optimizer_steps(self, batch: Batch) -> list[list[int]]:
        """The rows of each optimizer step on this batch."""
        finished_only = self.recipe.algorithm.overlong_filtering
        return list(mini_batches(batch, self.recipe.train.mini_batch_prompts, finished_only=finished_only))

    def old_policy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The old policy's log-probs and entropies (nats), float32 [N, T]: of a forward, or as the engine sampled."""
        if self.recipe.algorithm.old_policy == "forward":
            return self.worker.log_probs_and_entropies(batch, self.optimizer_steps(batch))
        assert batch.rollout_entropies is not None, "preflight checks that the engine gives them"
        return batch.rollout_log_probs, batch.rollout_entropies

    def reference_log_probs(self, batch: Batch) -> Tensor | None:
        """The reference policy's log-probs, float32 [N, T]; None: the algorithm needs none."""
        if self.reference is None:
            return None
        with self.timer("reference"):
            return self.reference.log_probs(batch)

    def adapted_algorithm(self, batch: Batch, entropies: Tensor) -> Algorithm:
        """The algorithm of this step: where the entropy bonus has a target, its coefficient follows the entropies."""
        algorithm = self.ingredients.algorithm
        if not algorithm.needs.entropy_control:
            return algorithm
        start = algorithm.loss_settings.entropy_coef
        coefficient = start if self.progress.entropy_coef is None else self.progress.entropy_coef
        mean = float(entropies[batch.mask].mean(dtype=torch.float64))
        algorithm, self.progress.entropy_coef = algorithm.adapted(coefficient, mean)
        return algorithm

    def step_data(self, algorithm: Algorithm, batch: Batch, rows: Sequence[int], known: TokenData) -> TokenData:
        """`known` with what is taken over an optimizer step: its tokens' weights, and which of them the loss marks.

        Where shapings see the current policy, the advantages too; a NaN in its log-probs or entropies makes them NaN,
        so that the update is refused.
        """
        mask = batch.mask_of(rows)
        data = replace(known, weights=algorithm.weights(mask, batch.group_ids))
        log_probs = known.old_log_probs
        if self.recipe.algorithm.shaping_policy == "current":
            log_probs, entropies = self.worker.scores_before_update(batch, rows)
            if not bool(torch.isfinite(log_probs).all() & torch.isfinite(entropies).all()):
                unknown = torch.full_like(log_probs, torch.nan)
                return replace(data, advantages=unknown, selected=unknown)
            shaped = algorithm.advantages(
                batch.rewards, batch.group_ids, mask, log_probs=log_probs, entropies=entropies
            )
            data = replace(data, advantages=shaped)
        if algorithm.needs.selected:
            assert data.advantages is not None
            assert log_probs is not None
            number = self.progress.optimizer_steps + self.progress.skipped_updates
            draws = uniform_draws(self.recipe.seed, number, mask.shape, mask.device) if algorithm.needs.draws else None
            inputs = SelectionInputs(data.advantages, log_probs, mask, draws)
            data = replace(data, selected=algorithm.selected(inputs))
        return data

    def count(self, *, applied: bool, problem: str = "NaN or Inf in a loss or gradient") -> None:
        """Counts an optimizer step, or one that was skipped because it had a problem.

        Raises:
            TrainingStoppedError: after too many skipped ones in a row.
        """
        progress, limit = self.progress, self.recipe.train.max_skipped_in_a_row
        if applied:
            progress.optimizer_steps += 1
            progress.skipped_in_a_row = 0
            return
        progress.skipped_updates += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= limit:
            steps, folder = self.checkpoints.steps(), self.checkpoints.folder
            left = f"the last good checkpoint is in {folder}" if steps else "there is no checkpoint yet"
            raise TrainingStoppedError(f"step {progress.step}: {limit} updates in a row had {problem}; {left}")

    def record_samples(self, rollouts: Rollouts) -> None:
        """Keeps a few responses of this step."""
        if self.records is not None:
            shown = describe_samples(rollouts, self.recipe.logging.samples_per_step, self.sampler.text)
            self.records.log_samples(self.progress.step, shown)

    def record_tokens(
        self, prompts: Sequence[Prompt], batch: Batch, old_log_probs: Tensor, entropies: Tensor, shaped: Tensor
    ) -> None:
        """Keeps what this step knew of the tokens of a few groups; see `token_tables`."""
        count, algorithm = self.recipe.logging.record_tokens, self.ingredients.algorithm
        if self.records is None or not count:
            return
        with self.timer("records"):
            step = self.progress.step
            tables = token_tables(
                step,
                sampled_groups(count, seed=self.recipe.seed, step=step, of=len(prompts)),
                prompts,
                batch,
                old_log_probs=old_log_probs,
                entropies=entropies,
                advantages=group_advantages(
                    batch.rewards,
                    batch.group_ids,
                    estimator=algorithm.advantage_estimator,
                    positive_threshold=algorithm.positive_threshold,
                ),
                shaped_advantages=shaped,
                quadrants=algorithm.quadrants(batch.rewards, batch.group_ids, batch.mask, entropies=entropies),
                decode=lambda ids: str(self.sampler.tokenizer.decode(ids)),
            )
            self.records.tokens.write(step, tables)

    def save(self) -> None:
        """A checkpoint of this step, once its records are on disk.

        Raises:
            TrainingStoppedError: when another process has taken the run folder.
        """
        if not self.runtime.broadcast_object(self.lock is None or self.lock.is_held()):
            raise TrainingStoppedError(f"another process has taken {self.recipe.run_folder}: step not saved")
        if self.records is not None:
            self.records.sync()
        state = {"progress": asdict(self.progress), "ranking": self.progress.ranking()}
        self.checkpoints.save(self.progress.step, self.policy, self.optimizer.megatron, self.optimizer.schedule, state)
        if self.records is not None:
            self.records.settle()

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        rates = self.progress.evaluations
        return {
            "name": self.recipe.name,
            **{key: value for key, value in asdict(self.progress).items() if key != "evaluations"},
            "dropped": self.ingredients.dropped,
            "held_out": {
                "solve_rate_start": rates.get("0"),
                "solve_rate_end": rates.get(str(self.progress.step)),
                "solve_rates": rates,
            },
        }


@contextmanager
def open_run(
    recipe: Recipe,
    ingredients: Ingredients,
    runtime: Runtime,
    stop_request: StopRequest,
    lock: RunLock | None = None,
) -> Iterator[Run]:
    """Opens the policy and what trains it, resumed from the run folder's last checkpoint where there is one.

    The benchmarks are those that rank 0 has read.
    """
    folder = recipe.run_folder
    ingredients = replace(ingredients, benchmarks=runtime.broadcast_object(ingredients.benchmarks))
    checkpoints = Checkpoints(
        folder / "checkpoints", keep_last=recipe.checkpoint.keep_last, keep_best=recipe.checkpoint.keep_best
    )
    resume_step, said = checkpoints.find_whole(runtime, on_damage=recipe.checkpoint.on_damage)
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE_FILE, saved_form(recipe))
        save_run_assets(folder, recipe.model, ingredients.hf_config, ingredients.tokenizer)
    source = None
    if resume_step is None:
        _check_source(recipe.model, runtime)
        source = weight_source(recipe.model, ingredients.hf_config, recipe.seed)
    policy = open_policy(ingredients.hf_config, recipe.model, recipe.parallel, runtime, source)
    worker = PolicyWorker.of_recipe(policy, recipe)
    progress = Progress()
    with ExitStack() as stack:
        records = None
        if runtime.is_main:
            records = stack.enter_context(Records(recipe, first_step=0 if resume_step is None else resume_step + 1))
            if lock is not None and lock.left_by is not None:
                said.insert(0, f"{lock.left_by.describe()} left {folder} locked and is gone: taken over")
            if ingredients.dropped:
                said.append(f"left out of the data: {ingredients.describe_dropped()}")
            said += [f"left out: {line}" for task in ingredients.benchmarks for line in task.left_out]
            for line in said:
                records.say(line)
        if resume_step is None and recipe.warm_start.steps:
            warm_start(recipe, ingredients, worker, records)
        reference = None
        if ingredients.algorithm.needs.ref_log_probs:
            start = policy if resume_step is None else None
            reference = open_reference(recipe, ingredients.hf_config, runtime, folder, start)
        # After the weights: a bf16 policy's optimizer copies them in float32 when it is built.
        optimizer = build_optimizer(policy, recipe.optimizer)
        if resume_step is not None:
            state = checkpoints.load(resume_step, policy, optimizer.megatron, optimizer.schedule)
            progress = Progress.of_state(state)
        engine = open_engine(policy, recipe, ingredients.tokenizer)
        stack.callback(engine.close)
        sampler = stack.enter_context(
            Sampler(engine, recipe, ingredients.tokenizer, runtime, stop_token_ids=ingredients.stop_token_ids)
        )
        producer = open_producer(sampler, ingredients.train, recipe)
        stack.callback(producer.close)
        run = Run(
            recipe,
            ingredients,
            runtime,
            policy,
            worker,
            reference,
            optimizer,
            sampler,
            producer,
            checkpoints,
            records,
            lock,
            progress,
            stop_request,
        )
        run.update_engine()
        if records is not None and resume_step is not None:
            records.say(f"resumed from step {progress.step} of {folder}")
        yield run


def _check_source(model: Model, runtime: Runtime) -> None:
    """Whether `model.checkpoint` is as it was written, where it has checksums.

    Raises:
        RecipeError: naming the damaged file.
    """
    if model.checkpoint is not None:
        folder = find_checkpoint(Path(model.checkpoint), key="model.checkpoint")
        condition = inspect(folder, runtime, check=check_tensor_files)
        if condition.problem is not None:
            raise RecipeError(condition.problem)
