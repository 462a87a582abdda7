"""How tool calls are written well, in the formats to which they can be held.

`session/output/call_styles.py` says where calls stand and reads what a model wrote, broken or not;
a form says what may be written there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sfi_agent.session.output.call_styles import CallFormat, CallRegion, CallStyle

__all__ = ["BARE_OPENING", "ArgumentStyle", "CallForm", "call_forms", "layout_pattern"]

BARE_OPENING = '{"name":'
"""Behind this, white space left out, JSON at the start of an answer is a call and no answer."""

ArgumentStyle: TypeAlias = Literal[
    "json", "qwen_xml", "glm_xml", "minimax_xml", "deepseek_xml", "python", "braces"
]

_SAMPLE_ARGUMENTS: dict[ArgumentStyle, str] = {
    "json": '{"a": "b"}',
    "qwen_xml": "<parameter=a>\nb\n</parameter>",
    "glm_xml": "<arg_key>a</arg_key>\n<arg_value>b</arg_value>",
    "minimax_xml": '<parameter name="a">b</parameter>',
    "deepseek_xml": '<｜DSML｜parameter name="a" string="true">b</｜DSML｜parameter>',
    "python": "a='b'",
    "braces": 'a:<|"|>b<|"|>',
}
_PARTS = re.compile(r"(%[NDIH])")
_HEADER_REST = (
    r"(?: ?<\|channel\|>(?:commentary|analysis))?(?: ?(?:<\|constrain\|>)?json)?<\|message\|>"
)


@dataclass(frozen=True, slots=True)
class CallForm:
    """One way to write calls.

    Layouts are text in which a blank is at most one blank or line break, %N the tool's name, %D a
    number, %I an id of nine letters and digits, and %H the rest of a message's header.

    Attributes:
        opening: Text behind which calls are held.
        closing: Text that ends them; "" where they last until the turn ends.
        before: Layout between opening and arguments.
        after: Layout behind the arguments.
        arguments: How they are written.
        start, end: Layouts around all calls between one opening and its closing.
        between: Layout between two such calls; None where there is one only.
        again: `before` of the second call and further ones, where it differs.
        first_closing_ends: Whether readers take the closing for the end inside a string too.
    """

    opening: str
    closing: str
    before: str
    after: str = " "
    arguments: ArgumentStyle = "json"
    start: str = ""
    end: str = ""
    between: str | None = None
    again: str = ""
    first_closing_ends: bool = False

    @property
    def bare(self) -> bool:
        """Whether the opening is part of the call's JSON and counts only where an answer begins."""
        return self.opening == BARE_OPENING

    def sample(self, tool_name: str) -> tuple[str, str]:
        """A call with the argument a = "b", cut in two where the arguments begin."""
        head = self.opening + _written(self.start + self.before, tool_name)
        tail = _written(self.after + self.end, tool_name)
        return head, _SAMPLE_ARGUMENTS[self.arguments] + tail + self.closing


def layout_pattern(layout: str, tool_name: str) -> str:
    """A regular expression for what a layout allows."""
    patterns = {
        "%N": re.escape(tool_name),
        "%D": r"\d+",
        "%I": "[a-zA-Z0-9]{9}",
        "%H": _HEADER_REST,
    }
    return "".join(
        patterns[part] if part in patterns else re.escape(part).replace(r"\ ", r"[ \n]?")
        for part in _PARTS.split(layout)
    )


def _written(layout: str, tool_name: str) -> str:
    values = {
        "%N": tool_name,
        "%D": "0",
        "%I": "abcdefghi",
        "%H": " <|constrain|>json<|message|>",
    }
    return "".join(values.get(part, part) for part in _PARTS.split(layout))


