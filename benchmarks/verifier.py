"""The mathematical reward on real references: right answers in other spellings, wrong answers close to right ones.

    python -m benchmarks.verifier --data DIR [--against CHECKOUT]

DIR holds test_math500, test_aime24, test_amc, test_minerva, test_olympiad and train_math .json ("answer": text, a
number or a list of either). Right: every answer of the five test files must verify when it is boxed in a sentence, and
in each of five other spellings. Wrong: no reference of the six files may accept a mutation of itself that changes its
value; whether it does is decided by `benchmarks.latex_values`, which shares no code with the reward. Speed: responses
a second of a pool of two workers, beside that of another checkout in turns.
"""

# ruff: noqa: RUF001 - characters that look like others are among the spellings

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.latex_values import values_of
from benchmarks.measuring import circumstances
from eapo_megatron.rewards import math_reward

TESTS = ["test_math500", "test_aime24", "test_amc", "test_minerva", "test_olympiad"]
TRAINING = "train_math"
TURNS = 5

SPEED = """
import json, sys, time
from eapo_megatron.rewards import RewardPool
responses, answers = json.load(sys.stdin)
with RewardPool(num_workers=2, timeout_seconds=20.0) as pool:
    pool.score(responses[:200], answers[:200])
    start = time.perf_counter()
    batch = pool.score(responses, answers)
    seconds = time.perf_counter() - start
assert batch.timeouts + batch.crashes == 0
print(len(responses) / seconds)
"""


def references(folder: Path, name: str) -> list[list[str]]:
    """The accepted answers of each record that has any."""
    records = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    answers = [record["answer"] if isinstance(record["answer"], list) else [record["answer"]] for record in records]
    texts = [
        [str(answer).removesuffix(".0").strip() for answer in accepted if answer is not None] for accepted in answers
    ]
    return [kept for accepted in texts if (kept := [text for text in accepted if text])]


def boxed(answer: str) -> str:
    return rf"Adding the two cases we find that the answer must be $\boxed{{{answer}}}$."


def respelled(answer: str) -> dict[str, str]:
    """Five responses that give `answer` in other words, by the name of the rewriting."""
    sizes = answer.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "")
    sizes = re.sub(r"(?<!\\)([(\[])", r"\\left\1", sizes)
    sizes = re.sub(r"(?<!\\)([)\]])", r"\\right\1", sizes) if sizes.count("\\left") else sizes
    unicode = re.sub(r"\\pi(?![a-z])", "π", answer.replace("-", "−").replace(r"^\circ", "°").replace(r"^{\circ}", "°"))
    for latex, character in ((r"\infty", "∞"), (r"\cup", "∪"), (r"\times", "×"), (r"\cdot", "·"), (r"\pm", "±")):
        unicode = re.sub(re.escape(latex) + "(?![a-zA-Z])", character, unicode)
    return {
        "sizes, spaces": boxed(r"\," + sizes.replace(", ", r",\ ") + r"\!"),
        "Unicode": boxed("\u200b" + unicode + "\u00a0"),
        "Answer: ...": f"Adding the two cases.\n\n**Answer:** {answer if '$' in answer else f'${answer}$'}",
        "after thinking": rf"<think>First I had \boxed{{-7919}} or so.</think>So \boxed{{{answer}}} it is.",
        "another form": boxed(other_form(answer)),
    }


def other_form(answer: str) -> str:
    """Another expression of the same value: doubled over two, another order, braces."""
    parts = top_level(answer.replace("$", ""))
    if len(parts) > 1:
        return ", ".join(reversed(parts))
    if based := re.fullmatch(r"(\d+)_\{?(\d+)\}?", answer):
        return f"{based[1]}_{{{based[2]}}}"
    value = values_of(answer)
    if (
        value is not None
        and len(value) == 1
        and "=" not in answer
        and not re.search(r"[%:\[\]]|text|mbox|circ", answer)
    ):
        return rf"\frac{{2 \left({answer.strip('$')}\right)}}{{2}}"
    return answer.replace("+", " + ").replace("=", " = ").replace(r"\mbox", r"\text")


def top_level(text: str) -> list[str]:
    """Comma-separated parts outside of brackets, unless the commas group digits."""
    if re.fullmatch(r"\D*\d{1,3}(,(\\!)?\s?\d{3}|\{,\}\d{3})+\D*", text) or "text" in text:
        return [text]
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        parts = [*parts, ""] if character == "," and depth == 0 else [*parts[:-1], parts[-1] + character]
    return [part.strip() for part in parts]


