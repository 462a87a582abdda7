"""Every task: equal cases everywhere, as long as asked for, and answers that can be judged."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import InputError
from sfi_agent.evaluation.dialogue import token_counter
from sfi_agent.evaluation.tasks import TASKS, Case, TokenCounter, case_tokens, task_named
from sfi_agent.evaluation.tasks.filler import REPEATED_BLOCK, sentences
from sfi_agent.evaluation.tasks.fitting import fit_case
from sfi_agent.evaluation.tasks.task import Turn
from sfi_agent.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer, metaspace_tokenizer

TOKENIZERS = ("chatml", "metaspace", "bytes", "embedded")
every_task = pytest.mark.parametrize("name", TASKS)


@lru_cache
def counter(tokenizer: str) -> TokenCounter:
    if tokenizer == "embedded":
        from sfi_agent.embedded.tokenizer_build import build_tokenizer

        return token_counter(build_tokenizer())
    build = {
        "chatml": chatml_tokenizer,
        "metaspace": metaspace_tokenizer,
        "bytes": byte_tokenizer,
    }
    return token_counter(build[tokenizer]())


def words(text: str) -> int:
    """A stand-in for a tokenizer, cheap enough to try every task with."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@lru_cache
def some_case(name: str, seed: int = 0, context_tokens: int = 4200) -> Case:
    return TASKS[name].make_case(context_tokens=context_tokens, seed=seed, count_tokens=words)


FINGERPRINTS = """
import hashlib, re
from sfi_agent.evaluation.tasks import TASKS
def words(text):
    return len(re.findall(r"\\w+|[^\\w\\s]", text))
for name, task in TASKS.items():
    case = task.make_case(context_tokens=4200, seed=3, count_tokens=words)
    print(hashlib.sha256(repr((case.context, case.turns)).encode()).hexdigest())
"""


def test_cases_are_equal_in_every_process(
    child_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    other = child_python(FINGERPRINTS).splitlines()
    here = []
    for name in TASKS:
        case = TASKS[name].make_case(context_tokens=4200, seed=3, count_tokens=words)
        here.append(hashlib.sha256(repr((case.context, case.turns)).encode()).hexdigest())
    assert other == here
    assert len(set(here)) == len(TASKS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(TASKS)),
    tokenizer=st.sampled_from(TOKENIZERS),
    context_tokens=st.integers(5000, 9200),
    seed=st.integers(0, 10_000),
)
def test_a_case_is_as_long_as_asked_for(
    name: str, tokenizer: str, context_tokens: int, seed: int
) -> None:
    count = counter(tokenizer)
    try:
        case = TASKS[name].make_case(context_tokens=context_tokens, seed=seed, count_tokens=count)
    except InputError as error:
        # The smallest case of some tasks is long in bytes; the message says how long.
        needed = re.search(r"allowed: (\d+) or more", str(error))
        assert needed and int(needed[1]) > context_tokens
        return
    tokens = case_tokens(case, count)
    # One more unit is a sentence, a pair, a row or a report turn; logs grow unevenly.
    assert 0.97 * context_tokens - 150 <= tokens <= context_tokens


@every_task
def test_seeds_and_lengths_give_other_cases(name: str) -> None:
    assert some_case(name, 0) == some_case(name, 0)
    assert some_case(name, 0).turns != some_case(name, 1).turns
    shorter = TASKS[name].make_case(context_tokens=3900, seed=0, count_tokens=words)
    assert case_tokens(shorter, words) < case_tokens(some_case(name), words)


@every_task
def test_the_right_answer_is_right_and_others_are_not(name: str) -> None:
    task, case = TASKS[name], some_case(name)
    for turn, foreign in zip(case.turns, some_case(name, 1).turns, strict=False):
        right = task.score(turn, turn.reference_answer)
        assert right.exact and right.share == 1.0 and right.parts == len(turn.references)
        assert task.part_results(turn, turn.reference_answer) == (True,) * right.parts
        nothing = task.score(turn, "")
        assert (nothing.right, nothing.exact) == (0, False)
        if foreign.references != turn.references:
            assert not task.score(turn, foreign.reference_answer).exact


