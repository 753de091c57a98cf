"""The page in headless Chromium: it shows the recorded numbers, by mouse and by keyboard, and asks for nothing else."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chromium import CHROMIUM, Page, chromium_page
from recorded_runs import write_run

from eapo_megatron.records.tokens import recorded_steps
from eapo_megatron.report import page as pages
from eapo_megatron.report.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="needs Debian's chromium"),
]

FIRST = "[...document.querySelectorAll('#text .t')]"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "TOKENS_IN_BLOCK", 100)  # many blocks
        runs = [write_run(folder / "eapo"), write_run(folder / "grpo", shaping={"name": "none"})]
        report = write_report(runs, folder / "out")
    rows = [row for path in recorded_steps(runs[0]).values() for row in pq.read_table(path).to_pylist()]
    return report.page, rows


@pytest.fixture(scope="module")
def page(reported: tuple[Path, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium_page(tmp_path_factory.mktemp("profile")) as page:
        page.open(reported[0])
        yield page
        assert page.problems == []


def shown(page: Page) -> dict[str, str]:
    """What the panel says of the chosen token."""
    pairs = page.run(
        "[...document.querySelectorAll('#detail dt')].map(e => [e.textContent, e.nextElementSibling.textContent])"
    )
    return {name: value.replace("\u2212", "-") for name, value in pairs}


def go_to(page: Page, row: int) -> None:
    page.run(f"toRow({row})")


def group_of(rows: list[dict], row: dict) -> np.ndarray:
    members = [other for other in rows if (other["step"], other["group"]) == (row["step"], row["group"])]
    return np.concatenate([np.array(other["entropies"], dtype=np.float64) for other in members])


def check_token(said: dict[str, str], rows: list[dict], row: dict, i: int) -> None:
    entropies = group_of(rows, row)
    before, after = row["advantage"], row["shaped_advantages"][i]
    expected = {
        "entropy H": row["entropies"][i],
        "z in its group": (row["entropies"][i] - entropies.mean()) / entropies.std(),
        "log-prob": row["old_log_probs"][i],
        "probability": math.exp(row["old_log_probs"][i]),
        "sampler\u2019s log-prob": row["rollout_log_probs"][i],
        "mismatch": row["old_log_probs"][i] - row["rollout_log_probs"][i],
        "A": before,
        "shaped A\u1d9c\u1d2c": after,
        "ratio A\u1d9c\u1d2c / A": after / before,
    }
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        # Four decimals, or three digits of what is small; float32 statistics.
        close = pytest.approx(value, abs=6e-5, rel=6e-3 if abs(value) < 1e-3 else 1e-4)
        assert float(said[name].removesuffix(" nats")) == close, name


@pytest.mark.parametrize("number", [0, 13, 47])
def test_hover_shows_the_recorded_numbers(page: Page, reported: tuple[Path, list[dict]], number: int) -> None:
    rows = reported[1]
    go_to(page, number)
    page.wait(f"state.row == {number}")
    row = rows[number]
    assert page.run(f"{FIRST}.map(e => e.textContent).join('')") == "".join(row["texts"])
    assert page.run(f"{FIRST}.map(e => e.classList[1])") == row["quadrants"]
    for i in (0, 3, len(row["texts"]) - 1):
        page.hover(f"#text .t:nth-child({i + 1})")
        page.wait(f"state.now == {i}")
        check_token(shown(page), rows, row, i)


def test_keys_alone_reach_tokens_responses_groups_and_the_search(page: Page, reported: tuple[Path, list[dict]]) -> None:
    rows = reported[1]
    go_to(page, 8)
    page.wait("state.row == 8")
    for _ in range(3):
        page.press("ArrowRight")
    assert page.run("document.activeElement.dataset.i") == "3"
    check_token(shown(page), rows, rows[8], 3)
    page.press("End")
    assert page.run("state.now") == len(rows[8]["texts"]) - 1
    page.press("Home")
    page.press("ArrowLeft")
    assert page.run("state.now") == 0
    for key, row in (("j", 9), ("3", 10), ("k", 9), ("n", 12), ("p", 8)):
        page.press(key)
        page.wait(f"state.row == {row}")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press("Escape")
    assert page.run("document.activeElement.id") != "search"


def test_filters_and_search_leave_what_they_say(page: Page, reported: tuple[Path, list[dict]]) -> None:
    rows = reported[1]

    def passing(**values: str) -> list[int]:
        for name in ("step", "verdict", "reward", "prompt", "search"):
            page.run(f"$('{name}').value = {values.get(name, '')!r}")
        page.run("filter()")
        return page.run("state.list")

    def numbers(passes: object) -> list[int]:
        return [i for i, row in enumerate(rows) if passes(row)]  # type: ignore[operator]

    prompt = rows[20]["prompt"]
    assert passing(verdict="1") == numbers(lambda row: row["reward"] > 0)
    assert passing(step="2", reward="-1") == numbers(lambda row: row["step"] == 2 and row["reward"] == -1)
    assert passing(prompt=prompt) == numbers(lambda row: prompt in row["prompt"])
    text = "".join(rows[5]["texts"])[2:7]
    found = passing(search=text)
    assert found == numbers(lambda row: text in "".join(row["texts"]))
    marked = page.run("[...document.querySelectorAll('#text .hit')].map(e => e.textContent).join('')")
    assert text in marked
    assert passing(search="nowhere in it") == []
    assert page.run("$('empty').hidden") is False
    assert passing() == list(range(len(rows)))


def test_a_phone_has_no_sideways_scroll(page: Page, reported: tuple[Path, list[dict]]) -> None:
    page.open(reported[0], width=390, height=800)
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_the_page_links_to_arxiv_alone_and_loads_nothing(reported: tuple[Path, list[dict]]) -> None:
    text = reported[0].read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {"https://arxiv.org/abs/2604.11056"}
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"<link[^>]+(?!data:)https?|<script[^>]+src=|@import", text)


def test_a_page_that_follows_reloads_to_where_its_reader_was(reported: tuple[Path, list[dict]], tmp_path: Path) -> None:
    run = reported[0].parents[1] / "eapo"
    report = write_report([run], tmp_path / "out", reload_seconds=5)
    with chromium_page(tmp_path / "profile") as page:
        page.open(report.page)
        page.run("$('verdict').value = '1'; filter()")
        go_to(page, 10)
        page.wait("state.row == 10")
        page.press("ArrowRight")
        began = page.run("performance.timeOrigin")
        reloaded = f"performance.timeOrigin != {began} && document.documentElement?.dataset.ready"
        page.wait(f"{reloaded} && (clearInterval(reloading), true)")  # before it reloads once more
        assert page.run("state.row") == 10
        assert page.run("[state.now, $('verdict').value]") == [1, "1"]
        assert page.problems == []


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    (path,) = recorded_steps(run).values()
    table = pq.read_table(path)
    column = table.schema.get_field_index("prompt")
    hostile = "</script><img src=x onerror=console.error(1)>{{data}}"
    pq.write_table(table.set_column(column, table.schema.field("prompt"), pa.array([hostile] * len(table))), path)
    report = write_report([run], tmp_path / "out")
    with chromium_page(tmp_path / "profile") as page:
        page.open(report.page)
        assert page.run("$('prompt-text').textContent") == hostile
        assert page.problems == []
