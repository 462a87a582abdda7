"""What the page reads from a results folder, what it keeps of it, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.errors import InputError
from sfi_agent.evaluation.report import write_report
from sfi_agent.evaluation.report.folder import read_folder
from sfi_agent.evaluation.report.folder_format import Trace
from sfi_agent.evaluation.report.page_data import Limits, page_data, trace_data
from sfi_agent.evaluation.report.runs_code import pack_runs, unpack_runs
from tests.test_evaluation.report_folder import ReportFolder

# ---------------------------------------------------------------- packing


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(1, 9_000), st.integers(1, 2_048))))
def test_runs_come_back_as_they_were(gaps: list[tuple[int, int, int]]) -> None:
    runs, end = [], 0
    for gap, length, count in gaps:
        runs.append((end + gap, length, count))
        end += gap + length
    assert unpack_runs(pack_runs(runs)) == runs


def test_packing_is_small() -> None:
    scattered = [(position, 1, 3) for position in range(0, 8_192, 4)]
    assert len(pack_runs(scattered)) <= 4 * len(scattered)


# ---------------------------------------------------------------- what the page carries


def test_rows_policies_and_recall_are_carried_unchanged(tmp_path: Path) -> None:
    folder = read_folder(ReportFolder().write(tmp_path / "results"))
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    data = page_data(folder)
    names = [policy["name"] for policy in data["policies"]]
    assert names == [policy["name"] for policy in written["policies"]]
    for row, original in zip(data["rows"], written["rows"], strict=True):
        assert names[row.pop("policy")] == original["policy"]
        for kept, stretch in zip(row.pop("stretches"), original["stretches"], strict=True):
            assert kept == {name: stretch[name] for name in kept} and "parts" in kept
        assert row == {name: original[name] for name in row}
    assert data["stretch_tokens"] == written["stretch_tokens"] == 1000
    recall = json.loads((tmp_path / "results" / "recall.json").read_text())["policies"]
    for entry in data["recall"]["policies"]:
        original = recall[names[entry["policy"]]]
        assert entry["mean"] == original["mean"]
        if original["layers"] is None:
            assert entry["layers"] is None and entry["reason"] == "no fast step"
            continue
        for kept, layer in zip(entry["layers"], original["layers"], strict=True):
            assert kept == (None if layer is None else pytest.approx(layer, abs=1e-4))


def test_a_trace_is_carried_whole_where_it_fits(tmp_path: Path) -> None:
    folder = read_folder(ReportFolder().write(tmp_path / "results"))
    for trace, kept in zip(folder.traces, trace_data(folder.traces, Limits()), strict=True):
        assert kept["texts"] == [[0, trace.tokens]]
        assert kept["history_tokens"] == len(trace.tokens)
        for step, numbers in zip(trace.steps, kept["steps"], strict=True):
            kind = ("fast", "slow", "retry")[numbers[1]]
            assert (numbers[0], kind, kept["reasons"][numbers[2]]) == (
                step.position,
                step.kind,
                step.reason,
            )
        for refresh, packed in zip(trace.refreshes, kept["refreshes"], strict=True):
            assert unpack_runs(packed["union"]) == refresh.union
            assert {int(layer): unpack_runs(text) for layer, text in packed["layers"].items()} == (
                refresh.layers
            )


def a_trace(tmp_path: Path, **options: Any) -> Trace:
    folder = read_folder(ReportFolder(**options).write(tmp_path / "results"))
    return folder.traces[1]


@pytest.mark.parametrize("limit", [60, 120, 440])
def test_long_histories_keep_beginning_end_and_what_was_selected(
    tmp_path: Path, limit: int
) -> None:
    trace = a_trace(tmp_path)
    limits = Limits(history_tokens=limit, head_tokens=10, tail_tokens=30)
    (kept,) = trace_data([trace], limits)
    shown = {
        start + index: text for start, texts in kept["texts"] for index, text in enumerate(texts)
    }
    total = len(trace.tokens)
    assert kept["history_tokens"] == total > limit >= len(shown)
    assert all(trace.tokens[position] == text for position, text in shown.items())
    assert {*range(10), *range(total - 30, total)} <= set(shown)
    selected = {
        position
        for refresh in trace.refreshes
        for start, length, _ in refresh.union
        for position in range(start, start + length)
    }
    wanted = selected | {*range(10), *range(total - 30, total)}
    # Where there is no room for all, the first ones stand.
    last = max(position for position in shown if position < total - 30)
    missed = wanted - set(shown)
    assert all(position > last for position in missed)
    assert bool(missed) == (len(wanted) > limit)
    ends = [start + len(texts) for start, texts in kept["texts"]]
    starts = [start for start, _ in kept["texts"]]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


def test_selections_are_thinned_evenly_when_they_are_too_many(tmp_path: Path) -> None:
    trace = a_trace(tmp_path, answer_tokens=120)
    (whole,) = trace_data([trace], Limits())
    (thin,) = trace_data([trace], Limits(selection_characters=900))
    size = sum(
        len(refresh["union"]) + sum(map(len, refresh["layers"].values()))
        for refresh in thin["refreshes"]
    )
    assert size <= 900 and 2 <= len(thin["refreshes"]) < len(whole["refreshes"])
    assert thin["refreshes"][0] == whole["refreshes"][0]
    assert thin["refreshes"][-1] == whole["refreshes"][-1]
    assert thin["refreshes_total"] == trace.slow_steps_total
    (none,) = trace_data([trace], Limits(selection_characters=0))
    assert none["refreshes"] == []


# ---------------------------------------------------------------- folders that cannot be shown

Damage = Callable[[Path], object]


def rewrite(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A damage that changes the content of a file."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def cut(name: str) -> Damage:
    """A damage that leaves half of a file."""
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:700])


REFUSED: dict[str, tuple[Damage, str]] = {
    "no summary": (lambda folder: (folder / "results.json").unlink(), "results.json"),
    "half a summary": (cut("results.json"), r"results\.json.*damaged"),
    "half a trace": (cut("traces/01.json"), r"traces/01\.json.*damaged"),
    "half a recall": (cut("recall.json"), r"recall\.json.*damaged"),
    "not UTF-8": (
        lambda folder: (folder / "recall.json").write_bytes(b'{"format": "\xff"}'),
        r"recall\.json.*damaged",
    ),
    "a list": (lambda folder: (folder / "results.json").write_text("[1]"), "got a list"),
    "another format": (
        rewrite("results.json", lambda data: data.update(format=2)),
        "got format 2.*format 1 is read",
    ),
    "a missing key": (
        rewrite("results.json", lambda data: data["rows"][0].pop("parts")),
        r"rows\.0\.parts: Field required",
    ),
    "a wrong kind": (
        rewrite("traces/01.json", lambda data: data["steps"][2].update(kind="medium")),
        r"steps\.2\.kind",
    ),
    "more right than parts": (
        rewrite("results.json", lambda data: data["rows"][1].update(right=99)),
        "right 99 does not lie between 0 and parts 80",
    ),
    "more right than parts in a stretch": (
        rewrite("results.json", lambda data: data["rows"][1]["stretches"][0].update(right=17)),
        "right 17 of 16 parts in the stretch from 0",
    ),
    "a stretch between two": (
        rewrite(
            "results.json", lambda data: data["rows"][1]["stretches"][0].update(first_token=700)
        ),
        r"begin at \[700\], not at multiples of 1000",
    ),
    "a stretch twice": (
        rewrite(
            "results.json",
            lambda data: data["rows"][1].update(stretches=data["rows"][1]["stretches"] * 2),
        ),
        r"begin at \[0, 0\], not at multiples of 1000 in order",
    ),
    "stretches of unknown length": (
        rewrite("results.json", lambda data: data.pop("stretch_tokens")),
        "stretch_tokens is missing",
    ),
    "a row of nobody": (
        rewrite("results.json", lambda data: data["rows"][1].update(policy="nobody")),
        "not listed: nobody",
    ),
    "a policy twice": (
        rewrite("results.json", lambda data: data["policies"].append(data["policies"][0])),
        "named twice: dense",
    ),
    "a trace of nobody": (
        rewrite("traces/01.json", lambda data: data.update(policy="nobody")),
        "does not list: nobody",
    ),
    "recall of nobody": (
        rewrite(
            "recall.json",
            lambda data: data["policies"].update(nobody=data["policies"].popitem()[1]),
        ),
        "does not list: nobody",
    ),
    "a step outside": (
        rewrite("traces/01.json", lambda data: data["tokens"].pop()),
        "there are 459 tokens",
    ),
    "a selection outside": (
        rewrite("traces/01.json", lambda data: data["refreshes"][0]["union"].append([9_999, 1, 1])),
        "out of order or outside the history",
    ),
    "an infinite number": (
        rewrite("results.json", lambda data: data["rows"][0].update(slow_share=float("inf"))),
        r"rows\.0\.slow_share.*finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_folders_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = ReportFolder().write(tmp_path / "results")
    damage, message = REFUSED[name]
    damage(folder)
    with pytest.raises(InputError, match=f"(?s){message}"):
        write_report(folder)
    assert not list(folder.glob("*.html"))


def test_missing_and_foreign_folders_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not an ablation's"):
        write_report(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{}")
    with pytest.raises(InputError, match=r"without its summary.*1 finished runs"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = ReportFolder().write(tmp_path / "results")
    (folder / "report.html").mkdir()
    with pytest.raises(InputError, match="Write the report to"):
        write_report(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_new_page_replaces_the_old_one(tmp_path: Path) -> None:
    folder = ReportFolder().write(tmp_path / "results")
    page = write_report(folder)
    first = page.read_text(encoding="utf-8")
    page.write_text("old")
    assert write_report(folder) == page == folder / "report.html"
    assert page.read_text(encoding="utf-8") == first, "equal folders give equal pages"
