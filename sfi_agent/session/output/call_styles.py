"""In which format a checkpoint writes its tool calls, and where a call begins and ends in it.

The format is told by what the chat template itself writes, never by the name of a model: first by
tags in its source that belong to one format only, then by rendering a call and looking at it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sfi_agent.session.output.json_bodies import (
    json_calls,
    json_status,
    mistral_calls,
    named_json_calls,
    named_json_status,
    python_tag_calls,
)
from sfi_agent.session.output.loose_bodies import (
    braced_calls,
    braced_status,
    python_calls,
    python_status,
)
from sfi_agent.session.output.tagged_bodies import invoke_calls, key_value_calls, tagged_status
from sfi_agent.session.output.tool_calls import JSON_DECODER, BodyReader, BodyStatus, calls_in_value
from sfi_agent.session.templates.chat_template import ChatTemplate, RenderFailure, probe_text

__all__ = ["CallFormat", "CallRegion", "CallStyle", "call_style", "detect_call_format"]

CallFormat: TypeAlias = Literal[
    "hermes",
    "qwen_xml",
    "glm",
    "llama",
    "mistral",
    "harmony",
    "recipients",
    "deepseek",
    "kimi",
    "gemma",
    "pythonic",
    "cohere",
    "invoke",
    "tagged_json",
    "none",
]


@dataclass(frozen=True, slots=True)
class CallRegion:
    """Where calls stand in an answer.

    Attributes:
        opening: Text that begins them.
        closing: Text that ends them; "" where they last until the turn ends.
        keeps_tags: Whether the tags belong to the body.
    """

    opening: str
    closing: str
    keeps_tags: bool = False


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a format is read.

    Attributes:
        regions: The places of calls; which one it is, its opening says.
        read: Reads the body of a region.
        status: Whether a body is complete where a closing tag follows.
        ignored: Markup around calls that means nothing by itself.
        inner: Markup inside bodies.
    """

    regions: tuple[CallRegion, ...] = ()
    read: BodyReader = json_calls
    status: BodyStatus = json_status
    ignored: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """All markup of the format."""
        ends = [tag for region in self.regions for tag in (region.opening, region.closing) if tag]
        return (*ends, *self.ignored, *self.inner)


