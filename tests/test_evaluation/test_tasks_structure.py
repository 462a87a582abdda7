"""What the tasks promise about their contexts, read back from the text."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from sfi_agent import InputError
from sfi_agent.embedded import CaseScore, make_case, score
from sfi_agent.evaluation.tasks import TASKS, Case, Turn
from sfi_agent.evaluation.tasks.filler import REPEATED_BLOCK
from sfi_agent.evaluation.tasks.frequent_words import occurrences
from sfi_agent.evaluation.tasks.mt_kv import MultiTurnKeyValue, cold_position, spread_positions
from sfi_agent.evaluation.tasks.niah import NEEDLE_TASKS, Needles
from tests.test_evaluation.test_tasks_cases import some_case, words

SEEDS = range(4)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


# ---------------------------------------------------------------- one question


def needles_of(case: Case) -> list[tuple[str, str]]:
    return re.findall(r"Remember that the secret \w+ of (\S+) is (\S+)\.", case.context)


@pytest.mark.parametrize("task", NEEDLE_TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_needles(task: Needles, seed: int) -> None:
    case = some_case(task.name, seed)
    (turn,) = case.turns
    told = needles_of(case)
    keys = {key for key, _ in told}
    values = [value for _, value in told]
    assert len(set(values)) == len(values), "two needles share a value"
    asked = [key for key in keys if re.search(rf"(?<!\S){key}\b(?![\w-])", turn.question)]
    assert len(asked) == task.queries
    expected = {value for key, value in told if key in asked}
    assert set(turn.references) == expected and len(turn.references) == task.values * task.queries
    for reference in turn.references:
        assert case.context.count(reference) == 1
        assert reference not in turn.question + turn.answer_prefix
    if task.haystack != "needle":
        assert len(told) == max(task.keys, task.queries) * task.values
        assert len(keys) == max(task.keys, task.queries)
    else:
        assert len(told) > 100 and len(keys) == len(told)
    shape = UUID if task.value_kind == "uuids" else r"[1-9]\d{6}"
    assert all(re.fullmatch(shape, value) for value in values)


def test_haystacks_are_what_they_are_called() -> None:
    lines = some_case("niah_single_1").context.splitlines()
    assert Counter(lines).most_common(1)[0][0] == REPEATED_BLOCK
    assert sum(line != REPEATED_BLOCK for line in lines) == 3  # opening, blank line, needle
    for task in NEEDLE_TASKS:
        if task.haystack == "essay":
            text = re.sub(r"Remember that[^.]*\.", "", some_case(task.name).context)
            told = re.findall(r"[A-Z][^.]*\.", text)
            assert len(set(told)) == len(told) > 50


def test_needles_lie_at_many_depths() -> None:
    depths = []
    for seed in range(30):
        case = some_case("niah_single_2", seed, 2000)
        depths.append(case.context.index("Remember that") / len(case.context))
    assert min(depths) < 0.2 and max(depths) > 0.8 and len({round(d, 2) for d in depths}) > 12


def test_every_sample_shuffles_anew() -> None:
    orders = {
        tuple(case.context.index(value) > len(case.context) // 2 for value in turn.references)
        for case in (some_case("niah_multivalue", seed) for seed in range(8))
        for turn in case.turns
    }
    assert len(orders) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_hard_needles(seed: int) -> None:
    case = some_case("niah_hard", seed)
    (turn,) = case.turns
    lines = case.context.splitlines()
    held = dict(re.findall(r"^Locker (\S+) holds (\S+)\.$", case.context, flags=re.MULTILINE))
    assert len(held) == len(lines) > 30
    asked = re.findall(r"^\d\. (\S+)$", turn.question, flags=re.MULTILINE)
    assert turn.references == tuple(held[key] for key in asked) and len(asked) == 4
    codes = [*held, *held.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z0-9]{8}(-[a-z0-9]{8}){3}", code) for code in codes)
    swapped = "\n".join(
        f"{number}. {value}" for number, value in enumerate(reversed(turn.references), start=1)
    )
    assert TASKS["niah_hard"].score(turn, swapped).right == 0, "the place counts"


def resolve(context: str) -> dict[str, set[str]]:
    """Names by the value they hold in the end, whatever the order of the statements."""
    sources = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d+)", context))
    held: dict[str, set[str]] = {}
    for name in sources:
        value = name
        while value in sources:
            value = sources[value]
        held.setdefault(value, set()).add(name)
    return held


@pytest.mark.parametrize("name", ["variable_tracking", "variable_tracking_hard"])
@pytest.mark.parametrize("seed", SEEDS)
def test_variables(name: str, seed: int) -> None:
    case = some_case(name, seed)
    (turn,) = case.turns
    held = resolve(case.context)
    (value,) = re.findall(r"value (\d+)", turn.question)
    assert held[value] == set(turn.references) and len(turn.references) == 5
    assert len(held) == (8 if name.endswith("hard") else 1)
    for place, reference in enumerate(turn.references):
        assert case.context.count(reference) == (1 if place == 4 else 2)
    places = [case.context.index(f"VAR {reference} =") for reference in turn.references]
    if name == "variable_tracking":
        assert places == sorted(places)


def test_the_solved_example_of_variables_is_right_and_small() -> None:
    context = some_case("variable_tracking").context
    example, _, _ = context.partition("\n\nThe text below")
    names = re.findall(r"VAR ([A-Z]{3}) =", example)
    assert example.endswith(f"are {' '.join(names)}.") and len(names) == 5
    assert words(example) <= 500


def test_hard_variables_count_wrong_names_against_the_answer() -> None:
    task = TASKS["variable_tracking_hard"]
    (turn,) = some_case("variable_tracking_hard").turns
    found = task.score(turn, f"{' '.join(turn.references[:4])} WRONG NAMES and more")
    assert (found.right, found.parts, found.exact) == (4, 7, False)
    assert task.part_results(turn, " ".join(turn.references[1:])) == (False, *[True] * 4)


@pytest.mark.parametrize(
    ("context_tokens", "common", "other", "shown"),
    [(3000, 6, 1, (3, 1, 20)), (6000, 30, 3, (10, 3, 40))],
)
def test_common_words(
    context_tokens: int, common: int, other: int, shown: tuple[int, int, int]
) -> None:
    case = some_case("common_words", 1, context_tokens)
    (turn,) = case.turns
    example, text = case.context.split("Here is another list, where the same is asked.\n")
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    assert {counts[word] for word in turn.references} == {common}
    assert {word for word in counts if counts[word] == common} == set(turn.references)
    assert {counts[word] for word in counts if word not in turn.references} == {other}
    listed, answer = example.split("The ten words that occur most often in the list are:")
    example_counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    often = {word for word in example_counts if example_counts[word] == shown[0]}
    assert often == set(re.findall(r"\d+\. (\w+)", answer)) and len(often) == 10
    assert len(example_counts) == shown[2] and min(example_counts.values()) == shown[1]
    assert not often & set(counts)
    assert len({len(word) for word in counts}) == 1, "no word can be part of another"


def test_frequent_words() -> None:
    assert [occurrences(rank, 5000) for rank in (1, 2, 3, 4)] == [3039, 759, 337, 189]
    case = some_case("frequent_words", 2)
    (turn,) = case.turns
    counts = Counter(case.context.split())
    total = sum(counts.values())
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked[0] == "..." and tuple(ranked[1:]) == turn.references
    shares = [counts[word] / total for word in ranked]
    assert shares == pytest.approx([0.608, 0.152, 0.068, 0.038], abs=0.02)
    assert len({counts[word] for word in ranked}) == 4, "ranks are told apart by their counts"


@pytest.mark.parametrize("name", ["copy_identifiers", "copy_json", "copy_code"])
@pytest.mark.parametrize("seed", SEEDS)
def test_texts_to_copy(name: str, seed: int) -> None:
    case = some_case(name, seed)
    (turn,) = case.turns
    assert len(set(turn.references)) == 3
    for reference in turn.references:
        assert case.context.count(reference) == 1
        assert reference not in turn.question
        assert words(reference) > 5 or "_" in reference
    if name == "copy_json":
        assert all(len(json.loads(reference)) == 5 for reference in turn.references)
    changed = turn.reference_answer.replace(turn.references[1], turn.references[1][:-1])
    assert TASKS[name].part_results(turn, changed) == (True, False, True)


# ---------------------------------------------------------------- several turns


def pairs_of(case: Case) -> dict[str, str]:
    found: dict[str, str] = json.loads(case.context[case.context.index("{") :])
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_key_values_over_turns(seed: int) -> None:
    case = some_case("mt_kv", seed)
    pairs, keys = pairs_of(case), list(pairs_of(case))
    kinds = MultiTurnKeyValue().turn_kinds
    asked: list[int] = []
    changed = ""
    for kind, turn in zip(kinds, case.turns, strict=True):
        (value,) = turn.references
        if kind == "echo":
            assert value == case.turns[0].references[0] and not re.search(UUID, turn.question)
            continue
        if kind == "update":
            noted, new_value, key = re.findall(UUID, turn.question)
            assert new_value not in case.context and noted in pairs
            changed = noted
        else:
            (key,) = re.findall(UUID, turn.question)
        if kind == "cold":
            gap = min(abs(keys.index(key) - place) for place in asked)
            assert gap >= len(keys) // 10
        if kind == "updated":
            assert key == changed and value == new_value != pairs[key]
        else:
            assert value == pairs[key] and key != changed
        asked.append(keys.index(key))
    assert len(set(asked)) == len(asked)
    assert case.context.count(case.turns[0].references[0]) == 1


def test_turn_kinds_that_make_no_sense_are_refused() -> None:
    for kinds in (("echo",), ("lookup", "updated")):
        task = MultiTurnKeyValue(turn_kinds=kinds)
        with pytest.raises(InputError, match=f"'{kinds[-1]}' as turn {len(kinds)}"):
            task.make_case(context_tokens=4000, seed=0, count_tokens=words)


def test_positions() -> None:
    import random

    places = spread_positions(random.Random(0), 5, 100)
    assert sorted(place // 20 for place in places) == [0, 1, 2, 3, 4]
    assert cold_position([10, 90], 100) == 50
    assert cold_position([60], 100) == 29
    assert cold_position([], 100) == 49


@pytest.mark.parametrize("seed", SEEDS)
def test_prefixes_and_suffixes(seed: int) -> None:
    case = some_case("mt_prefix_suffix", seed)
    lines = case.context.splitlines()[2:]
    assert all(re.fullmatch(r"[a-z0-9]{24,48}", line) for line in lines)
    assert len(case.turns) == 5
    for turn in case.turns:
        ((prefix, suffix),) = re.findall(
            r"begins with (\w{6}) and ends with (\w{6})", turn.question
        )
        fitting = [line for line in lines if line.startswith(prefix) and line.endswith(suffix)]
        assert tuple(fitting) == turn.references


@pytest.mark.parametrize("seed", SEEDS)
def test_variables_over_turns(seed: int) -> None:
    case = some_case("mt_variable_tracking", seed)
    held = resolve(case.context)
    assert len(held) == len(case.turns) == 5
    for turn in case.turns:
        (value,) = re.findall(r"value (\d+)", turn.question)
        assert held.pop(value) == set(turn.references)
        places = [case.context.index(f"VAR {name} =") for name in turn.references]
        assert places == sorted(places)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_to_find(seed: int) -> None:
    case = some_case("mt_find", seed)
    head, listed = case.context.split("\n\n")
    numbers = sorted(map(int, listed.split(", ")))
    assert head == f"This is a list of {len(numbers)} numbers." and len(numbers) % 2
    answers = [int(turn.references[0]) for turn in case.turns]
    (wanted,) = re.findall(r"that (\d+) occurs", case.turns[4].question)
    middle = numbers[len(numbers) // 2]
    expected = [numbers[-1], numbers[0], numbers[-2], middle, numbers.count(int(wanted))]
    assert answers == expected
    assert numbers[0] < numbers[1] and numbers[-3] < numbers[-2] < numbers[-1]


@pytest.mark.parametrize("seed", SEEDS)
def test_mixed_turns_alternate(seed: int) -> None:
    case = some_case("mt_mix", seed)
    object_text, lines = case.context.split("\n\nEach of these lines is one string.\n\n")
    pairs = json.loads(object_text[object_text.index("{") :])
    for number, turn in enumerate(case.turns):
        if number % 2:
            assert turn.references[0] in lines.splitlines()
        else:
            (key,) = re.findall(UUID, turn.question)
            assert turn.references == (pairs[key],)


@pytest.mark.parametrize("seed", SEEDS)
def test_tool_results_pile_up(seed: int) -> None:
    case = some_case("tool_loop", seed)
    rows: dict[str, dict[str, str]] = {}
    born: dict[str, int] = {}
    for number, turn in enumerate(case.turns):
        tool, _, rest = turn.question.partition(" returned:\n")
        assert tool == ("list_customers" if number % 2 else "list_orders")
        for line in rest.split("\n\n")[0].splitlines():
            row = json.loads(line)
            rows[row["id"]], born[row["id"]] = row, number
        ((field, _, through, row_id),) = re.findall(
            r"What is the (\w+) of (the (\w+) of )?(\w+)\?", turn.question
        )
        row = rows[rows[row_id][through]] if through else rows[row_id]
        assert turn.references == (row[field],)
        assert bool(through) == (number == 11)
        assert born[row_id] == {10: 0, 11: 2}.get(number, number)
    assert len(case.turns) == 12
    customers = [row["customer"] for row in rows.values() if "customer" in row]
    assert sum(customer in rows for customer in customers) >= len(customers) * 0.8


# ---------------------------------------------------------------- long answers


def test_records_are_asked_in_the_order_of_their_numbers() -> None:
    case = some_case("long_records")
    (turn,) = case.turns
    shown = case.context.splitlines()
    assert sorted(shown) == sorted(turn.references) and shown != list(turn.references)
    numbers = [int(re.findall(r"\d+", reference)[0]) for reference in turn.references]
    assert numbers == list(range(1, len(shown) + 1))
    half = words(case.context) / (words(case.context) + turn.max_new_tokens)
    assert 0.4 < half < 0.6


def test_counting_fills_the_length_with_its_answer() -> None:
    case = some_case("long_counting")
    (turn,) = case.turns
    numbers = [int(reference) for reference in turn.references]
    assert {after - before for before, after in pairwise(numbers)} == {3}
    assert f"starts at {numbers[0]}" in case.context
    assert f"stops behind {numbers[-1]}" in case.context
    assert words(turn.reference_answer) > 0.95 * 4200 - 150
    without = "\n".join(turn.references[:7] + turn.references[8:])
    left_out = TASKS["long_counting"].score(turn, without)
    assert left_out.right == left_out.parts - 1 and not left_out.exact
    again = TASKS["long_counting"].score(turn, f"{turn.reference_answer}\n{numbers[0]}")
    assert again.right == again.parts and not again.exact


@pytest.mark.parametrize("seed", SEEDS)
def test_the_state_machine_does_what_its_table_says(seed: int) -> None:
    case = some_case("long_state_machine", seed)
    (turn,) = case.turns
    moves = {
        (state, mark): after
        for state, mark, after in re.findall(
            r"In state (\w), reading (\w) leads to state (\w)\.", case.context
        )
    }
    assert len(moves) == 18
    tape = re.findall(r"^row (\d+): start (\w), read (.*)$", case.context, flags=re.MULTILINE)
    traced = []
    for number, state, marks in tape:
        path = [state]
        for mark in marks.split():
            path.append(moves[path[-1], mark])
        traced.append(f"row {number}: {' '.join(path)}")
    assert tuple(traced) == turn.references and len(traced) > 20


# ---------------------------------------------------------------- the office


@pytest.mark.parametrize("kind", ["report", "chain", "attribute"])
def test_office_answers_are_scored_as_the_embedded_model_scores_them(kind: str) -> None:
    name = {"report": "office_report_hard"}.get(kind, f"office_{kind}")
    for seed in SEEDS:
        (turn,) = some_case(name, seed).turns
        variant = "hard" if kind == "report" or seed % 2 else "easy"
        case = make_case(seed, kind=kind, variant=variant, log_tokens=1000)
        (same,) = (Turn(case.question, "", case.sentences, 99, case.expected),)
        for said in (case.expected, "", " ".join(case.sentences[1:]), case.expected + " More."):
            ours = TASKS[name].score(same, said)
            assert CaseScore(ours.exact, ours.right, ours.parts) == score(case, said)
        assert turn.reference_answer == " ".join(turn.references)


def test_office_facts_stand_in_the_log() -> None:
    for name in ("office_report_easy", "office_report_hard", "office_chain", "office_attribute"):
        case = some_case(name)
        for reference in case.turns[0].references:
            subject, value = reference.split()[0], reference.rstrip(".").split()[-1]
            lines = [line for line in case.context.splitlines() if f" {subject} " in f" {line} "]
            assert any(value in line for line in lines), reference


def test_the_office_tool_task_calls_and_then_answers() -> None:
    case = next(some_case("office_tool", seed) for seed in range(9) if has_two_calls(seed))
    calls, final = case.turns
    task = TASKS["office_tool"]
    assert calls.calls == final.exchanges and final.question == "" and not final.calls
    tools = {tool.__name__: tool for tool in case.tools}
    for exchange in final.exchanges:
        assert tools[exchange.name](**exchange.arguments) == exchange.result
        assert any(exchange.result.split()[-1] in reference for reference in final.references)
    first, second = calls.references
    assert task.score(calls, f"{second}\n{first}").right == 2, "their order does not count"
    loose = json.dumps(json.loads(first), indent=2)
    assert task.part_results(calls, f"<tool_call>\n{loose}\n</tool_call>") == (True, False)
    assert not task.score(calls, f"{first}\n{second}\n{second}").exact


def has_two_calls(seed: int) -> bool:
    return len(some_case("office_tool", seed).turns[0].calls) == 2


def test_a_long_office_talk_is_mostly_answers() -> None:
    case = some_case("office_long", 0, 8000)
    answers = sum(words(turn.reference_answer) for turn in case.turns)
    assert len(case.turns) > 15 and answers > 3000
    assert 0.2 < words(case.context) / 8000 < 0.3
    assert len({turn.question for turn in case.turns}) == len(case.turns)
