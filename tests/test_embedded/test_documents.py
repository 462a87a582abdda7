"""Training documents are what a session would render, with the mask on the assistant's words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sfi_agent.embedded.documents import GUESS, make_document
from sfi_agent.embedded.fragments import Line
from sfi_agent.embedded.sources import ROLES
from sfi_agent.embedded.train_data import make_batch
from sfi_agent.embedded.writer import FragmentTable


@pytest.fixture(scope="module")
def table(tokenizer: PreTrainedTokenizerFast) -> FragmentTable:
    return FragmentTable(tokenizer.backend_tokenizer)


def _read_chat(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools of a rendered chat, cut-off last message left out."""
    messages: list[dict[str, Any]] = []
    tools = None
    for part in text.split("<|im_start|>")[1:]:
        if not part.endswith("<|im_end|>\n"):
            break
        role, body = part.removesuffix("<|im_end|>\n").split("\n", 1)
        calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", body, re.S)
        results = re.findall(r"<tool_response>\n(.*?)\n</tool_response>", body, re.S)
        if role == "system" and "# Tools" in body:
            lines = body.split("<tools>\n", 1)[1].split("\n</tools>")[0]
            tools = [json.loads(line) for line in lines.split("\n")]
            head = body.split("# Tools")[0].removesuffix("\n\n")
            messages += [{"role": "system", "content": head}] if head else []
        elif role == "user" and results:
            messages += [{"role": "tool", "content": result} for result in results]
        elif role == "assistant" and calls:
            functions = [{"type": "function", "function": json.loads(call)} for call in calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": functions})
        else:
            messages.append({"role": role, "content": body})
    return messages, tools


@pytest.mark.parametrize("length", [512, 2048])
def test_documents_are_tokenised_and_rendered_as_a_session_would(
    tokenizer: PreTrainedTokenizerFast, table: FragmentTable, length: int
) -> None:
    with_tools = 0
    for index in range(12):
        document = make_document(f"check:{index}", length, table)
        assert len(document.ids) == length
        text = str(tokenizer.decode(document.ids.tolist()))
        assert tokenizer.encode(text, add_special_tokens=False) == list(document.ids)
        messages, tools = _read_chat(text)
        with_tools += tools is not None
        rendered = str(
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)  # type: ignore[arg-type]
        )
        assert text.startswith(rendered)
        assert len(text) - len(rendered) < 4000
    assert (with_tools > 0) == (length >= 1024)


def test_the_mask_covers_what_the_assistant_writes(
    tokenizer: PreTrainedTokenizerFast, table: FragmentTable
) -> None:
    for index in range(8):
        document = make_document(f"mask:{index}", 2048, table)
        text = str(tokenizer.decode(document.ids.tolist()))
        spoken = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.S)
        masked = [str(tokenizer.decode(document.ids[a:b].tolist())) for a, b in document.answers]
        assert masked[: len(spoken)] == spoken
        assert len(masked) <= len(spoken) + 1
        ends = {end for _, end in document.answers}
        assert all(end in ends for _, _, end in document.turns)


def test_documents_follow_from_their_key(table: FragmentTable) -> None:
    first = make_document("a", 700, table)
    assert first == make_document("a", 700, table)
    assert first.ids != make_document("b", 700, table).ids


def test_batches_hold_ids_mask_and_sources(table: FragmentTable) -> None:
    batch = make_batch("k", 600, 3, table, last_position=5000)
    assert batch.ids.shape == batch.answered.shape == batch.positions.shape == (3, 600)
    assert 0.02 < batch.answered.float().mean() < 0.8
    assert set(batch.sources) == {*ROLES, "back1", "back2", "back3"}
    for rows, targets in batch.sources.values():
        assert rows.shape == targets.shape[:2]
        there = targets >= 0
        assert bool((targets <= rows[..., None])[there].all())
        assert rows.max() < 600
    again = make_batch("k", 600, 3, table, last_position=5000)
    assert torch.equal(again.ids, batch.ids) and torch.equal(again.positions, batch.positions)


def test_gaps_stand_between_lines_and_turns_only(table: FragmentTable) -> None:
    stretched = 0
    for index in range(6):
        batch = make_batch(f"gap:{index}", 400, 1, table, last_position=4000)
        document = make_document(f"gap:{index}:400:0", 400, table)
        steps = batch.positions[0].diff()
        assert steps.min() >= 1 and batch.positions.max() <= 4000
        widened = {int(place) + 1 for place in (steps > 1).nonzero()}
        assert widened <= set(document.breaks)
        stretched += bool(widened)
    assert stretched >= 2
    plain = make_batch("gap:0", 400, 1, table)
    assert torch.equal(plain.positions[0], torch.arange(400))


def test_sources_point_at_what_the_answer_repeats(
    tokenizer: PreTrainedTokenizerFast, table: FragmentTable
) -> None:
    """The token that a row predicts stands at each of its targets."""
    seen = {"value": 0, "name": 0}
    for index in range(10):
        document = make_document(f"source:{index}", 900, table)
        ids = document.ids
        for role in seen:
            for row, targets in document.sources[role]:
                around = str(tokenizer.decode(ids[row : row + 2].tolist()))
                if role == "name" and ("tool_call" in around or '":' in around):
                    continue
                for target in targets:
                    word = str(tokenizer.decode([ids[target]]))
                    if role == "value" or word.strip().istitle():
                        assert ids[row + 1] == ids[target], (role, row, target)
                        seen[role] += 1
    assert seen["value"] > 100 and seen["name"] > 20


def test_statements_are_bound_to_their_subject(
    tokenizer: PreTrainedTokenizerFast, table: FragmentTable
) -> None:
    document = make_document("bound", 700, table)
    log = {row for row, _ in document.sources["bind"] if row < document.answers[0][0] - 1}
    assert len(log) > 100
    for row, (target,) in document.sources["bind"]:
        if row in log:
            assert str(tokenizer.decode([document.ids[target]])).istitle()
            between = tokenizer.decode(document.ids[target:row].tolist())
            assert "\n" not in str(between)


def test_missing_facts_are_asked_for_but_stand_nowhere(
    tokenizer: PreTrainedTokenizerFast, table: FragmentTable
) -> None:
    guesses = 0
    for index in range(6):
        name = f"gaps:{index}"
        document = make_document(name, 900, table, missing_share=0.3)
        assert make_document(name, 900, table).ids != document.ids
        guesses += sum(kind == GUESS for kind, _, _ in document.turns)
        for row, (target,) in document.sources["missing"]:
            word = str(tokenizer.decode([document.ids[target]])).strip()
            assert word.istitle() and target < row
            value = str(tokenizer.decode([document.ids[row + 1]]))
            phrase = str(tokenizer.decode(document.ids[row - 1 : row + 1].tolist()))
            log = str(tokenizer.decode(document.ids[: document.answers[0][0]].tolist()))
            if '":' not in phrase:
                stated = [line for line in log.split("\n") if f" {word}{phrase}{value}" in line]
                assert not stated
    assert guesses > 6
    assert all(kind != GUESS for kind, _, _ in make_document("gaps:0", 900, table).turns)


def test_a_line_can_lose_facts() -> None:
    text = (" Mara", " works", " for", " sales", ",", " lives", " in", " Lyon", " and")
    line = Line((*text, " keeps", " badge", " 412", "."), "Mara", ("department", "city", "badge"))
    shorter = line.without({"city"})
    assert shorter is not None
    assert "".join(shorter.fragments) == " Mara works for sales and keeps badge 412."
    assert shorter.keys == ("department", "badge")
    assert line.without(()) is line and line.without(set(line.keys)) is None