@every_task
def test_half_an_answer_is_half_right(name: str) -> None:
    task = TASKS[name]
    turns = [turn for turn in some_case(name).turns if len(turn.references) > 1]
    for turn in turns[:3]:
        separator = "\n" if "\n" in turn.reference_answer else " "
        parts = turn.reference_answer.split(separator)
        score = task.score(turn, separator.join(parts[: len(parts) // 2]))
        assert 0 < score.right < score.parts and not score.exact
        assert 0.2 < score.share < 0.8


@every_task
def test_limits_leave_room_for_the_right_answer(name: str) -> None:
    for turn in some_case(name).turns:
        assert words(turn.reference_answer) <= turn.max_new_tokens
        assert turn.answer_prefix == turn.answer_prefix.rstrip()
        assert turn.reference_answer == turn.reference_answer.strip() != ""
        assert turn.references and all(turn.references)


@every_task
def test_a_task_says_what_it_is(name: str) -> None:
    task = task_named(name)
    assert task.name == name == name.lower() and re.fullmatch(r"[a-z0-9_]+", name)
    assert task.summary.endswith(".") and task.summary[0].isupper()


@every_task
def test_too_short_lengths_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}; got context_tokens=20; allowed: \\d+ or more"):
        TASKS[name].make_case(context_tokens=20, seed=0, count_tokens=words)


@every_task
@pytest.mark.parametrize(
    ("length", "seed"), [(0, 0), (-5, 0), (4000, -1), (4000.0, 0), (True, 0), (4000, "1")]
)
def test_unusable_arguments_are_refused(name: str, length: int, seed: int) -> None:
    with pytest.raises(InputError, match="integers from"):
        TASKS[name].make_case(context_tokens=length, seed=seed, count_tokens=words)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match="'niah'; allowed: niah_single_1, niah_single_2"):
        task_named("niah")
    with pytest.raises(InputError, match="no task has this name"):
        task_named(["niah_single_1"])  # type: ignore[arg-type]


# ---------------------------------------------------------------- words and lengths


def test_word_lists_hold_no_word_twice_and_filler_no_digit() -> None:
    import random

    for words_of_a_kind in (ADJECTIVES, NOUNS, VERBS):
        assert len(set(words_of_a_kind)) == len(words_of_a_kind) > 40
        assert all(re.fullmatch("[a-z]+", word) for word in words_of_a_kind)
    source = sentences(random.Random(0))
    drawn = [next(source) for _ in range(500)]
    assert len(set(drawn)) == len(drawn)
    text = " ".join([*drawn, REPEATED_BLOCK])
    assert not re.search(r"\d|secret|VAR|[A-Z]{2}", text)
    lengths = [len(sentence.split()) for sentence in drawn]
    assert min(lengths) < 9 and max(lengths) > 14


def unit_case(texts: Callable[[int], str]) -> Callable[[int], Case]:
    turn = Turn("q", "", ("a",), 10)
    return lambda units: Case("unit", 0, "", texts(units), (turn,))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    context_tokens=st.integers(60, 3000),
)
def test_the_largest_number_of_units_that_fits_is_found(
    sizes: list[int], context_tokens: int
) -> None:
    def text(units: int) -> str:
        return "x" * sum(sizes[index % len(sizes)] for index in range(units))

    case = fit_case(unit_case(text), context_tokens=context_tokens, count_tokens=len)
    units = next(count for count in range(5000) if text(count) == case.context)
    tokens = [case_tokens(unit_case(text)(count), len) for count in (units, units + 1)]
    assert tokens[0] <= context_tokens < tokens[1]


def test_a_task_without_more_units_says_so() -> None:
    build = unit_case(lambda units: "x" * 10 * units)
    with pytest.raises(InputError, match="up to 213 with this tokenizer"):
        fit_case(build, context_tokens=1000, count_tokens=len, largest=20)
    assert len(fit_case(build, context_tokens=218, count_tokens=len, largest=20).context) == 200
