"""The programs in examples/ run: on a stand-in with random weights, and on the embedded model."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.embedded_folder import trained_weights, write_stand_in
from tests.source_tree import ROOT

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SMALL = ("--log-tokens", "500", "--selected-tokens", "64", "--max-new-tokens", "8")

needs_weights = pytest.mark.skipif(
    trained_weights() is None, reason="the trained weights are not in this tree"
)
Program = Callable[..., str]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stand_in(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs a program with arguments and returns what it printed."""

    def program(name: str, *arguments: str) -> str:
        runpy.run_path(str(EXAMPLES / name))["main"](arguments)
        return capsys.readouterr().out

    return program


def counted(pattern: str, text: str) -> list[tuple[int, ...]]:
    """Every match's groups as integers, thousands separators removed."""
    found = re.findall(pattern, text)
    rows = (match if isinstance(match, tuple) else (match,) for match in found)
    return [tuple(int(group.replace(",", "")) for group in row) for row in rows]


COST = r"\[([\d,]+) tokens cached, ([\d,]+) prefilled; (\d+) fast, (\d+) slow, (\d+) retried"


def table_rows(text: str) -> list[str]:
    """The lines of 03_long_horizon.py that are about a turn."""
    return [
        line for line in text.splitlines() if re.match(r" *\d+ (?:chain|attribute|report) ", line)
    ]


def test_these_are_the_programs_that_the_page_lists() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) >= 3
    for name in PROGRAMS:
        assert f"({name})" in page
        assert f"python examples/{name}" in (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_a_program_does(
    name: str, run: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(name, "--help")
    told = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--model" in told and f"python examples/{name}" in told


def test_the_tool_agent_shows_every_turn(run: Program, stand_in: Path) -> None:
    told = run("01_tool_agent.py", "--model", str(stand_in), *SMALL)
    assert told.count("user> ") == 5
    turns = counted(COST, told)
    assert len(turns) >= 5
    cached, prefilled, *_ = zip(*turns, strict=True)
    assert cached[0] == 0 and min(cached[1:]) > 0
    # A turn begins where the last one ended: all but its last token is cached by then.
    generated = [sum(turn[2:]) for turn in turns]
    for index, turn in enumerate(turns[1:]):
        assert turn[0] == cached[index] + prefilled[index] + generated[index] - 1
    (total,) = counted(r"(\d+) tokens generated", told)
    assert total == (sum(generated),)


def test_policies_are_compared_with_dense(run: Program, stand_in: Path) -> None:
    told = run("02_compare_policies.py", "--model", str(stand_in), *SMALL)
    rows = {line[:26].strip(): line[26:].split() for line in told.splitlines()[3:]}
    assert set(rows) == {
        "dense",
        "faithful",
        "balanced",
        "fast",
        "published",
        "balanced, span selector",
        "balanced, random selector",
        "balanced, window selector",
    }
    slow, agrees, _, divergence, _ = rows["dense"]
    assert float(slow.rstrip("%")) > 80  # all but the first token of each turn
    same, of = agrees.split("/")
    assert same == of
    assert abs(float(divergence)) < 1e-5
    assert float(rows["fast"][0].rstrip("%")) < 20
    assert float(rows["fast"][3]) > abs(float(divergence)), "fast steps leave no trace in the keys?"


def test_the_long_session_prefills_deltas_only(run: Program, stand_in: Path) -> None:
    options = ("--turns", "30", "--preset", "fast")
    told = run("03_long_horizon.py", "--model", str(stand_in), *SMALL, *options)
    rows = table_rows(told)
    assert len(rows) == 30
    assert "  0.0%" in rows[0]
    shares = [float(share) for row in rows[1:] for share in re.findall(r"([\d.]+)%", row)[:1]]
    assert min(shares) > 80
    ((prefilled,), (whole,)) = counted(r"(?:Prefilled|would have prefilled) ([\d,]+)", told)
    assert prefilled < whole / 8
    memories = counted(r"([\d,]+)/([\d,]+) ", told)
    # 4 sink, 64 selected and 128 recent tokens, and a segment of at most 8.
    assert all(memory <= 4 + 64 + 128 + 8 for memory, _ in memories)
    assert [size for _, size in memories] == sorted(size for _, size in memories)


AGENT = r"([\d,]+) cached, ([\d,]+) prefilled, (\d+) generated"


def test_agents_read_the_log_once_and_one_goes_on_from_the_disk(
    run: Program, stand_in: Path
) -> None:
    told = run("04_sub_agents.py", "--model", str(stand_in), *SMALL, "--agents", "3")
    ((shared, agents),) = counted(r"([\d,]+) tokens are read once, for (\d+) agents", told)
    rows = counted(AGENT, told)
    assert agents == 3 and len(rows) == 4
    # The pending token, and what rectify left open of a segment, is processed with the question.
    assert all(cached >= shared - 64 and prefilled < 200 for cached, prefilled, _ in rows)
    assert rows[-1][0] > rows[0][0], "the loaded agent has its own past"


@needs_weights
def test_agents_of_the_embedded_model_answer_with_tools(run: Program) -> None:
    told = run("04_sub_agents.py")
    assert re.search(r"gets phone \d+", told), told
    assert len(counted(AGENT, told)) == 5


@needs_weights
def test_the_embedded_model_opens_the_log_and_answers_with_tools(run: Program) -> None:
    told = run("01_tool_agent.py")
    assert "agent> [calls open_log" in told and "tool>  " in told
    assert told.count("expected: ") <= 1, told
    turns = counted(COST, told)
    assert sum(turn[2] for turn in turns) > sum(sum(turn[3:]) for turn in turns), "mostly fast"


@needs_weights
def test_the_embedded_model_tells_policies_apart(run: Program) -> None:
    told = run("02_compare_policies.py")
    rows = {line[:26].strip(): line[26:].split() for line in told.splitlines()[3:]}
    assert rows["dense"][2] == "3/3"
    share = {name: float(row[0].rstrip("%")) for name, row in rows.items()}
    assert share["fast"] < share["faithful"] < share["dense"]
    agreeing = {name: int(row[1].split("/")[0]) for name, row in rows.items()}
    assert agreeing["faithful"] >= agreeing["balanced, window selector"]


@needs_weights
def test_the_embedded_model_keeps_going_for_32_turns(run: Program) -> None:
    told = run("03_long_horizon.py")
    assert len(table_rows(told)) == 32
    ((right, of),) = counted(r"(\d+) of (\d+) answers are the expected ones", told)
    assert of == 32 and right >= 26, told
