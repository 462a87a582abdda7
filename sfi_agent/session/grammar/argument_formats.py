"""Arguments of a call as formats of xgrammar's structural tags.

Arguments in JSON are xgrammar's own business. Where every argument has a tag of its own, xgrammar
lets blanks stand around bare texts, which readers take for a part of them; so these are put
together here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sfi_agent.session.grammar.call_forms import ArgumentStyle

__all__ = [
    "Format",
    "argument_format",
    "argument_markup",
    "keywords_not_held",
    "pattern_format",
    "sequence_format",
]

Format: TypeAlias = dict[str, Any]

_SHARED_DEFINITIONS = ("$defs", "definitions")
_LENGTH_KEYS = frozenset({"minLength", "maxLength"})
_NOT_HELD = frozenset(
    {"not", "if", "contains", "dependentRequired", "dependentSchemas", "unevaluatedProperties"}
)


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
    tags = _TAGS.get(style)
    if tags is None:
        return frozenset()
    joined = "".join((tags.text_open, tags.value_open, tags.text_close, tags.value_close))
    return frozenset(tag.encode() for tag in re.findall(r"<[^<>]*>", joined))


def argument_format(
    style: ArgumentStyle, schema: Mapping[str, Any], excluded: Sequence[str]
) -> Format:
    """All arguments of a call.

    Args:
        style: How they are written.
        schema: Their JSON schema, an object's.
        excluded: What no text in them may hold; not heeded in JSON whose texts have lengths.
    """
    if style == "json":
        return _json(schema, () if _has_lengths(schema) else excluded)
    tags = _TAGS[style]
    required = frozenset(schema.get("required") or ())
    arguments: list[Format] = []
    for key, value in (schema.get("properties") or {}).items():
        shared = {name: schema[name] for name in _SHARED_DEFINITIONS if name in schema}
        one = _argument(tags, key, value, shared, excluded)
        one = sequence_format([one, pattern_format(r"\n?")])
        arguments.append(one if key in required else {"type": "optional", "content": one})
    return sequence_format(arguments)


def sequence_format(elements: Sequence[Format]) -> Format:
    """One after the other; empty elements are left out."""
    present = [element for element in elements if element]
    return {"type": "sequence", "elements": present} if present else {}


def pattern_format(pattern: str) -> Format:
    """A regular expression; empty where it is."""
    return {"type": "regex", "pattern": pattern} if pattern else {}


def _argument(
    tags: _Tags,
    key: str,
    schema: Mapping[str, Any],
    shared: Mapping[str, Any],
    excluded: Sequence[str],
) -> Format:
    if not is_text(schema):
        content = _json({**shared, **schema}, ())
        blank = pattern_format(r"[ \n]?")
        inside = sequence_format([blank, content, blank])
        return _tagged(tags.value_open, key, inside, tags.value_close)
    return _tagged(tags.text_open, key, _text(schema, [tags.markup, *excluded]), tags.text_close)


def _tagged(opening: str, key: str, content: Format, closing: str) -> Format:
    begin = opening.replace("%K", key)
    return {"type": "tag", "begin": begin, "content": content, "end": closing}


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether readers take an argument of this schema for bare text: wherever it may be one, or
    where no type is named."""
    declared = schema.get("type")
    types = {declared} if isinstance(declared, str) else set(declared or ())
    choices = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if types or not (choices or values):
        return "string" in types or not (types or choices)
    return any(isinstance(value, str) for value in values) or any(map(is_text, choices))


def _text(schema: Mapping[str, Any], excluded: Sequence[str]) -> Format:
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        return {"type": "or", "elements": [_constant(text) for text in texts]}
    if "pattern" in schema:
        return pattern_format(schema["pattern"].removeprefix("^").removesuffix("$"))
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None:
        # Counted texts hold no "<": xgrammar counts tokens that end within a character wrongly
        # where it looks for a closing itself.
        return pattern_format(f"[^<]{{{least},{most}}}")
    first = pattern_format(f"[^<]{{{least}}}" if least else "")
    return sequence_format([first, {"type": "any_text", "excludes": list(excluded)}])


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _json(schema: Mapping[str, Any], excluded: Sequence[str]) -> Format:
    found: Format = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}
    return {**found, "excludes": list(excluded)} if excluded else found


def _has_lengths(schema: Any) -> bool:
    """Whether some text of it has a length, which xgrammar ignores beside exclusions."""
    if isinstance(schema, Mapping):
        return bool(_LENGTH_KEYS & schema.keys()) or any(map(_has_lengths, schema.values()))
    return isinstance(schema, list) and any(map(_has_lengths, schema))


def keywords_not_held(schema: Any) -> frozenset[str]:
    """Keywords of a JSON schema that a grammar does not enforce: values may break them."""
    if isinstance(schema, list):
        return frozenset().union(*map(keywords_not_held, schema))
    if not isinstance(schema, Mapping):
        return frozenset()
    found = set(_NOT_HELD & schema.keys())
    if schema.get("uniqueItems") is True:
        found.add("uniqueItems")
    if len(schema.get("allOf") or ()) > 1:
        found.add("allOf")
    if "pattern" in schema:
        found |= _LENGTH_KEYS & schema.keys()
    names = schema.get("properties")
    # Names of properties are no keywords.
    inner = [value for key, value in schema.items() if key not in ("properties", "enum", "const")]
    inner += names.values() if isinstance(names, Mapping) else []
    return frozenset(found).union(*map(keywords_not_held, inner))
