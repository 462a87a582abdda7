"""The section "Along the answer" in a real browser: when it is there, and what it draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_evaluation.browser import Browser, browser_path
from tests.test_evaluation.png import colours
from tests.test_evaluation.report_folder import ReportFolder, wilson
from tests.test_evaluation.shown_page import Page, click, count, texts

pytestmark = pytest.mark.skipif(
    browser_path() is None, reason="no Chromium or Chrome is installed to show the page in"
)

STRETCHES = 4


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = ReportFolder(stretches=STRETCHES, slow_steps=("observe", "rectify"))
    return Page(folder.write(tmp_path_factory.mktemp("long") / "results"))


def of_length(page: Page, tokens: int) -> list[dict[str, Any]]:
    """The slow-fast rows of one context length."""
    rows = page.results["rows"]
    return [row for row in rows if row["context_tokens"] == tokens and row["policy"] != "dense"]


def value_at(browser: Browser, plot: str, axis: str) -> Any:
    """What a position in a chart stands for, from the two outermost labels of its even axis."""
    anchor = "end" if axis == "y" else "middle"
    ticks = browser.value(
        f"[...document.querySelectorAll('#{plot} svg > g:first-of-type > "
        f"text[text-anchor={anchor}]:not(.axis-title)')]"
        f".map(node => [Number(node.textContent), Number(node.getAttribute('{axis}'))])"
    )
    (low, start), (high, end) = ticks[0], ticks[-1]
    lift = 4 if axis == "y" else 0  # The labels of this axis hang below their lines.
    return lambda at: low + (at - (start - lift)) / (end - start) * (high - low)


def points(browser: Browser, plot: str) -> dict[str, list[tuple[float, float]]]:
    """Positions of the marks by policy, from left to right."""
    found: dict[str, list[tuple[float, float]]] = {}
    marks = browser.value(
        f"[...document.querySelectorAll('#{plot} .point')]"
        ".map(node => [node.getAttribute('aria-label'), node.getAttribute('transform')])"
    )
    for label, transform in marks:
        x, y = map(float, re.findall(r"-?[\d.]+", transform))
        found.setdefault(label.split(":")[0], []).append((x, y))
    return {name: sorted(places) for name, places in found.items()}


# ---------------------------------------------------------------- there or not


@pytest.mark.parametrize("stretches", [None, 1])
def test_short_answers_and_earlier_folders_have_no_such_section(
    browser: Browser, tmp_path: Path, stretches: int | None
) -> None:
    page = Page(ReportFolder(stretches=stretches).write(tmp_path / "results"))
    browser.show(page.address(view="along"))
    assert count(browser, "#along") == 0
    links = texts(browser, ".bar a")
    assert "Along" not in links and {"Accuracy", "Table"} <= set(links)
    assert count(browser, "#plot-slow .point") > 0


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1200, False)])
def test_long_answers_have_one_block_per_length(
    browser: Browser, page: Page, width: int, dark: bool
) -> None:
    browser.show(page.address(view="along"), width=width, dark=dark)
    assert "Along" in texts(browser, ".bar a")
    names = [name for name in texts(browser, "#along h3")]
    assert names == ["office_report, 1,024 tokens", "office_report, 4,096 tokens"]
    assert count(browser, "#along svg") == 4
    assert browser.value("document.documentElement.scrollWidth") <= width
    reached = browser.value("document.querySelector('#along').getBoundingClientRect().top")
    assert abs(reached) < 120, "the address leads there"
    shown = colours(browser.picture("#along-right-0"))
    mark = (255, 148, 61) if dark else (213, 94, 0)
    assert any(
        times > 50 and max(abs(a - b) for a, b in zip(colour, mark, strict=True)) < 26
        for colour, times in shown.items()
    )


def test_rows_without_stretches_are_left_out_of_it(browser: Browser, tmp_path: Path) -> None:
    folder = ReportFolder(stretches=3, lengths=(4096,)).write(tmp_path / "results")
    results = json.loads((folder / "results.json").read_text())
    old = results["rows"][1]
    old["stretches"] = None
    for stretch in results["rows"][2]["stretches"]:
        stretch["dense_output_tokens"] = None
    (folder / "results.json").write_text(json.dumps(results))
    browser.show(Page(folder).address())
    right, length = points(browser, "along-right-0"), points(browser, "along-length-0")
    names = {row["policy"] for row in results["rows"][1:]}
    assert set(right) == names - {old["policy"]}
    assert set(length) == set(right) - {results["rows"][2]["policy"]}


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("block", "tokens"), [(0, 1024), (1, 4096)])
def test_points_bands_and_dense_stand_where_the_data_says(
    browser: Browser, page: Page, block: int, tokens: int
) -> None:
    browser.show(page.address(), width=1200)
    plot = f"along-right-{block}"
    found, rows = points(browser, plot), of_length(page, tokens)
    assert set(found) == {row["policy"] for row in rows}
    thousand, right = value_at(browser, plot, "x"), value_at(browser, plot, "y")
    for row in rows:
        places = found[row["policy"]]
        assert len(places) == STRETCHES
        for (x, y), stretch in zip(places, row["stretches"], strict=True):
            first = stretch["first_token"] / 1000
            assert first < thousand(x) < first + 1
            assert right(y) == pytest.approx(stretch["right"] / stretch["parts"], abs=2e-3)
    bands = browser.value(
        f"[...document.querySelectorAll('#{plot} .band')].map(node => node.getAttribute('d'))"
    )
    for row, band in zip(rows, bands, strict=True):
        edge = [right(float(part.split(",")[1])) for part in band.strip("MZ").split("L")]
        bounds = [wilson(stretch["right"], stretch["parts"]) for stretch in row["stretches"]]
        expected = [high for _, high in bounds] + [low for low, _ in reversed(bounds)]
        assert edge == pytest.approx(expected, abs=2e-3)
    guide = browser.value(f"document.querySelector('#{plot} path.guide').getAttribute('d')")
    level = [right(float(part.split(",")[1])) for part in guide.strip("M").split("L")]
    assert level == pytest.approx([1.0] * STRETCHES, abs=2e-3)


def test_lengths_are_those_of_the_data_over_dense(browser: Browser, page: Page) -> None:
    browser.show(page.address(), width=1200)
    found, length = points(browser, "along-length-1"), value_at(browser, "along-length-1", "y")
    ratios = []
    for row in of_length(page, 4096):
        expected = [stretch["output_tokens"] / 1000 for stretch in row["stretches"]]
        drawn = [length(y) for _, y in found[row["policy"]]]
        assert drawn == pytest.approx(expected, abs=2e-3)
        ratios += expected
    assert max(ratios) > 1.02, "or all marks lie on one line"
    level = browser.value("document.querySelector('#along-length-1 .guide').getAttribute('y1')")
    assert length(float(level)) == pytest.approx(1.0, abs=2e-3)


def test_numbers_stand_below_the_charts(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    rows = [row for row in page.results["rows"] if row["context_tokens"] == 1024]
    cells = texts(browser, "#along .along:first-of-type details tbody td")
    assert cells == [
        f"{stretch['right']} of {stretch['parts']}, {stretch['output_tokens'] / 1000:.2f}"
        for row in rows
        for stretch in row["stretches"]
    ]


# ---------------------------------------------------------------- what can be done with it


def test_chips_and_the_scale_reach_it(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    before = count(browser, "#along-right-0 .point")
    click(browser, "[data-chip='slow_step=rectify']")
    assert count(browser, "#along-right-0 .point") == before // 2 > 0
    click(browser, "[data-chip='context_tokens=1024']")
    blocks = "[...document.querySelectorAll('#along .along')].map(node => node.hidden)"
    assert browser.value(blocks) == [True, False]
    browser.show(page.address(scale="stretched", **{"hide:context_tokens": "1024"}))
    assert browser.value(blocks) == [True, False]
    even = points(browser, "along-right-1")
    click(browser, "[data-chip='context_tokens=1024']")
    assert browser.value(blocks) == [False, False]
    assert count(browser, "#along-right-0 .point") == before, "drawn when it is shown again"
    browser.show(page.address())
    assert points(browser, "along-right-1") != even, "the scale is another"


def test_keys_choose_a_policy_whose_interval_then_stands_alone(
    browser: Browser, page: Page
) -> None:
    browser.show(page.address())
    assert count(browser, "#along-right-0 .band") == len(of_length(page, 1024))
    browser.value("document.querySelector('#along-right-0 .point[tabindex=\"0\"]').focus()")
    label = "document.activeElement.getAttribute('aria-label')"
    first = browser.value(label)
    browser.press("ArrowRight")
    assert browser.value(label) != first
    browser.press("Enter")
    chosen = browser.value("new URLSearchParams(location.hash.slice(1)).get('policy')")
    assert browser.value(label).startswith(f"{chosen}:"), "the focus stays"
    assert count(browser, "#along-right-0 .band") == 1
    assert count(browser, "#along-right-0 .series.chosen") == 1
    assert count(browser, "#along-length-0 .series.chosen") == 1


def test_hovering_tells_the_stretch_and_dense(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    browser.point_at("#along-right-0 .point")
    browser.wait_for("!document.querySelector('#tip').hidden")
    (said,) = texts(browser, "#tip")
    assert "to 1,000 tokens" in said and "16 of 16 parts" in said and "of dense" in said
