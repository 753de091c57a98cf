"""Figures from the token records: histograms of entropies and advantages, words, and a response with its shades."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from eapo_megatron.algorithms import QUADRANTS
from eapo_megatron.report.figures import QUADRANT_COLOURS, QUADRANT_HATCHES, Experiment, Figure, Panel
from eapo_megatron.report.recordings import Tokens

_BINS = 48
_WORDS = 15  # on either side
_WORD = re.compile(r"<\|?\w+\|?>|\w+|[^\w\s]")  # a special token is one word
_MOST_TOKENS = 200_000  # that words are read from
_COLUMNS, _ROWS = 92, 14  # of a response that is drawn
_SHOWN_METHODS = 6

NO_RECORDS = "no run has token records (logging.record_tokens)"


def recorded_tokens(experiments: Sequence[Experiment]) -> list[Tokens]:
    """The token records of all runs that have some."""
    return [run.tokens for e in experiments for run in e.runs if run.tokens is not None]


def entropy_histograms(experiments: Sequence[Experiment]) -> Figure | str:
    """Entropies of the tokens of correct and of incorrect responses, split in low and high (Figure 4)."""
    recorded = recorded_tokens(experiments)
    if not recorded:
        return f"entropy histograms: {NO_RECORDS}"
    entropies = np.concatenate([tokens.entropies for tokens in recorded])
    quadrants = np.concatenate([tokens.quadrants for tokens in recorded])
    panels = [
        Panel("Correct responses", partial(_draw_entropies, entropies, quadrants, ("plr", "phr"))),
        Panel("Incorrect responses", partial(_draw_entropies, entropies, quadrants, ("nlr", "nhr"))),
    ]
    high = np.isin(quadrants, [QUADRANTS.index("phr"), QUADRANTS.index("nhr")]).mean()
    caption = (
        f"Most tokens are nearly certain; {100 * high:.0f} % lie in a high-entropy quadrant. Counts on a log scale. "
        "Low and high overlap because each prompt's group has its own threshold."
    )
    return Figure("entropy_histograms", "Entropy of tokens", caption, panels)


def advantage_histograms(experiments: Sequence[Experiment]) -> Figure | str:
    """Token advantages before and after the shaping, one panel a method (Figure 8)."""
    panels = [
        Panel(experiment.label, partial(_draw_advantages, tokens))
        for experiment in experiments
        if (tokens := recorded_tokens([experiment]))
    ]
    if not panels:
        return f"advantage histograms: {NO_RECORDS}"
    caption = (
        "How far a method moves the advantages of tokens. The line is the group advantage, equal for all tokens of a "
        "response; the filled part is what training used. Counts are on a log scale."
    )
    return Figure("advantages", "Advantages of tokens", caption, panels[:_SHOWN_METHODS])


def words(experiments: Sequence[Experiment]) -> Figure | str:
    """The words with the highest and the lowest mean entropy (Figures 9 and 10)."""
    recorded = recorded_tokens(experiments)
    if not recorded:
        return f"words: {NO_RECORDS}"
    ranked = word_entropies(recorded)
    if len(ranked) < 2:
        return "words: the recorded responses have no word often enough"
    count = min(_WORDS, len(ranked) // 2)
    panels = [
        Panel("Highest mean entropy (nats)", partial(_draw_words, ranked[:count], QUADRANT_COLOURS["nhr"])),
        Panel("Lowest mean entropy (nats)", partial(_draw_words, ranked[::-1][:count], QUADRANT_COLOURS["plr"])),
    ]
    caption = "Words at which the policy chooses, and words that follow from what is already there."
    return Figure("words", "Words where the policy hesitates", caption, panels, height=0.19 * count + 0.75)


def shaded_response(experiments: Sequence[Experiment]) -> Figure | str:
    """A correct and an incorrect response to one prompt, each token shaded by its entropy (Figure 11)."""
    recorded = recorded_tokens(experiments)
    if not recorded:
        return f"two responses: {NO_RECORDS}"
    for tokens in reversed(recorded):
        group_of, correct = tokens.group_of, tokens.correct
        for group in range(int(group_of[-1]), -1, -1):
            rows = np.flatnonzero(group_of == group)
            if 0 < correct[rows].sum() < len(rows):
                pair = (int(rows[correct[rows]][0]), int(rows[~correct[rows]][0]))
                top = float(np.quantile(tokens.entropies, 0.99))
                panels = [
                    Panel(title, partial(_draw_response, tokens, row, top))
                    for title, row in zip(("Correct", "Incorrect"), pair, strict=True)
                ]
                caption = f"Step {tokens.steps[pair[0]]}: {tokens.prompts[pair[0]][:200]}"
                height = 0.24 * max(_rows_of(tokens, row) for row in pair) + 0.5
                return Figure("response", "Two responses", caption, panels, broad=True, on_page=False, height=height)
    return "two responses: no recorded group has a correct and an incorrect one"


def word_entropies(recorded: Sequence[Tokens]) -> list[tuple[str, float, int]]:
    """Words with the mean entropy (nats) of their tokens and how often they occur, the highest entropy first.

    A word that is spread over tokens counts with the mean of these. Words that are rare are left out: the mean of a few
    says little.
    """
    found: dict[str, list[float]] = {}
    total = sum(int(tokens.offsets[-1]) for tokens in recorded)
    every = -(-total // _MOST_TOKENS)
    for tokens in recorded:
        for row in range(0, len(tokens), every):
            begin, end = tokens.offsets[row], tokens.offsets[row + 1]
            texts = [tokens.texts[i] for i in tokens.text_of[begin:end]]
            ends = np.cumsum([len(text) for text in texts])
            for match in _WORD.finditer("".join(texts)):
                first = np.searchsorted(ends, match.start(), side="right")
                last = np.searchsorted(ends, match.end() - 1, side="right")
                if not match[0].isprintable():
                    continue  # XML, and so SVG, cannot hold it
                mean = float(tokens.entropies[begin + first : begin + last + 1].mean())
                found.setdefault(match[0], []).append(mean)
    least = max(5, sum(map(len, found.values())) // 2000)
    ranked = [(word, float(np.mean(values)), len(values)) for word, values in found.items() if len(values) >= least]
    return sorted(ranked, key=lambda entry: -entry[1])


def _draw_entropies(entropies: np.ndarray, quadrants: np.ndarray, names: tuple[str, str], axis: Axes) -> None:
    bins = np.linspace(0, max(float(entropies.max(initial=0)), 1e-6), _BINS + 1).tolist()
    for name in names:
        values = entropies[quadrants == QUADRANTS.index(name)]
        axis.hist(
            values,
            bins=bins,
            color=QUADRANT_COLOURS[name],
            alpha=0.75,
            hatch=QUADRANT_HATCHES[name],
            label=name.upper(),
            log=True,
        )
    axis.set_xlabel("entropy (nats)")
    _count_axis(axis)


def _count_axis(axis: Axes) -> None:
    """A log scale with plain numbers: text is never read as a formula here."""
    axis.set_ylabel("tokens")
    axis.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_advantages(recorded: Sequence[Tokens], axis: Axes) -> None:
    before = np.concatenate([tokens.advantages[tokens.row_of] for tokens in recorded])
    after = np.concatenate([tokens.shaped_advantages for tokens in recorded])
    reach = max(float(np.abs(before).max(initial=0)), float(np.abs(after).max(initial=0)), 1e-6)
    bins = np.linspace(-reach, reach, 2 * _BINS + 1).tolist()
    axis.hist(after, bins=bins, color=QUADRANT_COLOURS["plr"], label="as trained", log=True)
    axis.hist(before, bins=bins, color="#D55E00", histtype="step", linewidth=1.2, label="before shaping", log=True)
    axis.set_xlabel("advantage")
    _count_axis(axis)


def _draw_words(ranked: Sequence[tuple[str, float, int]], colour: str, axis: Axes) -> None:
    places = range(len(ranked))
    axis.barh(places, [mean for _, mean, _ in ranked], color=colour, height=0.7)
    axis.set_yticks(places, [word for word, _, _ in ranked], family="monospace")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def _places(tokens: Tokens, row: int) -> list[tuple[int, str, int, int]]:
    """The response's characters on a grid: (token, character, line, column)."""
    line = column = 0
    found: list[tuple[int, str, int, int]] = []
    for token in range(int(tokens.offsets[row]), int(tokens.offsets[row + 1])):
        for character in tokens.texts[tokens.text_of[token]]:
            if character == "\n" or column == _COLUMNS:
                line, column = line + 1, 0
            if line == _ROWS:
                return found
            if character != "\n":
                found.append((token, character, line, column))
                column += 1
    return found


def _rows_of(tokens: Tokens, row: int) -> int:
    return max((line for _, _, line, _ in _places(tokens, row)), default=0) + 1


def _draw_response(tokens: Tokens, row: int, top: float, axis: Axes) -> None:
    places = _places(tokens, row)
    for token, character, line, column in places:
        colour = to_rgb(QUADRANT_COLOURS[QUADRANTS[tokens.quadrants[token]]])
        shade = 0.05 + 0.62 * min(float(tokens.entropies[token]) / top, 1.0)
        axis.add_patch(Rectangle((column, line), 1, 1, color=(*colour, shade), linewidth=0))
        shown = character if character.isprintable() else "\u00b7"
        axis.text(column + 0.5, line + 0.55, shown, ha="center", va="center", family="monospace", fontsize=8)
    axis.set_xlim(0, max(_COLUMNS * 2 // 3, max((column for *_, column in places), default=0) + 1))
    axis.set_ylim(max((line for _, _, line, _ in places), default=0) + 1, 0)
    axis.axis("off")
