"""Raw output in, text, reasoning and calls out: streamed in any cuts, the same as at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.errors import TemplateError
from sfi_agent.session.events import ReasoningDelta, TextDelta, ToolCall
from sfi_agent.session.output.output_reader import OutputFormat, ParsedOutput, parse_output
from sfi_agent.session.output.text_stream import TextStream
from tests import chat_templates
from tests.test_session.helpers import FAMILIES, SEARCH
from tests.tiny_tokenizers import HERMES_RESPONSE_TEMPLATE, chatml_tokenizer

PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
KINDS = ("family", "response_template")
F = '{"name": "f", "arguments": {"a": 1}}'


def make(family: str = "CHATML", *, response: bool = False, tools: bool = True) -> Any:
    special, eos, bos = FAMILIES[family]
    source = getattr(chat_templates, family)
    template = HERMES_RESPONSE_TEMPLATE if response else None
    tokenizer = chatml_tokenizer(
        source, response_template=template, special_tokens=special, eos_token=eos, bos_token=bos
    )
    schemas = [SEARCH] if tools else []
    stops = frozenset({tokenizer.eos_token_id})
    return tokenizer, OutputFormat(tokenizer, source, schemas, stops)


FORMATS = {kind: make(response=kind == "response_template") for kind in KINDS}


def parse(made: Any, text: str, prompt: str = PROMPT, first: int = 0) -> ParsedOutput:
    tokenizer, output_format = made
    ids = tokenizer.encode(text, add_special_tokens=False)
    return parse_output(output_format, tokenizer, ids, prompt_text=prompt, first_call_number=first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("written", "text", "reasoning", "calls"),
    [
        ("Hello  world.", "Hello  world.", "", []),
        (f"<tool_call>\n{F}\n</tool_call>", "", "", ["f"]),
        (f"Let me see.\n\n<tool_call>{F}</tool_call>\n", "Let me see.", "", ["f"]),
        (f"a<tool_call>{F}</tool_call><tool_call>{F}</tool_call>b", "a\nb", "", ["f", "f"]),
        ("<think>\nhm\n</think>\n\nYes.", "Yes.", "hm", []),
        (f"<think>hm</think>\n<tool_call>{F}</tool_call>", "", "hm", ["f"]),
        ("<think>cut", "", "cut", []),
        ("a < b and <tool", "a < b and <tool", "", []),
        ("Yes.<|im_end|>", "Yes.", "", []),
        ("odd<|endoftext|>ly", "oddly", "", []),
        ("", "", "", []),
    ],
)
def test_parts(kind: str, written: str, text: str, reasoning: str, calls: list[str]) -> None:
    parsed = parse(FORMATS[kind], written)
    assert (parsed.text, parsed.reasoning) == (text, reasoning)
    assert [call.name for call in parsed.calls] == calls
    assert all(call.error is None and call.arguments == {"a": 1} for call in parsed.calls)


def test_white_space_at_the_ends_is_the_response_templates_decision() -> None:
    for written, stripped in (("  a  b \n", "a  b"), ("\n\n", "")):
        assert parse(FORMATS["family"], written).text == written
        assert parse(FORMATS["response_template"], written).text == stripped
        fields = dict(HERMES_RESPONSE_TEMPLATE["fields"])
        fields["content"] = {**fields["content"], "content_args": {"strip": False}}
        tokenizer = chatml_tokenizer(
            response_template={**HERMES_RESPONSE_TEMPLATE, "fields": fields}
        )
        keeping = (tokenizer, OutputFormat(tokenizer, chat_templates.CHATML))
        assert parse(keeping, written).text == written


@pytest.mark.parametrize("kind", KINDS)
def test_broken_calls_cost_only_themselves(kind: str) -> None:
    written = (
        f"One.<tool_call>{F}</tool_call>Two.<tool_call>{{'name': 'g'}}</tool_call>"
        '<tool_call>{"name": "h", "arguments": {"x": "</tool_c'
    )
    parsed = parse(FORMATS[kind], written, first=4)
    assert parsed.text == "One.\nTwo."
    assert [call.id for call in parsed.calls] == ["call_4", "call_5", "call_6"]
    good, broken, cut = parsed.calls
    assert good.error is None
    assert broken.error and broken.raw_text == "{'name': 'g'}" and broken.arguments == {}
    assert cut.error and cut.name == "h" and cut.raw_text.endswith("</tool_c")


def test_a_closing_tag_inside_an_argument_is_part_of_it() -> None:
    inner = '{"name": "f", "arguments": {"code": "x = \'</tool_call>\'"}}'
    parsed = parse(FORMATS["family"], f"<tool_call>{inner}</tool_call>done")
    assert parsed.calls[0].arguments == {"code": "x = '</tool_call>'"}
    assert parsed.text == "done"


def test_a_forgotten_quote_does_not_swallow_the_next_call() -> None:
    parsed = parse(
        FORMATS["family"],
        '<tool_call>{"name": "g", "arguments": {"q": "x}}</tool_call>'
        f"<tool_call>{F}</tool_call>",
    )
    assert [(call.name, call.error is None) for call in parsed.calls] == [("g", False), ("f", True)]
    alone = parse(FORMATS["family"], '<tool_call>{"name": "g, "a": 1}</tool_call> text')
    assert alone.calls[0].error and alone.text == "text"


@pytest.mark.parametrize("kind", KINDS)
def test_reasoning_that_the_prompt_began(kind: str) -> None:
    parsed = parse(FORMATS[kind], "hm\n</think>\n\nYes.", PROMPT + "<think>\n")
    assert (parsed.text, parsed.reasoning) == ("Yes.", "hm")
    closed = parse(FORMATS[kind], "Yes.", PROMPT + "<think>\n\n</think>\n\n")
    assert (closed.text, closed.reasoning) == ("Yes.", "")


@pytest.mark.parametrize("kind", KINDS)
def test_reasoning_tokens_are_counted_with_their_tags(kind: str) -> None:
    tokenizer, _ = FORMATS[kind]
    inside = len(tokenizer.encode("hm hm", add_special_tokens=False))
    assert parse(FORMATS[kind], "<think>hm hm</think>Yes.").reasoning_tokens == inside + 2
    assert parse(FORMATS[kind], "Yes.").reasoning_tokens == 0


def test_without_tools_markup_is_text() -> None:
    parsed = parse(make(tools=False), f"<tool_call>{F}</tool_call>")
    assert parsed.calls == () and parsed.text == f"<tool_call>{F}</tool_call>"
    parsed = parse(make("LLAMA", tools=False), '{"name": "f", "parameters": {}}')
    assert parsed.calls == () and parsed.text == '{"name": "f", "parameters": {}}'


@pytest.mark.parametrize(
    ("family", "written", "text", "calls"),
    [
        ("LLAMA", '{"name": "f", "parameters": {"a": 1}}<|eot_id|>', "", 1),
        ("LLAMA", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|eom_id|>', "", 1),
        ("LLAMA", '{"answer": 42}', '{"answer": 42}', 0),
        ("LLAMA", '{"name": "Ada", "age": 3}', '{"name": "Ada", "age": 3}', 0),
        ("LLAMA", 'Say {"name": "f"}', 'Say {"name": "f"}', 0),
        ("MISTRAL", f"[TOOL_CALLS][{F}]</s>", "", 1),
        ("MISTRAL", 'See.[TOOL_CALLS]f[ARGS]{"a": 1}</s>', "See.", 1),
        ("GEMMA", "<tool_call>plain", "<tool_call>plain", 0),
    ],
)
def test_other_families(family: str, written: str, text: str, calls: int) -> None:
    parsed = parse(make(family), written)
    assert (parsed.text, len(parsed.calls)) == (text, calls)
    assert all(call.error is None and call.arguments == {"a": 1} for call in parsed.calls)


def stream(made: Any, ids: list[int]) -> tuple[list[Any], ParsedOutput]:
    tokenizer, output_format = made
    reader, text = output_format.reader(PROMPT), TextStream(tokenizer)
    events = [event for index in ids for event in reader.feed(index, text.push(index))]
    events += reader.feed_text(text.finish())
    return [*events, *reader.finish()], reader.parsed


PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", F, '{"name": "g', "\n", " ", "<",
         "</tool", "text", "é", "<|im_end|>", '"', "{", "}", "<tool_call"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(written=PIECES)
def test_streamed_events_are_the_parsed_output(kind: str, written: str) -> None:
    tokenizer, _ = FORMATS[kind]
    ids = tokenizer.encode(written, add_special_tokens=False)
    events, parsed = stream(FORMATS[kind], ids)
    assert "".join(item.text for item in events if isinstance(item, TextDelta)) == parsed.text
    thoughts = [item.text for item in events if isinstance(item, ReasoningDelta)]
    assert "".join(thoughts) == parsed.reasoning
    assert tuple(item for item in events if isinstance(item, ToolCall)) == parsed.calls
    assert [call.id for call in parsed.calls] == [f"call_{n}" for n in range(len(parsed.calls))]
    # One token at a time or all text at once: the cuts make no difference.
    reader = FORMATS[kind][1].reader(PROMPT)
    reader.feed_text(tokenizer.decode(ids).replace("<|im_end|>", ""))
    reader.finish()
    whole = reader.parsed
    assert (whole.text, whole.reasoning, whole.calls) == (
        parsed.text,
        parsed.reasoning,
        parsed.calls,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_at_once_and_tags_are_held_back(kind: str) -> None:
    reader = FORMATS[kind][1].reader(PROMPT)
    assert reader.feed_text("One") == [TextDelta("One")]
    assert reader.feed_text(" two <tool") == [TextDelta(" two")]
    assert reader.feed_text("box> x") == [TextDelta(" <toolbox> x")]
    assert reader.feed_text("<tool_call>" + F) == []
    events = [*reader.feed_text("</tool_call>"), *reader.feed_text(" ")]
    assert len(events) == 1
    event = events[0]
    assert isinstance(event, ToolCall) and event.name == "f"


def test_the_message_of_an_output() -> None:
    parsed = parse(FORMATS["family"], f"<think>hm</think>A<tool_call>{F}</tool_call><tool_call>{{")
    message = parsed.as_message()
    assert message["content"] == "A" and message["reasoning_content"] == "hm"
    good, broken = message["tool_calls"]
    function = {"name": "f", "arguments": {"a": 1}}
    assert good == {"id": "call_0", "type": "function", "function": function}
    assert broken["function"] == {"name": "unknown", "arguments": {"raw_text": "{"}}
    assert parse(FORMATS["family"], "A").as_message() == {"role": "assistant", "content": "A"}


XML_RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>\w+)>\s*(?P<value>.*?)\s*</parameter>"
            },
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>"},
    },
}  # fmt: skip


def test_response_templates_with_captures_and_types() -> None:
    tokenizer = chatml_tokenizer(response_template=XML_RESPONSE_TEMPLATE)
    made = (tokenizer, OutputFormat(tokenizer, chat_templates.CHATML, [SEARCH]))
    body = "<function=search><parameter=query>Ada</parameter></function>"
    parsed = parse(made, f"<think>t</think>Go <tool_call>{body}</tool_call>")
    assert parsed.reasoning == "t" and parsed.text == "Go"
    (call,) = parsed.calls
    assert (call.name, call.arguments, call.error) == ("search", {"query": "Ada"}, None)
    # A call that is cut off may lack a parameter without a sign of it: it is never run.
    (cut,) = parse(made, f"<tool_call>{body}").calls
    assert cut.name == "search" and cut.error == "it is not closed"


def test_calls_of_a_list_in_a_response_template() -> None:
    template: dict[str, Any] = {
        "version": 1,
        "start_anchor": "assistant\n",
        "fields": {
            "tool_calls": {
                "open": "[CALLS]",
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{arguments}"},
                },
                "transform_each": True,
            },
            "content": {},
        },
    }
    tokenizer = chatml_tokenizer(response_template=template)
    made = (tokenizer, OutputFormat(tokenizer))
    parsed = parse(made, f"x[CALLS][{F}, {F}]")
    assert [call.arguments for call in parsed.calls] == [{"a": 1}, {"a": 1}]
    (broken,) = parse(made, '[CALLS][{"name": "f"}]').calls
    assert broken.error is not None and broken.name == "f"


def test_a_response_template_that_cannot_be_read_is_a_template_error() -> None:
    broken: list[dict[str, Any]] = [
        {"fields": {}},
        {"fields": {"content": {"open_pattern": "("}}},
        {"x": 1},
    ]
    for template in broken:
        tokenizer = chatml_tokenizer(response_template=template)
        with pytest.raises(TemplateError, match="response template"):
            OutputFormat(tokenizer).reader()
