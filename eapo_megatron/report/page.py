"""One HTML file with the runs, the figures and the token view: it needs no network and no server.

The tokens are inlined in blocks of whole responses: numbers as typed arrays, compressed, in base64. The browser decodes
a block when it shows a response of it, so the page opens at once however many tokens it holds.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.report.figures import Figure, column_count, svg_panels
from eapo_megatron.report.recordings import RecordedRun, Tokens

TOKENS_IN_BLOCK = 2**15
_TOP_QUANTILE = 0.99  # the entropy at which a token has its full shade


class Blocks:
    """Compressed parts of the page, each a script element that no browser runs."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def add(self, data: bytes) -> str:
        """The id of the new element."""
        name = f"block-{len(self.elements)}"
        text = base64.b64encode(zlib.compress(data, 6)).decode()
        self.elements.append(f'<script type="text/plain" id="{name}">{text}</script>')
        return name

    def add_columns(self, **columns: np.ndarray) -> dict[str, Any]:
        """Arrays of the same or of different lengths, those of four bytes first."""
        ordered = sorted(columns.items(), key=lambda column: -column[1].itemsize)
        data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in ordered)
        described = [[name, values.dtype.name, len(values)] for name, values in ordered]
        return {"id": self.add(data), "columns": described}

    def add_json(self, value: Any) -> str:
        return self.add(json.dumps(value, ensure_ascii=False).encode("utf-8"))


def make_page(
    runs: Sequence[RecordedRun],
    figures: Iterable[Figure],
    left_out: Sequence[str],
    *,
    title: str,
    made: str,
    reload_seconds: int = 0,
) -> str:
    """The page as text. `left_out`: the figures that the records do not allow, each with its reason."""
    blocks = Blocks()
    recorded = [(run, run.tokens) for run in runs if run.tokens is not None]
    data = {
        "quadrants": QUADRANTS,
        "top": top_entropy([tokens for _, tokens in recorded]),
        "reload": reload_seconds,
        "runs": [_pack(run.name, tokens, blocks) for run, tokens in recorded],
    }
    parts = {
        "title": html.escape(title),
        "lead": html.escape(_lead(runs)),
        "runs": "".join(_run_line(run) for run in runs),
        "figures": "\n".join(_figure(figure) for figure in figures),
        "left_out": _left_out(left_out),
        "made": html.escape(made),
        "data": json.dumps(data).replace("<", "\\u003c"),
        "blocks": "\n".join(blocks.elements),
    }
    page = files("eapo_megatron.report").joinpath("page.html").read_text(encoding="utf-8")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def top_entropy(recorded: Sequence[Tokens]) -> float:
    """The entropy (nats) of the darkest shade: the 0.99 quantile of all recorded tokens."""
    values = [tokens.entropies for tokens in recorded if len(tokens.entropies)]
    return max(float(np.quantile(np.concatenate(values), _TOP_QUANTILE)), 1e-6) if values else 1.0


def _pack(name: str, tokens: Tokens, blocks: Blocks) -> dict[str, Any]:
    lengths = np.diff(tokens.offsets)
    means, stds = tokens.group_entropies()
    block_of, starts, bounds = _divide(lengths)
    prompts = dict.fromkeys(zip(tokens.prompts, tokens.answers, strict=True))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    prompt_of = [number[prompt] for prompt in zip(tokens.prompts, tokens.answers, strict=True)]
    index = blocks.add_columns(
        step=tokens.steps.astype(np.int32),
        group=tokens.groups.astype(np.int32),
        prompt=np.array(prompt_of, dtype=np.int32),
        block=block_of.astype(np.int32),
        start=starts.astype(np.int32),
        length=lengths.astype(np.int32),
        reward=tokens.rewards.astype(np.float32),
        advantage=tokens.advantages.astype(np.float32),
        mean=means.astype(np.float32),
        std=stds.astype(np.float32),
        finished=tokens.finished.astype(np.uint8),
        correct=tokens.correct.astype(np.uint8),
    )
    return {
        "name": name,
        "first": _first_row(tokens),
        "index": index,
        "words": blocks.add_json(
            {
                "texts": tokens.texts,
                "prompts": [prompt for prompt, _ in prompts],
                "answers": [answer for _, answer in prompts],
            }
        ),
        "blocks_of_tokens": [
            blocks.add_columns(
                text=tokens.text_of[begin:end].astype(np.int32),
                entropy=tokens.entropies[begin:end],
                old=tokens.old_log_probs[begin:end],
                rollout=tokens.rollout_log_probs[begin:end],
                shaped=tokens.shaped_advantages[begin:end],
                quadrant=tokens.quadrants[begin:end],
            )
            for begin, end in bounds
        ],
    }


