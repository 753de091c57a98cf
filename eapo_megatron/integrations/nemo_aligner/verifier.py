"""Verified rewards in the place of NeMo-Aligner's reward-model server: answers are looked up by prompt and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp, run_if_model_parallel_src
from nemo_aligner.utils.server_utils import FutureResult
from torch import Tensor

from eapo_megatron.rewards import RewardPool
from eapo_megatron.rewards.mathematics import INCORRECT


class VerifierRewards:
    """What the trainer asks as `rm`: `infer_rm(rollout_batch)` -> a future of float32 [B, 1], the pool's rewards.

    With the pool's "math" they are +1 or -1. An answer without a verdict (a user's function that crashed or ran out of
    time) has the wrong reward, -1: NeMo-Aligner's groups know no other.

    The first rank of each model replica checks its responses in worker processes while generation goes on. A context
    manager: the workers live as long as its `with` block.
    """

    def __init__(self, answers: dict[tuple[int, ...], Any], tokenizer: Any, pool: RewardPool) -> None:
        self._answers = answers
        self._tokenizer = tokenizer
        self._pool = pool
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> VerifierRewards:
        run_if_model_parallel_src(self._pool.__enter__)
        if self._pool.asks:
            raise ValueError(f"the reward function asks for {', '.join(self._pool.asks)}, which are not known here")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._pool.__exit__(kind, error, traceback)

    def infer_rm(self, rollout_batch: dict[str, Tensor]) -> FutureResult:
        """Starts checking `response_tokens` [B, S] against the answers to their prompts."""
        return _Rewards(run_if_model_parallel_src(self._thread.submit, self._score, rollout_batch))

    def _score(self, rollout_batch: dict[str, Tensor]) -> list[float]:
        texts, answers = [], []
        for tokens, start, end in zip(
            rollout_batch["response_tokens"].tolist(),
            rollout_batch["prompt_lengths"].tolist(),
            rollout_batch["response_lengths"].tolist(),
            strict=True,
        ):
            texts.append(self._tokenizer.ids_to_text(tokens[start:end]))
            answers.append(self._answers[tuple(tokens[:start])])
        rewards = self._pool.score(texts, answers).rewards
        return [INCORRECT if math.isnan(reward) else reward for reward in rewards]


class _Rewards(FutureResult):
    def __init__(self, future: Future[list[float]] | None) -> None:
        self._future = future

    def result(self) -> Tensor:
        """Rewards [B, 1] on every rank of the replica."""
        rewards = None
        if self._future is not None:
            rewards = torch.tensor(self._future.result(), device=torch.cuda.current_device())[:, None]
        return broadcast_2d_tensor_within_mp(rewards)


def read_answers(paths: Sequence[str | Path], encode: Callable[[str], list[int]]) -> dict[tuple[int, ...], Any]:
    """The "answer" of each line of JSONL files by the tokens of its prompt, the "text" that NeMo-Aligner reads.

    Raises:
        ValueError: naming the file and the line that lacks either or answers a prompt differently than another.
    """
    answers: dict[tuple[int, ...], Any] = {}
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                record = json.loads(line)
                for key in ("text", "answer"):
                    if key not in record:
                        raise ValueError(f"{path} line {number}: {key} is missing")
                prompt = tuple(encode(record["text"]))
                if answers.setdefault(prompt, record["answer"]) != record["answer"]:
                    raise ValueError(f"{path} line {number}: another line answers the same prompt differently")
    return answers
