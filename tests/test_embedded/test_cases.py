"""The office world: determinism, truth of the answers, scoring, bad input."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.embedded import Case, make_case, make_conversation, make_tools, score
from sfi_agent.embedded.lexicon import PERSON_FIELDS, PERSON_NAMES
from sfi_agent.embedded.questions import KINDS
from sfi_agent.embedded.world import VARIANTS
from sfi_agent.errors import InputError

_CASES = {
    "seed": st.integers(0, 10_000),
    "kind": st.sampled_from(KINDS),
    "variant": st.sampled_from(VARIANTS),
    "log_tokens": st.sampled_from((200, 400, 1000)),
}


@given(**_CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_case_follows_from_its_arguments_alone(
    seed: int, kind: str, variant: str, log_tokens: int
) -> None:
    first = make_case(seed, kind=kind, variant=variant, log_tokens=log_tokens)
    again = make_case(seed, kind=kind, variant=variant, log_tokens=log_tokens)
    assert first == again
    assert make_case(seed + 1, kind=kind, variant=variant, log_tokens=log_tokens) != first
    assert first.expected == " ".join(first.sentences)
    assert bool(first.calls) == (kind == "tool")


@given(**{**_CASES, "kind": st.sampled_from(("report", "chain", "attribute"))})
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_fact_of_an_answer_stands_in_the_log(
    seed: int, kind: str, variant: str, log_tokens: int
) -> None:
    case = make_case(seed, kind=kind, variant=variant, log_tokens=log_tokens)
    lines = case.log.split("\n")
    for sentence in case.sentences:
        clauses = re.split(r", | and (?=[a-z])", sentence.rstrip("."))
        name = re.match(r"[A-Z][a-z]+", sentence)
        assert name is not None
        own = [line for line in lines if re.search(rf"\S {name.group(0)} [a-z]", line)]
        for clause in clauses:
            fact = clause.removeprefix(name.group(0)).strip()
            assert any(re.search(rf"{fact}(?=[.,;]| and )", line) for line in own), (fact, own)


@given(seed=st.integers(0, 10_000), log_tokens=st.sampled_from((300, 900)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_easy_logs_state_each_entry_in_one_line_and_each_fact_once(
    seed: int, log_tokens: int
) -> None:
    case = make_case(seed, kind="tool", variant="easy", log_tokens=log_tokens)
    lines = case.log.split("\n")[1:]
    records = [line for line in lines if "keeps badge" in line]
    subjects = [line.split(" ")[1] for line in records]
    assert len(set(subjects)) == len(subjects)
    assert set(subjects) <= set(PERSON_NAMES)
    badges = re.findall(r"keeps badge (\d{3})", case.log)
    assert len(set(badges)) == len(badges) == len(records)
    for line in records:
        for field in PERSON_FIELDS:
            assert line.count("".join(field.phrase) + " ") <= 1


def test_hard_logs_scatter_the_facts_of_an_entry() -> None:
    for seed in range(10):
        case = make_case(seed, kind="tool", variant="hard", log_tokens=500)
        for line in case.log.split("\n")[1:]:
            stated = sum(line.count("".join(field.phrase) + " ") for field in PERSON_FIELDS)
            assert stated <= 2
        subject = case.sentences[0].split(" ")[0]
        own = [line for line in case.log.split("\n") if line[1:].startswith(f" {subject} ")]
        assert len(own) >= 3


def test_tool_calls_give_the_results_that_the_answer_uses() -> None:
    for seed in range(30):
        case = make_case(seed, kind="tool", log_tokens=300)
        tools = {tool.__name__: tool for tool in case.tools}
        for use, sentence in zip(case.calls, case.sentences, strict=True):
            assert tools[use.name](**use.arguments) == use.result
            assert str(use.arguments.get("badge", use.arguments.get("room"))) in case.log
            assert re.findall(r"\d+", use.result)[-1] in sentence


def test_some_tool_cases_need_two_calls_in_one_turn() -> None:
    sizes = {len(make_case(seed, kind="tool", log_tokens=300).calls) for seed in range(30)}
    assert sizes == {1, 2}


def test_open_log_returns_its_log_and_refuses_another_day() -> None:
    conversation = make_conversation(3, log_tokens=300)
    open_log = {tool.__name__: tool for tool in conversation.tools}["open_log"]
    assert open_log(conversation.day) == conversation.log
    with pytest.raises(ValueError, match="no log of sunday"):
        open_log("sunday")


def test_a_conversation_asks_all_its_questions_over_one_log() -> None:
    conversation = make_conversation(5, log_tokens=500, turns=6)
    assert [case.kind for case in conversation.turns] == [*KINDS, *KINDS[:2]]
    assert {case.log for case in conversation.turns} == {conversation.log}
    assert conversation == make_conversation(5, log_tokens=500, turns=6)
    assert conversation.day in conversation.opening


@pytest.fixture
def report() -> Case:
    return make_case(11, kind="report", log_tokens=600)


def test_score_counts_sentences_word_for_word(report: Case) -> None:
    total = len(report.sentences)
    assert total >= 2
    perfect = score(report, " " + report.expected + "\n")
    assert (perfect.exact, perfect.sentences_right, perfect.sentences) == (True, total, total)
    shorter = score(report, " ".join(report.sentences[:-1]))
    assert (shorter.exact, shorter.sentences_right) == (False, total - 1)
    swapped = score(report, " ".join(reversed(report.sentences)))
    assert (swapped.exact, swapped.sentences_right) == (False, total)
    name = report.sentences[0].split(" ")[0]
    wrong = score(report, report.expected.replace(name, "Nobody"))
    assert not wrong.exact and wrong.sentences_right < total
    assert score(report, "").sentences_right == 0
    assert score(report, " ".join([report.sentences[0]] * total)).sentences_right == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "poem"},
        {"variant": "medium"},
        {"log_tokens": 10},
        {"log_tokens": 100_000},
    ],
)
def test_bad_input_is_named(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        make_case(1, **arguments)  # type: ignore[arg-type]
    assert repr(next(iter(arguments.values()))) in str(caught.value)
    assert "allowed" in str(caught.value)


def test_a_conversation_needs_a_turn() -> None:
    with pytest.raises(InputError, match="at least one turn"):
        make_conversation(1, turns=0)


def test_tools_are_sorted_by_name() -> None:
    names = [tool.__name__ for tool in make_tools("")]
    assert names == sorted(names)


def test_importing_the_world_loads_no_framework() -> None:
    code = (
        "import sys, sfi_agent.embedded; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
