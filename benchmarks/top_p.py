"""What top-p does to the log-probs of rollouts: raw ones beside those renormalised over the nucleus, and the kept mass.

    python -m benchmarks.top_p [--prompts 128] [--top-p 1.0 0.99 0.95 0.9 0.8]

The policy is that of the first recipe after its warm start, on one rank. For each top_p it samples the recipe's number
of responses to the same prompts, and the trainer scores them in a forward of its own. The gap is the mean
|log pi_old - log pi_rollout| over all tokens, in nats: "raw" with the engine's log-probs, which are of the full
softmax, "renormalised" with those of the distribution that the tokens were drawn from (log pi_rollout - log S).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import circumstances
from eapo_megatron.algorithms import kept_mass_metrics, mismatch_metrics
from eapo_megatron.launcher import free_port
from eapo_megatron.policy.batching import make_batch
from eapo_megatron.policy.policy_model import open_policy
from eapo_megatron.policy.runtime import start_runtime, stop_runtime
from eapo_megatron.policy.worker import PolicyWorker
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.rollout.engine import SamplingParams, open_engine, response_seed
from eapo_megatron.training.preflight import prepare
from eapo_megatron.training.warm_start import warm_start
from eapo_megatron.weights.huggingface import weight_source

RECIPE = "recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"
ONE_RANK = ["cluster.gpus_per_node=1", "parallel.tensor_model_parallel_size=1"]
RESULTS = Path(__file__).parent / "results" / "top_p.json"


def measure(values: list[float], count: int, overrides: list[str]) -> list[dict[str, float]]:
    """One row for each top_p."""
    recipe = load_recipe(RECIPE, [*ONE_RANK, *overrides])
    ingredients = prepare(recipe, 1, source=RECIPE)
    runtime = start_runtime(recipe.parallel, seed=recipe.seed, device="cpu")
    source = weight_source(recipe.model, ingredients.hf_config, recipe.seed)
    policy = open_policy(ingredients.hf_config, recipe.model, recipe.parallel, runtime, source)
    worker = PolicyWorker(
        policy, micro_batch_size=recipe.train.micro_batch_size, temperature=recipe.rollout.temperature
    )
    warm_start(recipe, ingredients, worker, None)
    engine = open_engine(policy, recipe, ingredients.tokenizer)
    prompts = [prompt.token_ids for prompt in ingredients.evaluation[:count]]
    generations = recipe.rollout.num_generations_per_prompt
    seeds = [[response_seed(recipe.seed, "top_p", at, i) for i in range(generations)] for at in range(len(prompts))]
    groups = torch.arange(len(prompts)).repeat_interleave(generations)
    rows = []
    for top_p in values:
        sampling = SamplingParams(
            temperature=recipe.rollout.temperature,
            top_p=top_p,
            max_response_tokens=recipe.rollout.max_response_tokens,
            stop_token_ids=ingredients.stop_token_ids,
        )
        responses = engine.generate(prompts, seeds, sampling)
        batch = make_batch(prompts, responses, groups, torch.zeros(len(groups)), runtime.device)
        old_log_probs, entropies = worker.log_probs_and_entropies(batch)
        rows.append({"top_p": top_p, **_row(batch, old_log_probs, entropies)})
    stop_runtime()
    return rows


def _row(batch: Any, old_log_probs: torch.Tensor, entropies: torch.Tensor) -> dict[str, float]:
    mask = batch.mask
    drawn_from = torch.where(mask, batch.rollout_log_probs - batch.kept_mass.log(), 0.0)
    row: dict[str, float] = {"tokens": int(mask.sum()), "mean_entropy": float(entropies[mask].double().mean())}
    for name, log_probs in (("raw", batch.rollout_log_probs), ("renormalised", drawn_from)):
        gap = (old_log_probs - log_probs)[mask].abs().double()
        row[f"gap_{name}"] = float(gap.mean())
        metrics = mismatch_metrics(old_log_probs, log_probs, mask)
        row |= {f"{metric}_{name}": value for metric, value in metrics.items()}
    edges = entropies[mask].double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    row |= {f"entropy_edge_{number}": float(edge) for number, edge in enumerate(edges, start=1)}
    return row | kept_mass_metrics(batch.kept_mass, entropies, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0, 0.99, 0.95, 0.9, 0.8])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", help="key.path=value over the recipe, such as logging.run_dir=...")
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rows = measure(options.top_p, options.prompts, options.overrides)
    record = circumstances() | {"recipe": Path(RECIPE).name, "prompts": options.prompts, "rows": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(
        "top_p", "gap, raw", "gap, renormalised", "S", "S q1", "S q2", "S q3", "S q4", title="nats; S by entropy"
    )
    for row in rows:
        masses = (row[name] for name in ("kept_mass", *(f"kept_mass/q{number}" for number in (1, 2, 3, 4))))
        table.add_row(
            f"{row['top_p']:g}",
            f"{row['gap_raw']:.1e}",
            f"{row['gap_renormalised']:.1e}",
            *(f"{mass:.4f}" for mass in masses),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
