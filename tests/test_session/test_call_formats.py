"""Calls written by real chat templates are read back: all formats, in any cuts of the stream."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfi_agent.session.events import ReasoningDelta, TextDelta, ToolCall
from sfi_agent.session.output.output_reader import ParsedOutput
from tests.call_templates import CALL_TEMPLATES
from tests.test_session.helpers import call_message
from tests.test_session.published_chats import Writer, Written, named, writer_of

TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "really": {"type": "boolean"},
    "maybe": {"type": "integer", "nullable": True},
    "words": {"type": "array", "items": {"type": "string"}},
    "deep": {"type": "object"},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "note_it",
        "description": "Note something.",
        "parameters": {"type": "object", "properties": TYPES, "required": []},
    },
}
OTHER = {**TOOL, "function": {**TOOL["function"], "name": "other-tool"}}


@lru_cache
def writer(name: str) -> Writer:
    return writer_of(name, [TOOL, OTHER])


def read(made: Writer, prompt: str, pieces: tuple[str, ...]) -> tuple[list[Any], ParsedOutput]:
    reader = made.reader(prompt)
    events = [event for piece in pieces for event in reader.feed_text(piece)]
    return [*events, *reader.finish()], reader.parsed


def require_consistent(events: list[Any], parsed: ParsedOutput) -> None:
    assert "".join(item.text for item in events if isinstance(item, TextDelta)) == parsed.text
    thoughts = [item.text for item in events if isinstance(item, ReasoningDelta)]
    assert "".join(thoughts) == parsed.reasoning
    assert tuple(item for item in events if isinstance(item, ToolCall)) == parsed.calls


PUBLISHED_FORMATS = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), "hermes"),
    **dict.fromkeys(("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), "qwen_xml"),
    **dict.fromkeys(("nemotron_3_5_lightning", "nemotron_3_nano"), "qwen_xml"),
    **dict.fromkeys(("nemotron_3_super", "nemotron_3_ultra"), "qwen_xml"),
    "glm4moe": "glm",
    **dict.fromkeys(("llama3_1", "llama3_2"), "llama"),
    "gptoss": "harmony",
    "muse_glimmer": "recipients",
    "deepseekv3": "deepseek",
    **dict.fromkeys(("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3"), "gemma"),
    **dict.fromkeys(("gemma4_v4", "gemma4_v5"), "gemma"),
    **dict.fromkeys(("lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), "pythonic"),
}
FORMATS = {**PUBLISHED_FORMATS, **{name: made.call_format for name, made in CALL_TEMPLATES.items()}}
DISTINCT = [
    *("qwen3", "qwen3_5_think", "qwen3_8", "nemotron_3_nano", "glm4moe", "llama3_1", "gptoss"),
    *("muse_glimmer", "deepseekv3", "gemma4", "lfm2_v2", "lfm2_2_5", *CALL_TEMPLATES),
]
"""Templates that write calls in ways of their own."""
ONE_CALL = ("llama3_1", "llama3_2", "gptoss")
# These templates write strings without escapes between quotes, and lists as Python does.
QUOTES_RAW_TEXT = ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")

letters = st.sampled_from([*"abc 01,.:;=()[]{}<>/", "é", "日", "\U0001f600", "\n", "</tool"])
quoted = st.sampled_from(['"', "'", "\\", "\\n", '\\"', "{'a': 1}", '{"name": "x"}', "null"])
plain_texts = st.lists(letters, max_size=12).map("".join)
rich_texts = st.lists(st.one_of(letters, quoted), max_size=12).map("".join)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


def arguments(texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    small = st.one_of(texts, st.integers(-9, 9), st.booleans())
    values: dict[str, st.SearchStrategy[Any]] = {
        "text": texts,
        "count": st.integers(-(10**20), 10**20),
        "ratio": numbers,
        "really": st.booleans(),
        "maybe": st.one_of(st.none(), st.integers(-3, 3)),
        "words": st.lists(texts, max_size=3),
        "deep": st.dictionaries(st.sampled_from(["a", "b_c"]), st.one_of(small, st.lists(small))),
    }
    return st.fixed_dictionaries({}, optional=values)


@pytest.mark.parametrize("name", named(FORMATS))
def test_the_format_is_found(name: str) -> None:
    assert writer(name).format.name == FORMATS[name]


@pytest.mark.parametrize("name", named(FORMATS))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_calls_are_read_back(name: str, data: st.DataObject) -> None:
    made = writer(name)
    texts = plain_texts if name in QUOTES_RAW_TEXT else rich_texts
    most = 1 if name in ONE_CALL else 3
    wanted = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["note_it", "other-tool"]), arguments(texts)),
            min_size=1,
            max_size=most,
        )
    )
    calls = [ToolCall(f"call_{n}", tool, values, "") for n, (tool, values) in enumerate(wanted)]
    written = made.write(call_message(*calls))
    events, parsed = read(made, written.prompt, written.pieces)
    assert [call.error for call in parsed.calls] == [None] * len(wanted)
    assert [(call.name, call.arguments) for call in parsed.calls] == wanted
    assert not parsed.text
    require_consistent(events, parsed)
    # Any cuts of the stream.
    cuts = sorted(data.draw(st.sets(st.integers(0, len(written.text)), max_size=6)))
    pieces = tuple(
        written.text[start:end]
        for start, end in zip([0, *cuts], [*cuts, len(written.text)], strict=True)
    )
    again, same = read(made, written.prompt, pieces)
    require_consistent(again, same)
    assert (same.calls, same.text, same.reasoning) == (parsed.calls, parsed.text, parsed.reasoning)


def written_calls(made: Writer, name: str) -> tuple[Written, list[tuple[str, dict[str, Any]]]]:
    """Calls with an argument of every type."""
    values = {
        "text": "two\nlines, {braces}",
        "count": 3,
        "ratio": 0.5,
        "really": True,
        "maybe": None,
        "words": ["a", "b c"],
        "deep": {"a": 1, "b_c": ["x", False]},
    }
    wanted: list[tuple[str, dict[str, Any]]]
    wanted = [("note_it", values), ("other-tool", {}), ("note_it", {"text": "x"})]
    wanted = wanted[: 1 if name in ONE_CALL else None]
    calls = [ToolCall(f"call_{n}", tool, given, "") for n, (tool, given) in enumerate(wanted)]
    return made.write(call_message(*calls)), wanted


@pytest.mark.parametrize("name", named(DISTINCT))
def test_every_cut_of_the_stream_reads_the_same(name: str) -> None:
    made = writer(name)
    written, wanted = written_calls(made, name)
    text = written.text
    _, whole = read(made, written.prompt, (text,))
    assert [(call.name, call.arguments) for call in whole.calls] == wanted
    assert all(call.error is None and call.raw_text for call in whole.calls)
    assert [call.id for call in whole.calls] == [f"call_{n}" for n in range(len(wanted))]
    letters = read(made, written.prompt, tuple(text))[1]
    assert letters == whole
    for place in range(1, len(text)):
        assert read(made, written.prompt, (text[:place], text[place:]))[1] == whole


@pytest.mark.parametrize("name", named(DISTINCT))
def test_a_truncated_call_is_never_run_as_another(name: str) -> None:
    made = writer(name)
    written, wanted = written_calls(made, name)
    broken = 0
    for end in range(len(written.text)):
        events, parsed = read(made, written.prompt, (written.text[:end],))
        require_consistent(events, parsed)
        good = [(call.name, call.arguments) for call in parsed.calls if call.error is None]
        assert good == wanted[: len(good)]
        bad = [call for call in parsed.calls if call.error is not None]
        assert len(bad) <= 1 and parsed.calls[len(good) :] == tuple(bad)
        for call in bad:
            broken += 1
            assert call.arguments == {}
            assert call.raw_text in written.text[:end]
    assert broken > 10


@pytest.mark.parametrize("name", named(DISTINCT))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damaged_calls_are_data(name: str, data: st.DataObject) -> None:
    made = writer(name)
    written, _ = written_calls(made, name)
    text = written.text
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    damaged = text[:start] + data.draw(st.text("<>{}[]()'\"=,:x|/ \n", max_size=3)) + text[end:]
    events, parsed = read(made, written.prompt, (damaged,))
    require_consistent(events, parsed)
    assert read(made, written.prompt, tuple(damaged))[1] == parsed
    for call in parsed.calls:
        assert isinstance(call.arguments, dict)
        assert call.error is None or (call.arguments == {} and len(call.error) > 5)


odd_pieces = st.sampled_from(
    [
        '{"name": "note_it", "arguments": {"text": "x"}}',
        '{"name": "note_it", "parameters": {}}',
        *"\"'\\{}[](),:= \n\0\u2028",
        *("note_it", "text", "Hello.", "None", "true", "NaN", "1e999", "9" * 5000, r"\ud800"),
        *("```json\n", "```", "<think>", "</think>", "call:", "to=", "functions.", "<arg_key>"),
        *("<function=note_it>", "</function>", "<parameter=text>", "</parameter>"),
        *("[" * 300, '{"text":' * 200),
    ]
)


@pytest.mark.parametrize("name", named(DISTINCT))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_whatever_is_written_reads_the_same_in_any_cuts(name: str, data: st.DataObject) -> None:
    made = writer(name)
    written, _ = written_calls(made, name)
    tags = list(made.format.call_style.tags) or ["<|channel|>", "<|message|>", "<|end|>"]
    starts = range(0, len(written.text), 7)
    parts = st.sampled_from([written.text[start : start + 20] for start in starts])
    pieces = data.draw(st.lists(odd_pieces | parts | st.sampled_from(tags), max_size=12))
    text = "".join(pieces)
    events, parsed = read(made, written.prompt, (text,))
    require_consistent(events, parsed)
    for call in parsed.calls:
        assert call.error is None or (call.arguments == {} and len(call.error) > 5)
        json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
    assert read(made, written.prompt, tuple(text[a:b] for a, b in ends))[1] == parsed


@pytest.mark.parametrize("name", named(DISTINCT))
def test_text_and_reasoning_beside_calls(name: str) -> None:
    made = writer(name)
    call = call_message(ToolCall("call_0", "note_it", {"count": 3}, ""), content="I note it.")
    form, seen = made.template.form, 0
    for extra in ({}, {"reasoning_content": "What is\nasked?"}):
        written = made.write({**call, **extra})
        _, parsed = read(made, written.prompt, written.pieces)
        ((tool, values),) = [(item.name, item.arguments) for item in parsed.calls]
        assert (tool, values) == ("note_it", {"count": 3})
        shows_text = "I note it." in written.text and not form.text_or_reasoning
        if shows_text and written.text.index("I note it.") < written.text.index("note_it"):
            seen += 1
            assert parsed.text == "I note it."
        shows_reasoning = bool(extra) and "What is\nasked?" in written.text
        assert (parsed.reasoning == "What is\nasked?") == shows_reasoning
    assert seen or name in SHOWS_NO_TEXT_BEFORE_CALLS


SHOWS_NO_TEXT_BEFORE_CALLS = {
    *("llama3_1", "llama3_2", "gptoss", "muse_glimmer"),
    *("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
}


@pytest.mark.parametrize("name", named(DISTINCT))
def test_answers_without_calls(name: str) -> None:
    made = writer(name)
    for extra in ({}, {"reasoning_content": "What is\nasked?"}):
        written = made.write({"role": "assistant", "content": "It is { 3 }.", **extra})
        events, parsed = read(made, written.prompt, written.pieces)
        require_consistent(events, parsed)
        assert parsed.calls == ()
        assert parsed.text == "It is { 3 }."
        shows_reasoning = bool(extra) and "What is\nasked?" in written.text
        assert (parsed.reasoning == "What is\nasked?") == shows_reasoning