_STYLES: dict[CallFormat, CallStyle] = {
    "hermes": CallStyle((CallRegion("<tool_call>", "</tool_call>"),)),
    # Some models leave the outer tag out.
    "qwen_xml": CallStyle(
        (
            CallRegion("<tool_call>", "</tool_call>"),
            CallRegion("<function=", "</function>", keeps_tags=True),
        ),
        ignored=("</tool_call>",),
        inner=("<parameter=", "</parameter>"),
    ),
    "glm": CallStyle(
        (CallRegion("<tool_call>", "</tool_call>"),),
        key_value_calls,
        tagged_status("arg_value>", "arg_value"),
        inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "llama": CallStyle((CallRegion("<|python_tag|>", ""),), python_tag_calls),
    "mistral": CallStyle(
        (CallRegion("[TOOL_CALLS]", ""),), mistral_calls, inner=("[ARGS]", "[CALL_ID]")
    ),
    "deepseek": CallStyle(
        (CallRegion("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),),
        named_json_calls("<｜tool▁sep｜>"),
        named_json_status("<｜tool▁sep｜>"),
        ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        inner=("<｜tool▁sep｜>",),
    ),
    "kimi": CallStyle(
        (CallRegion("<|tool_call_begin|>", "<|tool_call_end|>"),),
        named_json_calls("<|tool_call_argument_begin|>"),
        named_json_status("<|tool_call_argument_begin|>"),
        ignored=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        inner=("<|tool_call_argument_begin|>",),
    ),
    "gemma": CallStyle(
        (CallRegion("<|tool_call>", "<tool_call|>"),),
        braced_calls('<|"|>'),
        braced_status('<|"|>'),
        inner=('<|"|>',),
    ),
    "pythonic": CallStyle(
        (CallRegion("<|tool_call_start|>", "<|tool_call_end|>"),), python_calls, python_status
    ),
    "cohere": CallStyle((CallRegion("<|START_ACTION|>", "<|END_ACTION|>"),)),
}

_MARKS: tuple[tuple[tuple[str, ...], CallFormat], ...] = (
    (("<|channel|>", "<|message|>"), "harmony"),
    (("to=self", "<|message|>"), "recipients"),
    (("<|tool_call>call:",), "gemma"),
    (("<|tool_call_start|>",), "pythonic"),
    (("<|tool_list_start|>",), "pythonic"),
    (("<|tool_call_begin|>",), "kimi"),
    (("<｜tool▁call▁begin｜>",), "deepseek"),
    (("<|START_ACTION|>",), "cohere"),
    (("invoke name=",), "invoke"),
    (("<arg_key>",), "glm"),
    (("<function=",), "qwen_xml"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama"),
    (('"name"', '"parameters"', "tool_calls"), "llama"),
)
"""Texts that only templates of a format hold together; the first that fit decide."""
_INVOKE_PREFIX = re.compile(r'<([^\s<>"\']*?)invoke name=')
_WRAPPERS = ("function_calls", "tool_calls", "tool_call")
_LONGEST_OPENING = 64


def detect_call_format(template_source: str) -> CallFormat:
    """The call format that a chat template's source shows.

    | format | a call |
    |---|---|
    | hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
    | qwen_xml | `<tool_call><function=name><parameter=key>value</parameter></function>...` |
    | glm | `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>` |
    | llama | `{"name": ..., "parameters": {...}}` as the whole message, or after a tag |
    | mistral | `[TOOL_CALLS][{...}]` or `[TOOL_CALLS]name[ARGS]{...}` |
    | harmony | a message on the channel commentary to `functions.name` |
    | recipients | a message `to=name` with an invoke block |
    | deepseek | `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>` |
    | kimi | `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}` |
    | gemma | `<|tool_call>call:name{key:value}<tool_call|>` |
    | pythonic | `<|tool_call_start|>[name(key=value)]<|tool_call_end|>` |
    | cohere | `<|START_ACTION|>[{"tool_name": ..., "parameters": {...}}]<|END_ACTION|>` |
    | invoke | `<invoke name="name"><parameter name="key">value</parameter></invoke>`, any prefix |
    | tagged_json | JSON between other tags, found by rendering a call (`call_style`) |
    | none | a template that writes no calls |
    """
    for texts, call_format in _MARKS:
        if all(text in template_source for text in texts):
            return call_format
    return "none"


def call_style(
    template_source: str, renderer: Callable[[], ChatTemplate] | None = None
) -> tuple[CallFormat, CallStyle]:
    """The format of a chat template's calls, and how it is read.

    Args:
        template_source: Source of the chat template.
        renderer: Makes the template, to render a call with where the source does not tell.
    """
    call_format = detect_call_format(template_source)
    if call_format == "none" and renderer is not None:
        return _rendered_style(renderer())
    if call_format in ("invoke", "recipients"):
        return call_format, _invoke_style(template_source)
    return call_format, _STYLES.get(call_format, CallStyle())


def _invoke_style(source: str) -> CallStyle:
    match = _INVOKE_PREFIX.search(source)
    prefix = match.group(1) if match else ""
    names = [f"{prefix}{name}" for name in _WRAPPERS] + [f"minimax:{name}" for name in _WRAPPERS]
    return CallStyle(
        (CallRegion(f"<{prefix}invoke name=", f"</{prefix}invoke>", keeps_tags=True),),
        invoke_calls,
        tagged_status(f"{prefix}parameter name=", f"{prefix}parameter"),
        ignored=tuple(
            tag for name in names if f"<{name}>" in source for tag in (f"<{name}>", f"</{name}>")
        ),
        inner=(f"<{prefix}parameter name=", f"</{prefix}parameter>"),
    )


def _rendered_style(template: ChatTemplate) -> tuple[CallFormat, CallStyle]:
    """Calls in JSON between tags that are not known here."""
    name, value = probe_text(), probe_text()
    function = {"name": name, "arguments": {"text": value}}
    call = {"id": "call_0", "type": "function", "function": function}
    begun = [*template.opening, {"role": "user", "content": "u"}]
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        prompt = template.render(begun, generation_prompt=True)
        whole = template.render([*begun, assistant], generation_prompt=False)
    except RenderFailure:
        return "none", CallStyle()
    tokens = template.control_tokens
    output = tokens.plain(whole[tokens.shared(prompt, whole) :])
    for start, letter in enumerate(output):
        if letter not in "[{":
            continue
        try:
            found, end = JSON_DECODER.raw_decode(output, start)
        except ValueError:
            continue
        calls = calls_in_value(found, "")
        if [(item.name, item.arguments) for item in calls] == [(name, {"text": value})]:
            return _json_between(output[:start].strip(), output[end:].strip())
    return "none", CallStyle()


def _json_between(opening: str, rest: str) -> tuple[CallFormat, CallStyle]:
    if not opening:
        return "llama", _STYLES["llama"]
    closing = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]|```", rest)
    region = CallRegion(opening[-_LONGEST_OPENING:], closing.group() if closing else "")
    return "tagged_json", CallStyle((region,))
