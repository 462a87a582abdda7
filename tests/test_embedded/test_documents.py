"""Training documents are what a session would render, with the mask on the assistant's words."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sfi_agent.embedded.documents import FragmentTable, make_document
from sfi_agent.embedded.train_data import ENTROPY_ROWS, make_batch


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


def test_batches_hold_ids_mask_and_rows_inside_answers(table: FragmentTable) -> None:
    batch = make_batch("k", 600, 3, table)
    assert batch.ids.shape == batch.answered.shape == (3, 600)
    assert batch.rows.shape == (3, ENTROPY_ROWS)
    assert 0.02 < batch.answered.mean() < 0.8
    assert batch.rows.min() >= 0 and batch.rows.max() < 600
    for document in range(3):
        predicts = batch.answered[document][np.minimum(batch.rows[document] + 1, 599)]
        assert predicts.mean() > 0.75
    again = make_batch("k", 600, 3, table)
    assert (again.ids == batch.ids).all() and (again.rows == batch.rows).all()
