"""Outputs of messages with headers: reasoning, text and calls, however they are addressed."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent.session.output.call_styles import call_style
from sfi_agent.session.output.channel_splitter import ChannelSplitter
from sfi_agent.session.output.output_reader import OutputReader, ParsedOutput

PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
THINKS = "<|channel|>analysis<|message|>Hm.<|end|>"
NEXT = "<|start|>assistant"
INVOKE = (
    '<atem:function_calls>\n<atem:invoke name="f">\n'
    '<atem:parameter name="a">1</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
_, RECIPIENTS = call_style('to=self <|message|> <atem:function_calls> <atem:invoke name="')
SCHEMAS: dict[str, Any] = {"f": {"properties": {"a": {"type": "integer"}}}}


def parse(text: str, prompt: str = PROMPT, *, harmony: bool = True, tools: bool = True) -> Any:
    readings: list[ParsedOutput] = []
    for pieces in ([text], list(text), [text[:7], text[7:]]):
        splitter = ChannelSplitter(
            None if harmony else RECIPIENTS, reads_calls=tools, prompt_text=prompt, schemas=SCHEMAS
        )
        reader = OutputReader(splitter)
        for piece in pieces:
            reader.feed_text(piece)
        reader.finish()
        readings.append(reader.parsed)
    assert readings[0] == readings[1] == readings[2]
    return readings[0]


@pytest.mark.parametrize(
    ("written", "text", "reasoning", "calls"),
    [
        (f"{FINAL}Hello.<|return|>", "Hello.", "", []),
        (f"{FINAL}Hello.", "Hello.", "", []),
        (f"{THINKS}{NEXT}{FINAL}Yes.<|return|>", "Yes.", "Hm.", []),
        (f"{THINKS}{NEXT}{THINKS}{NEXT}{FINAL}Yes.", "Yes.", "Hm.\nHm.", []),
        (
            f"{THINKS}{NEXT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
            '{"a": 1}<|call|>',
            "",
            "Hm.",
            [("f", {"a": 1})],
        ),
        (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}', "", "", [("f", {"a": 1})]),
        (
            f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}"
            '<|channel|>commentary to=f<|message|>{"a": 1}<|call|>',
            "I look.",
            "",
            [("f", {"a": 1})],
        ),
        (f"<|channel|>commentary<|message|>One.<|end|>{NEXT}{FINAL}Two.", "One.\nTwo.", "", []),
        ("Hello without any channel.", "Hello without any channel.", "", []),
        ("x" * 900, "x" * 900, "", []),
        ("", "", "", []),
        ("<|channel|>fin", "", "", []),
        (" to=functions.f<|chan", "", "", []),
        (f"{THINKS}<|start|>assis", "", "Hm.", []),
        ("<|channel|>analysis<|message|>cut <|en", "", "cut <|en", []),
    ],
)
def test_channels(written: str, text: str, reasoning: str, calls: list[Any]) -> None:
    parsed = parse(written)
    assert (parsed.text, parsed.reasoning) == (text, reasoning)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert all(call.error is None for call in parsed.calls)


@pytest.mark.parametrize(
    ("written", "name", "raw_text"),
    [
        ('<|channel|>commentary to=functions.f<|message|>{"a": 1<|call|>', "f", '{"a": 1'),
        ("<|channel|>analysis to=python code<|message|>print(3)<|call|>", "python", "print(3)"),
        ("<|channel|>commentary to=functions.f<|message|>[1]<|call|>", "f", "[1]"),
        ("<|channel|>commentary to=functions.f<|message|>", "f", ""),
    ],
)
def test_broken_calls_keep_name_and_text(written: str, name: str, raw_text: str) -> None:
    (call,) = parse(written).calls
    assert call.error is not None
    assert (call.name, call.raw_text, call.arguments) == (name, raw_text, {})


def test_without_tools_what_is_addressed_to_one_is_text() -> None:
    written = '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
    parsed = parse(written, tools=False)
    assert parsed.calls == () and parsed.text == '{"a": 1}'


def test_a_header_that_the_prompt_began() -> None:
    prompt = f"{PROMPT}<|channel|>analysis<|message|>"
    parsed = parse(f"Hm.<|end|>{NEXT}{FINAL}Yes.", prompt)
    assert (parsed.reasoning, parsed.text) == ("Hm.", "Yes.")
    parsed = parse(f"{FINAL}Yes.", "no header at all")
    assert parsed.text == "Yes."


@pytest.mark.parametrize(
    ("written", "text", "reasoning", "calls"),
    [
        (" to=user<|message|>Hello.", "Hello.", "", []),
        (f" to=self<|message|>Hm.<|eom|>{NEXT} to=user<|message|>Yes.", "Yes.", "Hm.", []),
        (f" to=f<|message|>{INVOKE}", "", "", [("f", {"a": 1})]),
        (
            f" to=f<|message|>{INVOKE}<|eom|>{NEXT} to=f<|message|>{INVOKE}<|eot|>",
            "",
            "",
            [("f", {"a": 1})] * 2,
        ),
    ],
)
def test_recipients(written: str, text: str, reasoning: str, calls: list[Any]) -> None:
    parsed = parse(written, harmony=False)
    assert (parsed.text, parsed.reasoning) == (text, reasoning)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls


def test_a_message_to_a_tool_without_a_call_is_a_broken_call() -> None:
    (call,) = parse(" to=f<|message|>please<|eot|>", harmony=False).calls
    assert (call.name, call.raw_text) == ("f", "please") and call.error is not None
    (call,) = parse(f" to=f<|message|>{INVOKE[:60]}", harmony=False).calls
    assert call.name == "f" and call.error is not None


def test_where_it_stands_is_known_and_copied() -> None:
    splitter = ChannelSplitter(None, reads_calls=True, prompt_text=PROMPT)
    assert not splitter.in_reasoning and not splitter.in_call
    splitter.feed("<|channel|>analysis<|message|>Hm")
    assert splitter.in_reasoning
    twin = splitter.copy()
    splitter.feed(f"<|end|>{NEXT} to=functions.f<|message|>")
    assert splitter.in_call and not splitter.in_reasoning
    assert twin.in_reasoning and not twin.in_call
