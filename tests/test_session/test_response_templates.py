"""Response templates in the manner of published families, on what real chat templates write."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from sfi_agent.session.events import ToolCall
from sfi_agent.session.output.output_reader import OutputFormat
from tests.published_templates import family_of, needs_published_templates, source_of
from tests.test_session.helpers import call_message
from tests.test_session.published_chats import Writer, chat_of
from tests.test_session.test_call_formats import OTHER, TOOL, read, require_consistent
from tests.tiny_tokenizers import chatml_tokenizer

pytestmark = needs_published_templates

_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_CHATML: dict[str, Any] = {"version": 1, "start_anchor": "<|im_start|>assistant\n"}
_THINK = {"open": "<think>", "close": "</think>"}
_TAGS = {"name": "text"}

TEMPLATES: dict[str, dict[str, Any]] = {
    "qwen3": {
        **_CHATML,
        "fields": {
            "reasoning_content": _THINK,
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    },
    "qwen3_5_think": {
        **_CHATML,
        "fields": {
            "reasoning_content": _THINK,
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[\w-]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>\w+)>\n(?P<value>.*?)\n</parameter>",
                    "value_parser": _TAGS,
                },
                "transform": _FUNCTION,
            },
            "content": {},
        },
    },
    "glm4moe": {
        "version": 1,
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": _THINK,
            "tool_calls": {
                "open_pattern": r"<tool_call>(?P<name>[\w-]+)\n",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>\w+)</arg_key>\n"
                    r"<arg_value>(?P<value>.*?)</arg_value>",
                    "value_parser": _TAGS,
                },
                "transform": _FUNCTION,
            },
            "content": {},
        },
    },
    "gptoss": {
        "version": 1,
        "start_anchor": "<|start|>assistant",
        "fields": {
            "thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
            "tool_calls": {
                "open_pattern": r"(?:<\|start\|>assistant)? to=functions\.(?P<name>[\w-]+)"
                r"<\|channel\|>commentary json<\|message\|>",
                "close": "<|call|>",
                "repeats": True,
                "content": "json",
                "transform": _FUNCTION,
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>"
            },
        },
    },
    "gemma4": {
        "version": 1,
        "start_anchor": "<|turn>model\n",
        "fields": {
            "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
            "tool_calls": {
                "open_pattern": r"<\|tool_call>call:(?P<name>[\w-]+)",
                "close": "<tool_call|>",
                "repeats": True,
                "content": "json",
                "content_args": {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True},
                "transform": _FUNCTION,
            },
            "content": {},
        },
    },
}


@lru_cache
def writer(name: str) -> Writer:
    """Written by the chat template, read by the response template."""
    family, chat = family_of(name), chat_of(name, [TOOL, OTHER])
    tokenizer = chatml_tokenizer(
        source_of(name),
        response_template=TEMPLATES[name],
        special_tokens=family.special,
        markup_tokens=family.markup,
        eos_token=family.eos,
        bos_token=family.bos,
    )
    reads = OutputFormat(tokenizer, chat.template.source, [TOOL, OTHER], chat.stops)
    return Writer(chat, reads)


VALUES: dict[str, Any] = {
    "text": "two\nlines, {braces}",
    "count": 3,
    "really": True,
    "words": ["a", "b c"],
    "deep": {"a": 1},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_read_in_any_cuts(name: str) -> None:
    made = writer(name)
    assert made.format.name == "response_template"
    values = dict(VALUES)
    if name == "qwen3_5_think":
        del values["really"]  # This chat template writes True, which is no JSON.
    wanted: list[tuple[str, dict[str, Any]]] = [("note_it", values), ("other-tool", {"count": 4})]
    wanted = wanted[: 1 if name == "gptoss" else None]
    calls = [ToolCall(f"call_{n}", tool, given, "") for n, (tool, given) in enumerate(wanted)]
    written = made.write(call_message(*calls))
    events, parsed = read(made, written.prompt, written.pieces)
    require_consistent(events, parsed)
    assert [(call.name, call.arguments) for call in parsed.calls] == wanted
    assert all(call.error is None for call in parsed.calls)
    text = written.text
    for place in range(1, len(text)):
        assert read(made, written.prompt, (text[:place], text[place:]))[1] == parsed
    for end in range(0, len(text), 3):
        events, cut = read(made, written.prompt, (text[:end],))
        require_consistent(events, cut)
        good = [(call.name, call.arguments) for call in cut.calls if call.error is None]
        assert good == wanted[: len(good)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_reasoning_are_read(name: str) -> None:
    made = writer(name)
    answer = {"role": "assistant", "content": "It is {3}.", "reasoning_content": "What is it?"}
    written = made.write(answer)
    events, parsed = read(made, written.prompt, written.pieces)
    require_consistent(events, parsed)
    assert parsed.text == "It is {3}." and parsed.calls == ()
    assert parsed.reasoning == ("What is it?" if "What is it?" in written.text else "")
    assert read(made, written.prompt, tuple(written.text))[1] == parsed
