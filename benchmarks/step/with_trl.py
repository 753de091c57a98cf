"""A process that takes a step of TRL's GRPOTrainer each time it is asked, in TRL's environment.

A request is any line on the first rank's standard input; the answer is a line of JSON: seconds of the step, those of
its rollouts, and the tokens of the responses. A step begins when the trainer has its prompts and ends after the
optimizer. The reference policy is off (beta 0), the old policy's log-probs are those of the update itself (one
optimizer step a batch), and everything is in float32 without recomputation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.step.reward import rewards

ANSWERS = sys.stdout
sys.stdout = sys.stderr  # what libraries print is no answer


class Turns(TrainerCallback):
    """Waits before a step until it is asked for, and answers after it."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.start = self.rollout = 0.0
        self._generate = trainer._generate
        trainer._generate = self.generate

    def generate(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self._generate(*args)
        self.rollout += time.perf_counter() - start
        return result

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        box = [sys.stdin.readline()] if args.process_index == 0 else [None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        if not box[0]:
            os._exit(0)
        self.rollout, self.start = 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        seconds = time.perf_counter() - self.start
        length = self.trainer._metrics["train"]["completions/mean_length"][-1]
        tokens = length * args.generation_batch_size
        if args.process_index == 0:
            phases = {"rollout": self.rollout, "update": seconds - self.rollout}
            print(json.dumps({"seconds": seconds, "phases": phases, "tokens": tokens}), file=ANSWERS, flush=True)


def main() -> None:
    folder, group, response_tokens, responses, micro_batch = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:  # without these there is no process group, and nothing that it costs
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    accumulated = responses // (micro_batch * ranks)
    records = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train", cache_dir=f"{folder}/datasets")
    settings = GRPOConfig(
        output_dir=f"{folder}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated,
        num_generations=group,
        max_completion_length=response_tokens,
        temperature=1.0,
        beta=0.0,
        max_steps=1_000_000,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        seed=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32),
        reward_funcs=rewards,
        args=settings,
        train_dataset=records.select([number for _ in range(64) for number in range(len(records))]),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
    )
    trainer.add_callback(Turns(trainer))
    trainer.train()


if __name__ == "__main__":
    main()
