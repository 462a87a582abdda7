"""Bodies of tool calls that give every argument a tag of its own; values are bare text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from sfi_agent.session.output.argument_text import value_of_text
from sfi_agent.session.output.tool_calls import (
    CUT_OFF,
    BodyStatus,
    RawCall,
    Schemas,
    unreadable_call,
)

__all__ = ["function_call", "invoke_calls", "key_value_calls", "tagged_status"]

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*\Z", re.DOTALL)
_FUNCTION_NAME = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_KEYED_NAME = re.compile(r"\s*([^\s<]+)\s*(?=<arg_key>|\Z)")
_KEYED_VALUE = re.compile(
    r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL
)
_INVOKE = re.compile(r'\s*<(\S*?)invoke\s+name="([^"]*)"\s*>(.*)</\1invoke>\s*\Z', re.DOTALL)
_INVOKE_NAME = re.compile(r'\s*<\S*?invoke\s+name="([^"]*)"')
_NAMED_VALUE = re.compile(
    r'\s*<(\S*?)parameter\s+name="([^"]*)"([^>]*)>(.*?)</\1parameter>\s*', re.DOTALL
)


def key_value_calls(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
    """`name`, then `<arg_key>` and `<arg_value>` by turns."""
    text = body.strip()
    named = _KEYED_NAME.match(text)
    name = named.group(1) if named else ""
    if not closed:
        return [unreadable_call(text, CUT_OFF, name)]
    if named is None:
        return [unreadable_call(text, "it has no name")]
    pairs = _pairs(_KEYED_VALUE, text[named.end() :])
    return [_typed_call(name, text, pairs, schemas)]


def function_call(text: str, closed: bool, schemas: Schemas) -> RawCall:
    """`<function=name>` with `<parameter=name>` inside."""
    match = _FUNCTION.match(text)
    # A cut-off call may lack parameters without a sign of it: never run one.
    if match is None or not closed:
        named = _FUNCTION_NAME.match(text)
        name = named.group(1).strip() if named else ""
        return unreadable_call(text, "it is not closed with </function></tool_call>", name)
    pairs = _pairs(_PARAMETER, match.group(2))
    return _typed_call(match.group(1).strip(), text, pairs, schemas)


def invoke_calls(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
    """`<invoke name="...">` with `<parameter name="...">` inside, tags with any prefix."""
    text = body.strip()
    match = _INVOKE.match(text)
    if match is None or not closed:
        named = _INVOKE_NAME.match(text)
        return [unreadable_call(text, CUT_OFF, named.group(1) if named else "")]
    name, schema = match.group(2), _properties(schemas, match.group(2))
    pairs: list[tuple[str, Any]] = []
    rest = match.group(3).strip()
    while rest:
        found = _NAMED_VALUE.match(rest)
        if found is None:
            return [unreadable_call(text, f"{_shorten(rest)!r} stands between arguments", name)]
        key, attributes, value = found.group(2), found.group(3), found.group(4)
        is_text = 'string="true"' in attributes
        pairs.append((key, value if is_text else value_of_text(value, schema.get(key, {}))))
        rest = rest[found.end() :]
    return [_call_of(name, text, pairs)]


def tagged_status(opening: str, closing: str) -> BodyStatus:
    """A status for values between `<opening` and `</closing>`: open inside such a value."""

    def status(body: str) -> Literal["whole", "open", "broken"]:
        return "open" if body.rfind(f"<{opening}") > body.rfind(f"</{closing}>") else "whole"

    return status


def _pairs(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]] | str:
    """Names and texts of all arguments, or what stands between them and should not."""
    pairs: list[tuple[str, str]] = []
    rest = text.strip()
    while rest:
        match = pattern.match(rest)
        if match is None:
            return rest
        pairs.append((match.group(1).strip(), match.group(2)))
        rest = rest[match.end() :]
    return pairs


def _typed_call(
    name: str, text: str, pairs: Sequence[tuple[str, str]] | str, schemas: Schemas
) -> RawCall:
    if isinstance(pairs, str):
        return unreadable_call(text, f"{_shorten(pairs)!r} stands between arguments", name)
    schema = _properties(schemas, name)
    return _call_of(name, text, [(k, value_of_text(v, schema.get(k, {}))) for k, v in pairs])


def _call_of(name: str, text: str, pairs: Iterable[tuple[str, Any]]) -> RawCall:
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key in arguments:
            return unreadable_call(text, f"the argument {key!r} is given twice", name)
        arguments[key] = value
    return RawCall(name, text, arguments)


def _properties(schemas: Schemas, name: str) -> Mapping[str, Mapping[str, Any]]:
    properties = schemas.get(name, {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