def _divide(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Whole responses into blocks -> of each response its block and its place there; of each block its tokens."""
    ends = np.cumsum(lengths)
    block_of = (ends - lengths) // TOKENS_IN_BLOCK
    block_of = np.unique(block_of, return_inverse=True)[1] if len(lengths) else block_of
    bounds = []
    starts = np.zeros_like(lengths)
    for block in range(int(block_of.max()) + 1 if len(lengths) else 0):
        rows = block_of == block
        begin, end = int((ends - lengths)[rows][0]), int(ends[rows][-1])
        starts[rows] = (ends - lengths)[rows] - begin
        bounds.append((begin, end))
    return block_of, starts, bounds


def _first_row(tokens: Tokens) -> int:
    """What the page opens with: the first correct response of the last group whose rewards differ."""
    group_of, correct = tokens.group_of, tokens.correct
    groups = np.arange(group_of[-1] + 1)
    right = np.bincount(group_of, correct)
    mixed = groups[(right > 0) & (right < np.bincount(group_of))]
    return int(np.flatnonzero((group_of == mixed[-1]) & correct)[0]) if len(mixed) else 0


def _lead(runs: Sequence[RecordedRun]) -> str:
    experiments = len({run.experiment for run in runs})
    said = [f"{len(runs)} runs of {experiments} settings"] if 1 < experiments < len(runs) else []
    recorded = sum(int(run.tokens.offsets[-1]) for run in runs if run.tokens is not None)
    said.append(f"{recorded:,} tokens recorded" if recorded else "no tokens recorded (logging.record_tokens)")
    return ", ".join(said) + "."


def _run_line(run: RecordedRun) -> str:
    label = f"<b>{html.escape(run.name)}<small>{html.escape(run.method)}</small></b>"
    return f"<li>{label}<span>{html.escape(summary(run))}</span></li>"


def summary(run: RecordedRun) -> str:
    """A run in one sentence."""
    said = []
    if run.metrics:
        said.append(f"{run.metrics[-1]['step']} steps" + (" so far" if run.is_running else ""))
    for metrics, name, scale, unit in (
        (("held_out/solve_rate", "rollout/solve_rate"), "solve rate", 100, "%"),
        (("entropy/mean",), "entropy", 1, "nats"),
    ):
        values = next((values for metric in metrics if len(values := run.series(metric)[1])), None)
        if values is not None:
            said.append(f"{name} {scale * values[0]:.3g} \u2192 {scale * values[-1]:.3g}\u00a0{unit}")
    _, lengths = run.series("response_length/total")
    if len(lengths):
        said.append(f"{int(lengths.sum()):,} tokens")
    if run.tokens is not None:
        said.append(f"{int(run.tokens.group_of[-1]) + 1} groups recorded")
    return " \u00b7 ".join(said)


def _figure(figure: Figure) -> str:
    panels = svg_panels(figure)
    columns = column_count(figure)
    kind = "card of-one" if columns == 1 and not figure.broad else "card"
    heading = f"<h3>{html.escape(figure.title)}</h3><figcaption>{html.escape(figure.caption)}</figcaption>"
    drawn = f'<div class="panels of-{columns}">{"".join(panels)}</div>'
    return f'<figure class="{kind}" id="{figure.name}">{heading}{drawn}</figure>'


def _left_out(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    lines = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f'<div class="left">Not drawn:<ul>{lines}</ul></div>'
