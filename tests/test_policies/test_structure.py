"""`structure`: where pieces of layout start."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import ConfigError, TokenEvent
from sfi_policies import Structure, StructureConfig
from tests.test_policies.script_tokenizers import (
    TOKENIZER_NAMES,
    boundary_tokens,
    decode_with,
    encode,
    tokenizer_named,
    tokens_that_complete,
    unmark,
)
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer

# `|` stands before every character that starts a piece.
LAYOUTS = {
    "prose": "No layout here. Only text, and (more) text.\nAnd a line.",
    "blank lines": "One.\n\n|Two.\n \t\n\n|Three.\nFour.",
    "first lines": "\n\nOne.",
    "bullets": "List:\n- |one\n- |two\n  * |three\n+ |four\n• |five\nend",
    "numbers": "List:\n1. |one\n2) |two\n10. |ten\na) |a\nB. |b",
    "no bullets": "a - b\n-x\n1.5 is\n12345. Many\n* |yes",
    "one boundary for a blank line and a marker": "List:\n\n|- one\n\n|1. one",
    "quoted list": "> - |one\n> - |two",
    "code": "Look:\n```python\n|x = 1\n- y\n1. z\n<tool_call>\n\n|def f():\n```\n|Done.",
    "code after a blank line": "Look:\n\n|```\nx\n```\n\n|Done.",
    "tildes": "Look:\n~~~\n|```\n- x\n~~~\n|Done",
    "longer fence": "Look:\n````\n|```\nx\n````\n|Done",
    "no code": "a ```b``` c\n`` x\nd",
    "spelled tags": "So <thinking>\n|hm\n</thinking>\n\n|yes <function=search>|x</function>|y",
    "square tags": "a [TOOL_CALLS] |b [tool](x) [1] c",
    "tag with attributes": 'a <invoke name="x">|b',
    "other tags": "a <b>c</b> <br/> d < e > f <image> g",
    "tag begun on a reported line": "a\n\n|b <reasoning>|c",
}


def detector_for(tokenizer: Any) -> Structure:
    return Structure(StructureConfig(), tokenizer)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
def test_pieces_start_where_expected(tokenizer_name: str, name: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    text, offsets = unmark(LAYOUTS[name])
    ids = encode(tokenizer, text)
    expected = tokens_that_complete(tokenizer, ids, offsets)
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == expected


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_tags_that_are_tokens_count_by_id(skip_special_tokens: bool) -> None:
    tokenizer = chatml_tokenizer(
        special_tokens=("<|python_tag|>",), markup_tokens=("[TOOL_CALLS]",)
    )
    detector = detector_for(tokenizer)
    marked = (
        "<think>\n¦Let me see.\n</think>\n\n¦I call <tool_call>\n¦{}\n</tool_call>\n<tool_call>\n"
        '¦{"a": 1}\n</tool_call><|python_tag|>¦x[TOOL_CALLS] ¦y<|im_start|>z'
    )
    text, offsets = unmark(marked, "¦")
    ids = encode(tokenizer, text)
    pieces = [tokenizer.decode([token_id]) for token_id in ids]
    assert "".join(pieces) == text
    special = set(tokenizer.all_special_ids)
    detector.reset([], "")
    found = []
    for index, (token_id, piece) in enumerate(zip(ids, pieces, strict=True)):
        shown = "" if skip_special_tokens and token_id in special else piece
        if detector.after_token(TokenEvent(token_id, index, shown)):
            found.append(index)
    assert found == tokens_that_complete(tokenizer, ids, offsets)


@pytest.mark.parametrize("tag", ["<｜tool▁calls▁begin｜>", "<|python_tag|>", "</think>"])
def test_tags_in_the_spelling_of_families(tag: str) -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, f"a {tag} b")
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == [len(ids) - 1]


def test_reasons_name_the_piece() -> None:
    tokenizer = chatml_tokenizer()
    text = "<think>\nhm\n</think>\n\nSo:\n- one\n\nTwo\n```\nx\n```\nEnd<tool_call>\n{"
    answers = decode_with(detector_for(tokenizer), tokenizer, encode(tokenizer, text))
    assert [answer.reason for answer in answers if answer] == [
        "structure: think tag",
        "structure: think tag",
        "structure: list item",
        "structure: blank line",
        "structure: code fence",
        "structure: end of code",
        "structure: tool-call tag",
    ]
    assert {answer.when for answer in answers if answer} == {"next"}


def test_the_prompt_gives_the_line() -> None:
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)

    def starts(prompt: str, text: str) -> list[int]:
        prompt_ids = tuple(encode(tokenizer, prompt))
        return boundary_tokens(detector, tokenizer, encode(tokenizer, text), prompt_ids)

    assert starts("So 1", ". x") == []
    assert starts("So\n1", ". x") == [2]
    assert starts("So\n\n", "x") == []
    assert starts("So", "\n\nx") == []


def test_long_lines_and_open_brackets_do_not_grow_the_state() -> None:
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)
    sizes = []
    for count in (500, 5000):
        boundary_tokens(detector, tokenizer, encode(tokenizer, "<" + "x" * count))
        sizes.append(len(repr(detector.snapshot())))
    assert abs(sizes[0] - sizes[1]) < 4


def test_without_a_tokenizer_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="'structure'.*no tokenizer"):
        detector_for(None)