def mutations(answer: str) -> Iterator[tuple[str, str]]:
    """Answers that are close to `answer`, by the kind of the change.

    Letters are reversed in words, in runs of capitals and in runs of three and more: two small letters are a product.
    """
    plain = answer.replace("$", "")
    if based := re.search(r"_\{?(\d+)\}?$", plain):
        for step in (1, -1):
            yield "other base", plain[: based.start(1)] + str(int(based[1]) + step) + plain[based.end(1) :]
    letters = [
        match
        for match in re.finditer(r"\\[a-zA-Z]+(?:\{[a-z]*(?:matrix|array)\})?|[a-zA-Z]+", plain)
        if match[0][0] != "\\"
    ]
    if letters:
        end = letters[-1].end()
        yield "last letter dropped", plain[: end - 1] + plain[end:]
    for match in letters:
        if match[0] != match[0][::-1] and (len(match[0]) > 2 or match[0].isupper()):
            yield "letters reversed", plain[: match.start()] + match[0][::-1] + plain[match.end() :]
    digits = [match.start() for match in re.finditer(r"\d", plain)]
    for position in {*digits[:1], *digits[-1:], *digits[len(digits) // 2 : len(digits) // 2 + 1]}:
        yield "digit changed", plain[:position] + str((int(plain[position]) + 1) % 10) + plain[position + 1 :]
    if digits and not letters:
        yield "zero with a unit", r"0 \text{ m}"
        yield "zero with a unit", r"0.0\,\mathrm{m}"
    for match in re.finditer(r"\^\{?(-?\d+)|(?<=\d)e(-?\d+)", plain):
        group = 1 if match[1] else 2
        for step in (1, -1):
            changed = str(int(match[group]) + step)
            if group == 1 and "{" not in match[0]:
                changed = "{" + changed + "}"
            yield "exponent changed", plain[: match.start(group)] + changed + plain[match.end(group) :]
    yield "sign changed", plain[1:] if plain.startswith("-") else "-" + plain
    for match in re.finditer(r"(?<=[\w)}\s])[+-](?=\s?[\w(\\])", plain):
        yield "sign changed", plain[: match.start()] + ("-" if match[0] == "+" else "+") + plain[match.end() :]


def changes_the_value(mutation: str, answer: str) -> bool:
    """Whether they differ at some point, or where either has no value there, in their text.

    Texts that differ by what does not show (\\phantom), by the s of a plural or by the unit of a zero say the same.
    """
    texts = [_shown(text) for text in (mutation, answer)]
    if texts[0] == texts[1] or (answer == "0" and re.match(r"0(\.0)?\D", mutation)):
        return False
    values = values_of(mutation), values_of(answer)
    return values[0] is None or values[1] is None or values[0] != values[1]


def _shown(text: str) -> str:
    text = re.sub(r"\\phantom\s*.", "", text.replace("$", ""))
    return re.sub(r"(?<=\w)s(\.?\})", r"\1", text) if re.search(r"\d.*\\(?:text|mbox)", text) else text


def right_answers(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"answers": 0, "boxed": 0, "rewritings": {}, "refused": []}
    for name in TESTS:
        for accepted in references(folder, name):
            results["answers"] += 1
            results["boxed"] += all(math_reward(boxed(answer), accepted) == 1.0 for answer in accepted)
            for way, response in respelled(accepted[0]).items():
                verified = math_reward(response, accepted) == 1.0
                results["rewritings"][way] = results["rewritings"].get(way, 0) + verified
                if not verified:
                    results["refused"].append([name, way, response, accepted])
    return results


def wrong_answers(folder: Path) -> dict[str, Any]:
    everything = {text for name in [*TESTS, TRAINING] for accepted in references(folder, name) for text in accepted}
    results: dict[str, Any] = {"references": len(everything), "kinds": {}, "paid": []}
    for reference in sorted(everything):
        for kind, mutation in set(mutations(reference)):
            count = results["kinds"].setdefault(kind, {"mutations": 0, "value_unchanged": 0, "paid": 0})
            count["mutations"] += 1
            if not changes_the_value(mutation, reference):
                count["value_unchanged"] += 1
            elif math_reward(boxed(mutation), reference) == 1.0:
                count["paid"] += 1
                results["paid"].append([kind, mutation, reference])
    return results


def speed(folder: Path, checkouts: dict[str, Path]) -> dict[str, Any]:
    """Responses a second by checkout, in turns: half of the answers right, half those of another problem."""
    accepted = [each for name in TESTS for each in references(folder, name)]
    answers = [each for each in accepted for _ in range(2)]
    responses = [
        boxed(text)
        for each, other in zip(accepted, [*accepted[1:], accepted[0]], strict=True)
        for text in (each[0], other[0])
    ]
    work = json.dumps([responses, answers])
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(TURNS):
        for name, checkout in checkouts.items():
            done = subprocess.run(
                [sys.executable, "-c", SPEED],
                input=work,
                env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
                cwd=checkout,
                check=True,
                capture_output=True,
                text=True,
            )
            rates[name].append(float(done.stdout))
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    return {"responses": len(responses), "responses_per_second": medians, "all": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="another checkout, whose pool is timed in turns with this one's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verifier.json"))
    arguments = parser.parse_args()
    checkouts = {"this": Path(__file__).parents[1]} | ({"other": arguments.against} if arguments.against else {})
    right, wrong = right_answers(arguments.data), wrong_answers(arguments.data)
    rates = speed(arguments.data, checkouts)
    record = {**circumstances(), "right": right, "wrong": wrong, "speed": rates}
    arguments.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    table = Table("right answers", "verified", "of", title="The five test files")
    for way, verified in {"boxed in a sentence": right["boxed"], **right["rewritings"]}.items():
        table.add_row(way, str(verified), str(right["answers"]))
    Console().print(table)
    table = Table("mutation", "made", "value unchanged", "paid", title=f"{wrong['references']} references")
    for kind, count in wrong["kinds"].items():
        table.add_row(kind, *map(str, count.values()))
    Console().print(table)
    table = Table("pool of two workers", "responses a second")
    for name, rate in rates["responses_per_second"].items():
        table.add_row(name, f"{rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
