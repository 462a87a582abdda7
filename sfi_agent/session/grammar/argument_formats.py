"""Arguments of a call as formats of xgrammar's structural tags.

Arguments in JSON are xgrammar's own business. Where every argument has a tag of its own, xgrammar
lets blanks stand around bare texts, which readers take for a part of them; so these are put
together here, and so are notations that xgrammar does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent.session.grammar.bare_texts import BARRED_IN_BARE_TEXT, bare_text_format, is_text
from sfi_agent.session.grammar.call_forms import ArgumentStyle
from sfi_agent.session.grammar.grammar_formats import (
    Format,
    json_format,
    optional_format,
    pattern_format,
    sequence_format,
)
from sfi_agent.session.grammar.held_schema import SchemaReduction
from sfi_agent.session.grammar.loose_formats import LooseFormats
from sfi_agent.session.grammar.loose_notations import DELIMITER, BracedNotation, PythonNotation
from sfi_agent.session.grammar.text_patterns import CONTROLS

__all__ = ["HeldArguments", "argument_markup", "held_arguments"]

_BARRED_IN_JSON = '"\\' + CONTROLS
_LENGTH_KEYS = frozenset({"minLength", "maxLength"})


@dataclass(frozen=True, slots=True)
class HeldArguments:
    """All arguments of a call.

    Attributes:
        format: How they are written.
        not_held: Keywords of their schema that this does not enforce: values may break them.
    """

    format: Format
    not_held: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Tags:
    """What stands around an argument; %K is its name.

    Attributes:
        text_open, value_open: Before a bare text, and before JSON.
        text_close, value_close: Behind them.
        markup: What no text may hold.
    """

    text_open: str
    value_open: str
    text_close: str
    value_close: str
    markup: str


def _tags(opening: str, closing: str, *, padded: bool = False) -> _Tags:
    """Tags that are the same for texts and JSON; `padded` texts stand on lines of their own."""
    line = "\n" if padded else ""
    return _Tags(f"{opening}{line}", opening, f"{line}{closing}", closing, closing)


_DSML = "｜DSML｜"
_TAGS: Mapping[ArgumentStyle, _Tags] = {
    "qwen_xml": _tags("<parameter=%K>", "</parameter>", padded=True),
    "glm_xml": _tags("<arg_key>%K</arg_key>\n<arg_value>", "</arg_value>"),
    "minimax_xml": _tags('<parameter name="%K">', "</parameter>"),
    "deepseek_xml": _Tags(
        f'<{_DSML}parameter name="%K" string="true">',
        f'<{_DSML}parameter name="%K" string="false">',
        f"</{_DSML}parameter>",
        f"</{_DSML}parameter>",
        f"</{_DSML}parameter>",
    ),
}


def argument_markup(style: ArgumentStyle) -> frozenset[bytes]:
    """Tags of the arguments, which tokens may be."""
    if style == "braces":
        return frozenset({DELIMITER.encode()})
    tags = _TAGS.get(style)
    if tags is None:
        return frozenset()
    joined = "".join((tags.text_open, tags.value_open, tags.text_close, tags.value_close))
    return frozenset(tag.encode() for tag in re.findall(r"<[^<>]*>", joined))


def held_arguments(
    style: ArgumentStyle, schema: Mapping[str, Any], excluded: Sequence[str]
) -> HeldArguments:
    """All arguments of a call.

    Args:
        style: How they are written.
        schema: Their JSON schema, an object's.
        excluded: What no text in them may hold; not heeded in JSON whose texts have lengths.
    """
    definitions = {**(schema.get("definitions") or {}), **(schema.get("$defs") or {})}
    if style == "json":
        reduction = SchemaReduction(definitions, _BARRED_IN_JSON)
        whole = reduction.reduced(schema)
        whole |= reduction.definitions_of(whole)
        return HeldArguments(_json(whole, excluded), frozenset(reduction.not_held))
    if style in ("python", "braces"):
        return _loose(style, schema, definitions, excluded)
    return _tagged_arguments(_TAGS[style], schema, definitions, excluded)


def _loose(
    style: ArgumentStyle,
    schema: Mapping[str, Any],
    definitions: Mapping[str, Any],
    excluded: Sequence[str],
) -> HeldArguments:
    # Where a closing ends the call inside a text too, no text holds its first letter.
    python = PythonNotation("".join(text[0] for text in excluded))
    notation = python if style == "python" else BracedNotation(excluded)
    reduction = SchemaReduction(definitions, notation.barred)
    properties, required = _properties(schema, reduction)
    reduced = {name: reduction.reduced(one) for name, one in properties.items()}
    found = LooseFormats(notation, reduction).arguments(reduced, required)
    return HeldArguments(found, frozenset(reduction.not_held))


def _tagged_arguments(
    tags: _Tags,
    schema: Mapping[str, Any],
    definitions: Mapping[str, Any],
    excluded: Sequence[str],
) -> HeldArguments:
    whole = SchemaReduction(definitions, "")
    properties, required = _properties(schema, whole)
    arguments: list[Format] = []
    not_held = set(whole.not_held)
    for key, value in properties.items():
        texts = SchemaReduction(definitions, BARRED_IN_BARE_TEXT)
        found = texts.reduced(value)
        if is_text(found, texts):
            content = bare_text_format(found, texts, [tags.markup, *excluded])
            one = _tagged(tags.text_open, key, content, tags.text_close)
            not_held |= texts.not_held
        else:
            values = SchemaReduction(definitions, _BARRED_IN_JSON)
            found = values.reduced(value)
            blank = pattern_format(r"[ \n]?")
            content = _json(found | values.definitions_of(found), ())
            inside = sequence_format([blank, content, blank])
            one = _tagged(tags.value_open, key, inside, tags.value_close)
            not_held |= values.not_held
        one = sequence_format([one, pattern_format(r"\n?")])
        arguments.append(one if key in required else optional_format(one))
    return HeldArguments(sequence_format(arguments), frozenset(not_held))


def _properties(
    schema: Mapping[str, Any], reduction: SchemaReduction
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a call one by one, and which of them must be there. False says in place of
    a schema that there is none."""
    alternatives = reduction.alternatives(schema)
    if len(alternatives) == 1:
        whole = alternatives[0]
    else:
        # Which arguments go together cannot be said where they are written one by one.
        reduction.not_held |= {"anyOf", "oneOf", "allOf"} & schema.keys()
        whole = {key: schema[key] for key in ("properties", "required") if key in schema}
    properties = dict(whole.get("properties") or {})
    return (
        {name: one for name, one in properties.items() if one is not False},
        [name for name in whole.get("required") or () if name in properties],
    )


def _tagged(opening: str, key: str, content: Format, closing: str) -> Format:
    begin = opening.replace("%K", key)
    return {"type": "tag", "begin": begin, "content": content, "end": closing}


def _json(schema: Mapping[str, Any], excluded: Sequence[str]) -> Format:
    return json_format(schema, () if _has_lengths(schema) else excluded)


def _has_lengths(schema: Any) -> bool:
    """Whether some text of it has a length, which xgrammar ignores beside exclusions."""
    if isinstance(schema, Mapping):
        return bool(_LENGTH_KEYS & schema.keys()) or any(map(_has_lengths, schema.values()))
    return isinstance(schema, list) and any(map(_has_lengths, schema))