def call_forms(
    call_format: CallFormat,
    style: CallStyle,
    template_source: str,
    stop_texts: Collection[str],
    *,
    first_closing_ends: bool,
) -> tuple[CallForm, ...]:
    """The forms of a format, one for each opening; none where no form of it is known.

    Args:
        call_format: Which format the chat template shows.
        style: Where its calls stand.
        template_source: Source of the chat template, for formats of several forms.
        stop_texts: Texts of the tokens that end a turn: none of them is a closing.
        first_closing_ends: See `CallForm`.
    """
    if call_format == "harmony":
        # The header names the tool. The token behind the arguments ends the turn.
        return (CallForm("to=", "", "functions.%N%H"),)
    make = _FORMS.get(call_format)
    if make is None or not style.regions:
        return ()
    region = style.regions[0]
    if region.closing in stop_texts:
        region = replace(region, closing="")
    forms = make(region, template_source)
    return tuple(replace(form, first_closing_ends=first_closing_ends) for form in forms)


def _object(key: str) -> str:
    return f' {{ "name" : "%N" , "{key}" : '


def _hermes(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    return (CallForm(region.opening, region.closing, _object("arguments"), " } "),)


def _tagged_json(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    key = "arguments" if '"arguments"' in source else "parameters"
    form = CallForm(region.opening, region.closing, _object(key), " } ")
    _, _, behind = source.partition(region.opening)
    return (_in_list(form) if behind.lstrip().startswith("[") else form,)


def _qwen_xml(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    whole = CallForm(region.opening, region.closing, " <function=%N> ", " </function> ", "qwen_xml")
    # Some models leave the outer tag out.
    return whole, CallForm("<function=", "</function>", "%N> ", " ", "qwen_xml")


def _glm(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    return (CallForm(region.opening, region.closing, "%N ", " ", "glm_xml"),)


def _llama(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    before = _object("parameters")
    tagged = CallForm(region.opening, "", before, " } ", between=" ; ")
    bare_before = before.partition(":")[2]
    return tagged, replace(tagged, opening=BARE_OPENING, before=bare_before, again=before)


def _mistral(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    opening = region.opening
    if "[ARGS]" not in source:
        return (_in_list(CallForm(opening, "", _object("arguments"), " } ")),)
    call_id = "[CALL_ID]%I" if "[CALL_ID]" in source else ""
    return (CallForm(opening, "", f" %N{call_id}[ARGS] ", " ", between=opening),)


def _deepseek(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    before, after = "%N<｜tool▁sep｜> ", " "
    if "```json" in source:
        before, after = "function<｜tool▁sep｜>%N\n```json\n", "\n```"
    return (CallForm(region.opening, region.closing, before, after),)


def _kimi(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    before = "functions.%N:%D<|tool_call_argument_begin|> "
    return (CallForm(region.opening, region.closing, before),)


def _cohere(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    before = ' { "tool_call_id" : "%D" , "tool_name" : "%N" , "parameters" : '
    return (_in_list(CallForm(region.opening, region.closing, before, " } ")),)


def _invoke(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    styles: Mapping[str, ArgumentStyle] = {
        "<invoke name=": "minimax_xml",
        "<｜DSML｜invoke name=": "deepseek_xml",
    }
    style = styles.get(region.opening)
    if style is None:
        return ()
    return (CallForm(region.opening, region.closing, '"%N"> ', " ", style),)


def _gemma(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    return (CallForm(region.opening, region.closing, "call:%N{", "}", "braces"),)


def _pythonic(region: CallRegion, source: str) -> tuple[CallForm, ...]:
    return (_in_list(CallForm(region.opening, region.closing, "%N(", ")", "python")),)


def _in_list(form: CallForm) -> CallForm:
    return replace(form, start=" [ ", between=" , ", end=" ] ")


_FORMS: Mapping[CallFormat, Callable[[CallRegion, str], tuple[CallForm, ...]]] = {
    "hermes": _hermes,
    "tagged_json": _tagged_json,
    "qwen_xml": _qwen_xml,
    "glm": _glm,
    "llama": _llama,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "kimi": _kimi,
    "cohere": _cohere,
    "invoke": _invoke,
    "gemma": _gemma,
    "pythonic": _pythonic,
}
