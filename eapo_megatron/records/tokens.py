"""Token records: what training knew of each token of a few sampled groups, in RUN/tokens/step_000012.parquet.

A row is a response, a row group of the file a group. `SCHEMA` lists the columns. The file of a step is written
under a temporary name and renamed, so that a kill leaves whole files alone. A resumed run drops the steps after its
checkpoint.

The folder has a bounded size and still covers a run from its start to its end: when it grows beyond the bound, every
second recorded step is dropped, and from then on only steps that are multiples of twice the number are kept.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.durable import write_bytes

if TYPE_CHECKING:  # records are read without Megatron
    from eapo_megatron.data.prompts import Prompt
    from eapo_megatron.policy.batching import Batch

TOKENS_FOLDER = "tokens"
VERSION = 1
_FILE = re.compile(r"step_(\d{6,})\.parquet")
_LONGEST_CHARACTER = 4  # bytes of UTF-8, each a token of its own at worst

SCHEMA = pa.schema(
    metadata={"eapo_megatron.tokens": str(VERSION)},
    fields=[
        ("step", pa.int32()),
        ("group", pa.int32()),  # its place in the batch of the step
        ("response", pa.int32()),  # its place in the group
        ("prompt_index", pa.int64()),  # of the example in the data
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("reward", pa.float32()),
        ("finished", pa.bool_()),
        ("advantage", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("texts", pa.list_(pa.string())),
        ("entropies", pa.list_(pa.float32())),
        ("old_log_probs", pa.list_(pa.float32())),
        ("rollout_log_probs", pa.list_(pa.float32())),
        ("shaped_advantages", pa.list_(pa.float32())),
        ("quadrants", pa.list_(pa.string())),
    ],
)
_WORDS = ["prompt", "answer", "texts.list.element", "quadrants.list.element"]
_NUMBERS = [f"{name}.list.element" for name in ("entropies", "old_log_probs", "rollout_log_probs", "shaped_advantages")]


class TokenRecords:
    """The folder of a run's token records, from `first_step` on; later steps that are there are dropped."""

    def __init__(self, run_folder: Path, *, first_step: int, max_bytes: int, say: Callable[[str], None]) -> None:
        self.folder = run_folder / TOKENS_FOLDER
        self._max_bytes, self._say = max_bytes, say
        for path in self.folder.glob(".step_*"):  # of a kill
            path.unlink()
        files = recorded_steps(run_folder)
        for step in [step for step in files if step >= first_step]:
            files.pop(step).unlink()
        self._sizes = {step: path.stat().st_size for step, path in files.items()}
        self._every = _every_of(list(files))

    def write(self, step: int, groups: Sequence[pa.Table]) -> None:
        """Keeps the groups of a step, and drops steps where the folder has become too large."""
        if step % self._every or not groups:
            return
        data = _parquet(groups)
        if len(data) > self._max_bytes:
            self._say(
                f"the tokens of step {step} take {len(data) / 2**20:.1f} MiB, more than logging.record_tokens_max_mib: "
                "not kept"
            )
            return
        self.folder.mkdir(exist_ok=True)
        write_bytes(self._path(step), data)
        self._sizes[step] = len(data)
        while sum(self._sizes.values()) > self._max_bytes:
            self._thin()

    def _thin(self) -> None:
        self._every *= 2
        for step in [step for step in self._sizes if step % self._every]:
            self._path(step).unlink()
            del self._sizes[step]

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.parquet"


def recorded_steps(run_folder: Path) -> dict[int, Path]:
    """The files of a run's token records by step, in their order."""
    matches = [(_FILE.fullmatch(path.name), path) for path in (run_folder / TOKENS_FOLDER).glob("step_*.parquet")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def sampled_groups(count: int, *, seed: int, step: int, of: int) -> list[int]:
    """`count` of the `of` groups of a step, ascending: of the seed and the step alone."""
    return sorted(random.Random(f"tokens/{seed}/{step}").sample(range(of), min(count, of)))


def token_tables(
    step: int,
    chosen: Sequence[int],
    prompts: Sequence[Prompt],
    batch: Batch,
    *,
    old_log_probs: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    shaped_advantages: Tensor,
    quadrants: Mapping[str, Tensor],
    decode: Callable[[list[int]], str],
) -> list[pa.Table]:
    """One table of `SCHEMA` for each chosen group, a row a response.

    prompts: of all groups. old_log_probs, entropies (nats), shaped_advantages: float32 [N, T]; advantages: float32 [N],
    before the shaping; quadrants: bool [N, T] each, from `quadrant_masks`. Numbers are kept bit for bit.
    `decode` turns token ids into text; the texts of a response's tokens, put together, are the response's.
    """
    names = torch.zeros(batch.mask.shape, dtype=torch.int64, device=batch.mask.device)
    for number, name in enumerate(QUADRANTS):
        names[quadrants[name]] = number
    decoded = lru_cache(2**16)(lambda ids: decode(list(ids)))  # of one or two tokens, most often
    tables = []
    for group in chosen:
        prompt, columns = prompts[group], {name: [] for name in SCHEMA.names}  # type: ignore[var-annotated]
        for response, row in enumerate((batch.group_ids == group).nonzero().flatten().tolist()):
            mask = batch.mask[row]
            ids = batch.responses.select(torch.tensor([row])).tokens.tolist()
            values = {
                "step": step,
                "group": group,
                "response": response,
                "prompt_index": prompt.index,
                "prompt": _utf8(prompt.text),
                "answer": _utf8(prompt.answer if isinstance(prompt.answer, str) else " | ".join(prompt.answer)),
                "reward": float(batch.rewards[row]),
                "finished": bool(batch.finished[row]),
                "advantage": float(advantages[row]),
                "token_ids": ids,
                "texts": [_utf8(text) for text in token_texts(tuple(ids), decoded)],
                "entropies": entropies[row][mask].tolist(),
                "old_log_probs": old_log_probs[row][mask].tolist(),
                "rollout_log_probs": batch.rollout_log_probs[row][mask].tolist(),
                "shaped_advantages": shaped_advantages[row][mask].tolist(),
                "quadrants": [QUADRANTS[number] for number in names[row][mask].tolist()],
            }
            for name, value in values.items():
                columns[name].append(value)
        tables.append(pa.table(columns, schema=SCHEMA))
    return tables


def token_texts(ids: tuple[int, ...], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """What each token adds to the text. Of a character that is spread over tokens, the last has all of it.

    A token is decoded behind the one before it, because some tokenizers drop a text's first space.
    """
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        is_cut = now.endswith("\ufffd") and end - read < _LONGEST_CHARACTER and end < len(ids)
        texts.append("" if is_cut else now[len(before) :])
        if not is_cut:
            start, read = read, end
    return texts


def _utf8(text: str) -> str:
    """Parquet holds UTF-8: a lone surrogate that a tokenizer made becomes its escape."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _parquet(groups: Sequence[pa.Table]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression="zstd",
        use_dictionary=_WORDS,
        use_byte_stream_split=_NUMBERS,
        write_page_checksum=True,
    ) as writer:
        for table in groups:
            writer.write_table(table)
    return sink.getvalue()


def _every_of(steps: Sequence[int]) -> int:
    """Which steps were kept so far, as the folder shows it: the multiples of this power of two."""
    divisor = math.gcd(*steps) if len(steps) > 1 else 1
    return divisor & -divisor
