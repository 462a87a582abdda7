"""Arguments in notations that are nearly JSON, as formats of xgrammar's structural tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sfi_agent.session.grammar.comma_lists import items_format, parts_format
from sfi_agent.session.grammar.grammar_formats import (
    Format,
    constant_format,
    grammar_format,
    json_format,
    or_format,
    pattern_format,
    sequence_format,
)
from sfi_agent.session.grammar.held_schema import SchemaReduction
from sfi_agent.session.grammar.loose_notations import Notation

__all__ = ["LooseFormats"]


class LooseFormats:
    """Makes formats of reduced schemas in one notation.

    Args:
        notation: How values are written.
        reduction: Of the schemas; it notes what is not held.
    """

    def __init__(self, notation: Notation, reduction: SchemaReduction) -> None:
        self._notation = notation
        self._reduction = reduction
        self._inside: list[str] = []

    def arguments(self, properties: Mapping[str, Any], required: Sequence[str]) -> Format:
        """The arguments of a call, one after the other.

        Args:
            properties: Reduced schema of each.
            required: Which of them must be there.
        """
        equals = constant_format(self._notation.equals)
        names = self._notation.ordered(properties)
        pairs = [
            sequence_format([self._notation.name(name), equals, self.value(properties[name])])
            for name in names
        ]
        return parts_format(pairs, [name in required for name in names], {})

    def value(self, schema: Mapping[str, Any]) -> Format:
        """One value."""
        if "$ref" in schema:
            return self._referred(str(schema["$ref"]))
        if "anyOf" in schema:
            return or_format([self.value(choice) for choice in schema["anyOf"]])
        if "enum" in schema:
            return or_format([self._constant(value) for value in schema["enum"]])
        if not schema:
            return self._anything("value")
        declared = schema["type"]
        makers: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
            "boolean": lambda _: or_format([self._constant(True), self._constant(False)]),
            "null": lambda _: self._constant(None),
            "integer": lambda whole: json_format({**whole, "type": "integer"}),
            "number": lambda whole: json_format({**whole, "type": "number"}),
            "string": lambda whole: self._notation.text(whole, self._reduction),
            "array": self._array,
            "object": self._object,
        }
        types = [declared] if isinstance(declared, str) else list(declared)
        return or_format([makers[name](schema) for name in types])

    def _referred(self, reference: str) -> Format:
        if reference in self._inside:
            # Grammars of structural tags have no rules that hold themselves.
            self._reduction.not_held.add("$ref")
            return self._anything("value")
        self._inside.append(reference)
        found = self.value(self._reduction.resolved({"$ref": reference}))
        self._inside.pop()
        return found

    def _anything(self, root: str) -> Format:
        return grammar_format(self._notation.any_value.replace("{root}", root))

    def _constant(self, value: Any) -> Format:
        if isinstance(value, str):
            return self._notation.constant(value)
        if isinstance(value, bool) or value is None:
            return or_format([constant_format(word) for word in self._notation.words(value)])
        if isinstance(value, list):
            items = [self._constant(item) for item in value]
            return _between("[", items_format(items, {}, len(items)), "]")
        if isinstance(value, Mapping):
            pairs = [self._pair(self._notation.key(key), item) for key, item in value.items()]
            return _between("{", items_format(pairs, {}, len(pairs)), "}")
        return constant_format(json.dumps(value))

    def _pair(self, key: Format, value: Any) -> Format:
        return sequence_format([key, pattern_format(":[ \\n]?"), self._constant(value)])

    def _array(self, schema: Mapping[str, Any]) -> Format:
        first = [self.value(item) for item in schema.get("prefixItems", ())]
        items = schema.get("items", {})
        rest = {} if items is False else self.value(items)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        return _between("[", items_format(first, rest, least, most), "]")

    def _object(self, schema: Mapping[str, Any]) -> Format:
        counts = ("minProperties", "maxProperties", "propertyNames", "patternProperties")
        self._reduction.not_held |= {key for key in counts if key in schema}
        colon = pattern_format(":[ \\n]?")
        properties = schema.get("properties", {})
        names = self._notation.ordered(properties)
        pairs = [
            sequence_format([self._notation.key(name), colon, self.value(properties[name])])
            for name in names
        ]
        needed = [name in schema.get("required", ()) for name in names]
        rest = {} if "patternProperties" in schema else schema.get("additionalProperties", False)
        other = {}
        if rest is not False:
            other = sequence_format([self._notation.any_key(), colon, self.value(rest)])
        return _between("{", parts_format(pairs, needed, other), "}")


def _between(opening: str, content: Format, closing: str) -> Format:
    return sequence_format([constant_format(opening), content, constant_format(closing)])
