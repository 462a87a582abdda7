"""The page in a real browser: what is drawn, what clicks and keys do, and what stays quiet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_evaluation.browser import Browser, browser_path
from tests.test_evaluation.png import colours
from tests.test_evaluation.report_folder import HOSTILE_TOKENS, ReportFolder
from tests.test_evaluation.shown_page import Page, click, count, texts

pytestmark = pytest.mark.skipif(
    browser_path() is None, reason="no Chromium or Chrome is installed to show the page in"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(ReportFolder().write(tmp_path_factory.mktemp("plain") / "results"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(ReportFolder(hostile=True).write(tmp_path_factory.mktemp("hostile") / "results"))


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (820, False), (1600, True)])
def test_every_section_is_drawn_and_fits(
    browser: Browser, page: Page, width: int, dark: bool
) -> None:
    browser.show(page.address(), width=width, dark=dark)
    heights = browser.value(
        "Object.fromEntries([...document.querySelectorAll('section')]"
        ".map(node => [node.id, node.getBoundingClientRect().height]))"
    )
    assert set(heights) == {"summary", "accuracy", "table", "reasons", "recall", "tokens"}
    assert all(height > 150 for height in heights.values()), heights
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in paper.strip("rgb()").split(",")) / 3
    assert brightness < 60 if dark else brightness > 200


def test_pictures_show_marks_maps_and_tokens_in_their_colours(browser: Browser, page: Page) -> None:
    browser.show(page.address(), width=700)
    plot = colours(browser.picture("#plot-slow"))
    for mark in ((0, 114, 178), (213, 94, 0)):
        assert plot[mark] > 100, "the marks of both selectors"
    assert plot[(255, 255, 255)] > sum(plot.values()) / 2
    answer = colours(browser.picture("#answer"))
    assert answer[(207, 227, 245)] > 300 and answer[(251, 220, 195)] > 300, "slow and retry"
    heat = colours(browser.picture(".heat"))
    assert len([colour for colour, times in heat.items() if times > 100]) >= 8


def test_points_heat_cells_and_tokens_are_as_many_as_the_data(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy=page.policies[1]))
    assert count(browser, "#plot-slow .point") == len(page.policies) - 1
    assert count(browser, "#plot-budget .point") == len(page.policies) - 1
    assert count(browser, "#plot-slow .front") <= 1
    measured = [entry for entry in page.read("recall.json")["policies"].values() if entry["layers"]]
    cells = sum(len(entry["layers"]) for entry in measured)
    heads = sum(len(layer) if layer else 4 for layer in measured[0]["layers"])
    assert count(browser, ".heat rect.cell") == cells + heads
    trace = page.read("traces/01.json")
    assert count(browser, "#answer > .t") == len(trace["steps"])
    for kind in ("slow", "retry"):
        expected = sum(step["kind"] == kind for step in trace["steps"])
        assert count(browser, f"#answer > .t.{kind}") == expected > 0
    assert count(browser, "#history-text .t") == len(trace["tokens"])
    reasons = dict(
        text.split(" here")[0].rsplit("start", 1)
        for text in texts(browser, ".reasons button")
        if "start" in text
    )
    assert reasons == {"punctuation: sentence ": "5"}


def test_the_pareto_front_is_that_of_the_folder(browser: Browser, page: Page) -> None:
    browser.show(page.address(**{"hide:slow_step": "verify", "hide:context_tokens": "1024"}))
    rows = [
        row
        for row in page.results["rows"]
        if row["context_tokens"] == 4096 and "observe" in row["policy"]
    ]
    front = [
        row
        for row in rows
        if not any(
            other["slow_share"] <= row["slow_share"]
            and other["share"] >= row["share"]
            and (other["slow_share"], other["share"]) != (row["slow_share"], row["share"])
            for other in rows
        )
    ]
    assert 1 < len(front) < len(rows)
    drawn = browser.value("document.querySelector('#plot-slow .front').getAttribute('d')")
    assert drawn.count("V") + 1 == len(front)
    named = texts(browser, "#plot-slow .label:not(.dense)")
    assert set(named) <= {row["policy"] for row in front} and named


def test_the_table_holds_the_numbers_of_the_folder(browser: Browser, page: Page) -> None:
    browser.show(page.address(rows="task"))
    shown = browser.value(
        "[...document.querySelectorAll('#table tbody tr')].map(row => [row.querySelector('th')"
        ".textContent.trim(), [...row.querySelectorAll('td.number span[title]')].slice(0, 2)"
        ".map(node => node.textContent + '; ' + node.title)])"
    )
    expected = []
    for length in (1024, 4096):
        for row in page.results["rows"]:
            if row["context_tokens"] != length:
                continue
            bounds = f"95 % interval {row['share_low']:.3f} to {row['share_high']:.3f}"
            exact = f"95 % interval {row['exact_low']:.3f} to {row['exact_high']:.3f}"
            cells = [
                f"{row['share']:.3f}; {row['right']} of {row['parts']}; {bounds}",
                f"{row['exact_share']:.3f}; {row['exact']} of {row['answers_given']}; {exact}",
            ]
            expected.append([row["policy"], cells])
    assert sorted(shown) == sorted(expected)


def test_sums_over_rows_are_pooled_counts(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    name = page.policies[1]
    rows = [row for row in page.results["rows"] if row["policy"] == name]
    right, parts = sum(row["right"] for row in rows), sum(row["parts"] for row in rows)
    titles = browser.value(
        "[...document.querySelectorAll('#table tbody tr')].find(row => row.querySelector('th')"
        f".textContent.trim() === {json.dumps(name)}).querySelector('td span[title]').title"
    )
    assert titles.startswith(f"{right} of {parts}; ")


# ---------------------------------------------------------------- what can be done with it


def test_chips_filter_charts_and_table_and_stand_in_the_address(
    browser: Browser, page: Page
) -> None:
    browser.show(page.address())
    before = count(browser, "#plot-slow .point")
    click(browser, "[data-chip='slow_step=verify']")
    verify = sum(policy["slow_step"] == "verify" for policy in page.results["policies"])
    assert count(browser, "#plot-slow .point") == before - verify > 0
    assert count(browser, "#table tbody tr") == len(page.policies) - verify
    address = browser.value("location.href")
    browser.show(address)
    assert count(browser, "#plot-slow .point") == before - verify
    assert browser.value(
        "document.querySelector(\"[data-chip='slow_step=verify']\").getAttribute('aria-pressed')"
    ) == ("false")
    click(browser, "[data-chip='slow_step=verify']")
    assert count(browser, "#plot-slow .point") == before


def test_headers_sort_and_the_search_narrows(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    click(browser, "[data-column=parts] button")
    shares = [float(text) for text in texts(browser, "#table tbody td:nth-of-type(1) span")]
    assert len(shares) == len(page.policies) and shares == sorted(shares, reverse=True)
    click(browser, "[data-column=parts] button")
    shares = [float(text) for text in texts(browser, "#table tbody td:nth-of-type(1) span")]
    assert shares == sorted(shares)
    sort = "document.querySelector('[data-column=parts]').getAttribute('aria-sort')"
    assert browser.value(sort) == "ascending"
    browser.show(page.address(q="kl_fusion 512"))
    names = texts(browser, "#table tbody th")
    assert names and all("kl_fusion" in name and "512" in name for name in names)


def test_hovering_a_point_tells_its_numbers(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    browser.point_at("#plot-slow .point")
    browser.wait_for("!document.querySelector('#tip').hidden")
    (said,) = texts(browser, "#tip")
    assert "accuracy" in said and "slow share" in said
    assert any(name in said for name in page.policies)


def test_keys_move_between_points_and_choose_a_policy(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    browser.value("document.querySelector('#plot-slow .point[tabindex=\"0\"]').focus()")
    label = "document.activeElement.getAttribute('aria-label')"
    first = browser.value(label)
    browser.press("ArrowRight")
    second = browser.value(label)
    assert first != second and second.startswith(tuple(page.policies))
    browser.press("Enter")
    chosen = browser.value("new URLSearchParams(location.hash.slice(1)).get('policy')")
    assert chosen in page.policies and second.startswith(f"{chosen}:")
    assert browser.value(label) == second, "the focus stays"
    selected = texts(browser, "#table tr[aria-selected=true] th")
    assert [name.strip() for name in selected] == [chosen]


def selected_positions(browser: Browser) -> dict[int, int]:
    """Positions that are marked in the history, with their level."""
    found: list[list[int]] = browser.value(
        "[...document.querySelectorAll('#history-text .t')].map((node, position) => [position,"
        "Number((node.className.match(/\\bs(\\d)\\b/) || [0, 0])[1])]).filter(pair => pair[1])"
    )
    return {position: level for position, level in found}


def expected_levels(runs: list[list[int]], most: int) -> dict[int, int]:
    """The same from the folder: six levels, upwards of nothing."""
    return {
        position: min(6, -(-6 * times // most))
        for start, length, times in runs
        for position in range(start, start + length)
    }


def test_a_click_on_a_slow_step_shows_its_selection(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy=page.policies[1]))
    trace = page.read("traces/01.json")
    refresh = trace["refreshes"][3]
    click(browser, f"#answer [data-step='{refresh['step']}']")
    total = refresh["selected_heads_total"]
    assert selected_positions(browser) == expected_levels(refresh["union"], total)
    browser.show(page.address(policy=page.policies[1], step=refresh["step"], layer=2))
    layer = refresh["layers"]["2"]
    assert selected_positions(browser) == expected_levels(layer, trace["kv_heads"])
    later = len(trace["tokens"]) - refresh["history_tokens"]
    assert count(browser, "#history-text .later") == later
    assert count(browser, "#history-text .sink") == trace["sink_tokens"]
    assert count(browser, "#history-text .recent") == trace["recent_tokens"]
    (title,) = texts(browser, "#history h3")
    assert (
        f"token {refresh['step'] + 1} " in title
        and trace["steps"][refresh["step"]]["reason"] in title
    )


def test_the_map_is_coloured_where_tokens_were_selected(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy=page.policies[1]), width=900)
    trace = page.read("traces/01.json")
    lines = len(trace["refreshes"])
    width, rows = browser.value(
        "(() => { const map = document.querySelector('#history .map');"
        "const { width, height } = map;"
        "const pixels = map.getContext('2d').getImageData(0, 0, width, height).data;"
        f"return [width, [...Array({lines}).keys()].map(row => {{"
        f"const start = 4 * width * Math.floor((row + 0.5) * height / {lines});"
        "return [...Array(width).keys()].filter(x => pixels[start + 4 * x + 3] > 60 &&"
        "pixels[start + 4 * x] > 2 * pixels[start + 4 * x + 2]); })]; })()"
    )
    per = len(trace["tokens"]) / width
    assert len(rows) == len(trace["refreshes"]) > 3
    for columns, refresh in zip(rows, trace["refreshes"], strict=True):
        expected = {
            column
            for start, length, _ in refresh["union"]
            for column in range(
                int(start / per), min(width - 1, int((start + length - 1) / per)) + 1
            )
        }
        line = round(trace["prompt_tokens"] / per)
        assert set(columns) - {0, width - 1} == expected - {line, 0, width - 1}


def test_reasons_filter_the_list_of_slow_steps(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy=page.policies[1], reason="entropy"))
    trace = page.read("traces/01.json")
    retries = [index for index, step in enumerate(trace["steps"]) if step["kind"] == "retry"]
    listed = browser.value(
        "[...document.querySelectorAll('.steps [data-listed]')].map(node => +node.dataset.listed)"
    )
    assert listed == retries
    assert count(browser, "#answer > .kept") == len(retries)


def test_dense_has_no_selection_and_says_so(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy="dense"))
    assert count(browser, "#history-text") == 0
    assert "reads the whole history" in "".join(texts(browser, "#history"))
    assert count(browser, "#answer > .t.slow") == 60


def test_what_was_not_traced_or_measured_is_called_so(browser: Browser, page: Page) -> None:
    browser.show(page.address(policy=page.policies[-1]))
    assert "was traced" in "".join(texts(browser, "#tokens .empty"))
    assert "not measured for this policy" in "".join(texts(browser, "#recall .empty"))
    assert "no fast step" in "".join(texts(browser, "#recall"))


def test_a_folder_of_results_alone_is_shown_without_inventing(
    browser: Browser, tmp_path: Path
) -> None:
    folder = ReportFolder().write(tmp_path / "results")
    (folder / "recall.json").unlink()
    for file in folder.glob("traces/*.json"):
        file.unlink()
    data = json.loads((folder / "results.json").read_text())
    nothing = ("right", "parts", "exact", "answers_given", "slow_share", "generated_tokens")
    for row in data["rows"]:
        if row["policy"] == data["policies"][2]["name"]:
            row.update({name: None for name in nothing}, cases=0, failed=3, reasons=None)
    data["rows"][1].update({name: None for name in nothing}, cases=0, reasons=None)
    (folder / "results.json").write_text(json.dumps(data))
    page = Page(folder)
    browser.show(page.address())
    assert count(browser, "#plot-slow .point") == len(page.policies) - 2
    for section, said in (("recall", "not measured"), ("tokens", "No run was traced")):
        assert said in "".join(texts(browser, f"#{section} .empty"))
    words = browser.value("document.body.innerText")
    assert not {"null", "NaN", "undefined", "Infinity"} & set(words.split())


def test_printing_leaves_controls_out(browser: Browser, page: Page) -> None:
    browser.show(page.address())
    browser.call("Emulation.setEmulatedMedia", media="print")
    bar, box = browser.value(
        "[getComputedStyle(document.querySelector('.bar')).display,"
        "getComputedStyle(document.querySelector('#answer')).maxHeight]"
    )
    browser.call("Emulation.setEmulatedMedia", media="")
    assert (bar, box) == ("none", "none")


# ---------------------------------------------------------------- texts that want to break out


@pytest.mark.parametrize("policy", [1, 2])
def test_hostile_texts_are_shown_and_do_nothing(
    browser: Browser, hostile: Page, policy: int
) -> None:
    browser.show(hostile.address(policy=hostile.policies[policy]))
    assert browser.value("typeof window.broken") == "undefined"
    assert count(browser, "main img, main i:not(.track i, .legend i), main b:not(.tile b)") == 0
    shown = "".join(texts(browser, "#history-text .t"))
    for token in HOSTILE_TOKENS:
        if token.isprintable() and token:
            assert token in shown
    for visible in (
        "‹U+202E›",
        "‹NUL›",
        "‹ESC›[31m",
        "⏎",
        "⇥",
        "∅",
        "‹U+200B›",
        "‹U+2028›",
        "‹CR›",
    ):
        assert visible in shown, visible
    assert "\u202e" not in shown and "\x00" not in shown
    titles = texts(browser, "h1")
    assert titles == [f"Selectors {HOSTILE_TOKENS[0]}"]


def test_a_hostile_address_changes_nothing(browser: Browser, page: Page) -> None:
    state = {
        "policy": "<img src=x onerror=alert(1)>",
        "view": "'];alert(1)//",
        "step": "-1",
        "layer": "99",
        "sort": "nothing.up",
        "theme": "plaid",
        "colour": "__proto__",
        "hide:context_tokens": "%E0%A4%A|7",
        "hide:slow_step": "nothing",
        "metric": "constructor",
    }
    browser.show(page.address(**state))
    assert count(browser, "main img") == 0
    assert count(browser, "#table tbody tr") == len(page.policies)


# ---------------------------------------------------------------- long histories


def test_a_long_history_stays_quick(browser: Browser, tmp_path: Path) -> None:
    folder = ReportFolder(prompt_tokens=8_192, answer_tokens=240, budgets=(512,))
    page = Page(folder.write(tmp_path / "results"))
    assert page.file.stat().st_size < 2_000_000
    browser.show(page.address())
    spent = browser.value(
        "(async () => { const spent = []; for (let times = 0; times < 8; times += 1) {"
        "const began = performance.now();"
        "[...document.querySelectorAll('#history button')].find(node => "
        "node.textContent.includes('later')).click();"
        "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"
        "spent.push(performance.now() - began); } return spent; })()"
    )
    assert count(browser, "#history-text .t") == 8_192 + 240
    assert sorted(spent)[len(spent) // 2] < 400, f"milliseconds per change of step: {spent}"
