"""The judges, and parts by their place in a long answer."""

from __future__ import annotations

import pytest

from sfi_agent import InputError
from sfi_agent.evaluation.tasks import TASKS, Case, PositionScore, Turn, scores_by_position, scoring
from tests.test_evaluation.test_tasks_cases import some_case, words


def test_contained() -> None:
    assert scoring.contained(("ab", "X"), "cab x") == (True, False)
    assert scoring.contained(("ab", "X"), "CAB x", ignore_case=True) == (True, True)


def test_numbered_answers_need_their_own_number() -> None:
    references = ("aa-1", "bb-2", "cc-3")
    assert scoring.numbered_equal(references, "1. aa-1\n2. bb-2,\n3. xx") == (True, True, False)
    assert scoring.numbered_equal(references, "2. aa-1\n1. bb-2") == (False, False, False)
    assert scoring.numbered_equal(references, "1. zz 1. aa-1") == (False, False, False)
    assert scoring.numbered_equal(references, "aa-1 bb-2 cc-3") == (False, False, False)


def test_only_the_first_number_counts() -> None:
    assert scoring.first_number("It is 12, not 13.") == 12
    assert scoring.first_number("none") is None
    assert scoring.first_numbers_equal(("13",), "It is 12, not 13.") == (False,)
    assert scoring.first_numbers_equal(("12",), "It is 12, not 13.") == (True,)


def test_overlap() -> None:
    found = scoring.overlap_score(("A", "B"), ("B", "C", "D"))
    assert (found.right, found.parts, found.exact, found.share) == (1, 4, False, 0.25)
    assert scoring.overlap_score(("A", "B"), ("B", "A")).exact


def test_sentences_said_twice_are_needed_twice() -> None:
    twice = ("It is so.", "It is so.")
    assert scoring.sentences_said(twice, "It is so. It was so.") == (True, False)
    assert scoring.sentences_said(twice, " It is so. It is so. ") == (True, True)


def test_calls_are_found_in_any_layout() -> None:
    output = 'I call {"name": "f", "arguments": {"b": 2, "a": {"c": 1}}} and {"x": 1} {broken'
    assert scoring.tool_calls_in(output) == [{"name": "f", "arguments": {"b": 2, "a": {"c": 1}}}]
    reference = '{"name": "f", "arguments": {"a": {"c": 1}, "b": 2}}'
    assert scoring.calls_said((reference, reference), output) == (True, False)
    assert scoring.tool_calls_in("[1, 2] {}") == []


def test_lines_must_be_whole() -> None:
    assert scoring.lines_contained(("row 1: A", "row 2: B"), " row 1: A \nrow 2: BB") == (
        True,
        False,
    )


# ---------------------------------------------------------------- positions


def lines_case() -> tuple[Case, Turn]:
    lines = tuple(f"Record {number}: x has code y." for number in range(100, 200))
    turn = Turn("q", "", lines, 10_000, "\n".join(lines))
    return Case("long_records", 0, "", "c", (turn,)), turn


def test_drift_shows_where_it_begins() -> None:
    case, turn = lines_case()
    assert words(turn.reference_answer) == 800
    said = "\n".join([*turn.references[:40], *("Record 51: x has code z.",) * 50])
    found = scores_by_position(TASKS["long_records"], case, [said], words, bucket_tokens=200)
    places = [(item.first_token, item.parts, item.right) for item in found]
    assert places == [(0, 25, 25), (200, 25, 15), (400, 25, 0), (600, 25, 0)]
    assert [item.output_tokens for item in found] == [720, 0, 0, 0]
    assert found[1].share == 0.6


def test_turns_of_a_long_talk_add_up() -> None:
    case = some_case("office_long", 0, 8000)
    task = TASKS["office_long"]
    right = [turn.reference_answer for turn in case.turns]
    late = len(right) // 2
    wrong = right[:late] + ["Nobody knows."] * (len(right) - late)
    whole = scores_by_position(task, case, right, words)
    broken = scores_by_position(task, case, wrong, words)
    assert len(whole) == len(broken) >= 3
    assert [item.first_token for item in whole] == [1000 * i for i in range(len(whole))]
    assert all(item.right == item.parts for item in whole)
    assert sum(item.parts for item in whole) == sum(len(turn.references) for turn in case.turns)
    assert broken[0].share == 1.0 and broken[-1].share == 0.0
    assert broken[-1].output_tokens < whole[-1].output_tokens


def test_positions_need_one_output_per_turn() -> None:
    case, turn = lines_case()
    for outputs, bucket in (([], 1000), ([turn.reference_answer], 0)):
        with pytest.raises(InputError, match="scored a case by position"):
            scores_by_position(TASKS["long_records"], case, outputs, words, bucket_tokens=bucket)


def test_a_position_score_has_a_share() -> None:
    assert PositionScore(0, 1, 4, 10).share == 0.25
