"""Samples a second of the rollout engines and of transformers' generate: same model, prompts, lengths and one core.

    make benchmark-vllm      (python -m benchmarks.rollouts [--prompts 64], in vLLM's environment)
    python -m benchmarks.rollouts --engine vllm      # one alone, as JSON with what each process takes of the core

A random Qwen2 of 4 layers and width 256 in float32 draws 8 responses of 64 tokens to each prompt, none of which stops
early, from the full softmax and from the nucleus at top_p 0.95, with at most 256 responses in a batch. Each engine is a
process of its own that is bound to one core, with all that it starts; vLLM is reached as training reaches it, over
HTTP. The first batch warms up and does not count; of the repeats, which take turns, the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "rollouts.json"
ENGINES = ("embedded", "vllm", "transformers")
LENGTHS, TOP_P = (16, 128), (1.0, 0.95)
GROUP, RESPONSE_TOKENS, BATCH = 8, 64, 256
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def prompts_of(count: int, length: int) -> list[list[int]]:
    source = random.Random(length)
    return [[source.randrange(ARCHITECTURE["vocab_size"]) for _ in range(length)] for _ in range(count)]  # type: ignore[call-overload]


def generator(engine: str, folder: str) -> tuple[Callable[[list[list[int]], float], int], Callable[[], None]]:
    """A function of prompts and top_p that draws the responses and returns their tokens, and one that ends it."""
    if engine == "transformers":
        return _transformers(), lambda: None
    import torch

    from eapo_megatron.config import Recipe
    from eapo_megatron.launcher import free_port
    from eapo_megatron.policy.policy_model import open_policy
    from eapo_megatron.policy.runtime import start_runtime
    from eapo_megatron.rollout.engine import SamplingParams
    from eapo_megatron.rollout.megatron_engine import MegatronEngine
    from eapo_megatron.rollout.vllm_engine import open_engine
    from eapo_megatron.weights.assets import FOLDER, write_whole_config
    from eapo_megatron.weights.export import export_weights
    from eapo_megatron.weights.huggingface import hf_config_of, weight_source

    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ |= {key: str(value) for key, value in world.items()}
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "cluster": {"device": "cpu"},
            "model": {"architecture": ARCHITECTURE, "dtype": "float32"},
            "data": {"task": "arithmetic", "max_prompt_tokens": max(LENGTHS)},
            "rollout": {"engine": "vllm", "max_response_tokens": RESPONSE_TOKENS, "max_batch_size": BATCH},
            "logging": {"run_dir": folder},
        }
    )
    runtime = start_runtime(recipe.parallel, seed=1, device="cpu")
    hf_config = hf_config_of(recipe.model, source="benchmark")
    policy = open_policy(hf_config, recipe.model, recipe.parallel, runtime, weight_source(recipe.model, hf_config, 1))
    opened: Any
    if engine == "embedded":
        opened = MegatronEngine(policy, pad_token_id=0, max_batch_size=BATCH)
    else:
        (recipe.run_folder / FOLDER).mkdir(parents=True)
        write_whole_config(recipe.run_folder / FOLDER, hf_config)
        opened = open_engine(policy, recipe, None)  # type: ignore[arg-type]
    opened.update_weights(export_weights(policy.modules, policy.hf_config, leaders_only=True), 1)

    def generate(prompts: list[list[int]], top_p: float) -> int:
        seeds = [[8 * row + sample for sample in range(GROUP)] for row in range(len(prompts))]
        sampling = SamplingParams(top_p=top_p, max_response_tokens=RESPONSE_TOKENS)
        with torch.no_grad():
            return int(opened.generate(prompts, seeds, sampling).lengths.sum())

    return generate, opened.close


def _transformers() -> Callable[[list[list[int]], float], int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE), dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], top_p: float) -> int:
        tokens = 0
        each = BATCH // GROUP
        for start in range(0, len(prompts), each):
            ids = torch.tensor(prompts[start : start + each])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_p=top_p,
                top_k=0,
                num_return_sequences=GROUP,
                max_new_tokens=RESPONSE_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens += out[:, ids.shape[1] :].numel()
        return tokens

    return generate


def work(engine: str, count: int, repeats: int) -> None:
    """In a process of its own: prints JSON of samples a second by prompt length and top_p, and processor seconds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    best: dict[str, float] = {}
    spent: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        generate, close = generator(engine, folder)
        generate(prompts_of(2, 8), 0.95)
        for _ in range(repeats):
            for length in LENGTHS:
                for top_p in TOP_P:
                    prompts = prompts_of(count, length)
                    key = f"prompt {length}, top_p {top_p:g}"
                    before, start = processor_seconds(), time.perf_counter()
                    tokens = generate(prompts, top_p)
                    seconds = time.perf_counter() - start
                    spent[key] = {name: taken - before[name] for name, taken in processor_seconds().items()}
                    assert tokens == count * GROUP * RESPONSE_TOKENS
                    best[key] = max(best.get(key, 0.0), count * GROUP / seconds)
        close()
    print(json.dumps({"samples_a_second": best, "processor_seconds": spent}))


def processor_seconds() -> dict[str, float]:
    """Of this process and of those that it started, by what they do."""
    import psutil

    seconds: dict[str, float] = {}
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        command = " ".join(process.cmdline())
        known = {"EngineCore": "scheduler", "Worker": "model", "api_server": "HTTP server"}
        name = "client" if process == own else next((known[part] for part in known if part in command), "other")
        times = process.cpu_times()
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="each with 8 responses")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, help="this one alone; prints JSON and writes nothing")
    options = parser.parse_args()
    if options.engine:
        work(options.engine, options.prompts, options.repeats)
        return
    from benchmarks.measuring import circumstances

    rows = {}
    for engine in ENGINES:
        command = [sys.executable, "-m", "benchmarks.rollouts", "--engine", engine]
        command += ["--prompts", str(options.prompts), "--repeats", str(options.repeats)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows[engine] = json.loads(done.stdout.splitlines()[-1])["samples_a_second"]
    table = Table(title=f"samples a second, {options.prompts} prompts x {GROUP}, {RESPONSE_TOKENS} tokens, one core")
    table.add_column("")
    for column in rows["embedded"]:
        table.add_column(column, justify="right")
    for engine, row in rows.items():
        table.add_row(engine, *(f"{value:.1f}" for value in row.values()))
    Console().print(table)
    setting = {"prompts": options.prompts, "repeats": options.repeats, "group": GROUP, "tokens": RESPONSE_TOKENS}
    record = {**circumstances(), "setting": setting, "model": ARCHITECTURE, "samples_a_second": rows}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
