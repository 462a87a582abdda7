"""JSON schemas reduced to what a grammar can hold, and the keywords that it cannot.

A reduced schema allows what the given one allows, and more only where keywords are named. It has
one of these forms: `{}`, `{"$ref"}`, `{"enum"}`, `{"anyOf"}` of the other forms, and `{"type"}`
with the keywords of its types.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from sfi_agent.session.grammar.merged_schemas import merged
from sfi_agent.session.grammar.text_patterns import whole_pattern
from sfi_agent.session.tool_use.json_schema import check_arguments, required_names

__all__ = ["HELD_FORMATS", "SchemaReduction"]

Schema: TypeAlias = Mapping[str, Any] | bool

HELD_FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
    | {"json-pointer", "relative-json-pointer", "uri-reference", "uri-template"}
)
"""Of texts in JSON; other names of formats say nothing that is held or checked."""

_TYPES_OF = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum"), "number"),
    **dict.fromkeys(("exclusiveMaximum", "multipleOf"), "number"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    "contains": "array",
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("patternProperties", "propertyNames", "dependentRequired"), "object"),
    **dict.fromkeys(("minProperties", "maxProperties", "dependentSchemas"), "object"),
}
_NEVER_HELD = frozenset(
    {"not", "if", "contains", "dependentRequired", "dependentSchemas", "unevaluatedProperties"}
)
_KEPT = frozenset({"$ref", "type", "enum", "const", *_TYPES_OF}) - _NEVER_HELD
_ALL_TYPES = ["string", "number", "boolean", "null", "array", "object"]
_MOST_ALTERNATIVES = 64
_LARGEST_INTEGER = 2**62
_LARGEST_FACTOR = 1024


class SchemaReduction:
    """Reduces schemas that share definitions.

    Args:
        definitions: By name: of `$defs` and `definitions`.
        barred: Characters that no text with a pattern may hold, see `whole_pattern`.

    Attributes:
        not_held: Keywords that are given up so far.
    """

    def __init__(self, definitions: Mapping[str, Schema], barred: str) -> None:
        self._definitions = definitions
        self._barred = barred
        self._opening: list[str] = []
        self.not_held: set[str] = set()

    def reduced(self, schema: Schema) -> dict[str, Any]:
        """The schema in a form of the module text; `{"enum": []}` where it allows nothing."""
        finished = [self._finished(item) for item in self.alternatives(schema)]
        possible = [item for item in finished if item.get("enum") != []]
        if not possible:
            return {"enum": []}
        return possible[0] if len(possible) == 1 else {"anyOf": possible}

    def definitions_of(self, found: Any) -> dict[str, Any]:
        """The reduced definitions that a reduced schema refers to, as one keyword of it; empty
        where there are none."""
        definitions: dict[str, Any] = {}
        waiting = list(_references(found))
        while waiting:
            name = waiting.pop()
            if name not in definitions:
                definitions[name] = self.reduced(self._definitions[name])
                waiting += _references(definitions[name])
        return {"$defs": definitions} if definitions else {}

    def resolved(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """A reduced schema that is no reference."""
        for _ in range(len(self._definitions) + 1):
            if "$ref" not in found:
                return dict(found)
            found = self.reduced(self._definitions[_definition_name(found["$ref"])])
        self.not_held.add("$ref")
        return {}

    # ------------------------------------------------------------ one schema as alternatives

    def alternatives(self, schema: Schema) -> list[dict[str, Any]]:
        """Schemas without combinations of others, one of which allows what the schema does."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        self.not_held |= _NEVER_HELD & schema.keys()
        own = {key: value for key, value in schema.items() if key in _KEPT}
        found = self._opened(own)
        for part in schema.get("allOf") or ():
            found = self._both(found, self.alternatives(part))
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                choices = [item for part in schema[key] for item in self.alternatives(part)]
                found = self._both(found, choices)
        return [*found, {"type": "null"}] if schema.get("nullable") else found

    def _both(
        self, first: list[dict[str, Any]], second: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What is allowed by one of each."""
        if len(first) * len(second) > _MOST_ALTERNATIVES:
            self.not_held.add("anyOf")
            return first if first != [{}] else second[:_MOST_ALTERNATIVES]
        found: list[dict[str, Any]] = []
        for one in first:
            for other in second:
                if not one or not other:
                    found.append(one or other)
                    continue
                for left in self._opened(one, always=True):
                    for right in self._opened(other, always=True):
                        whole, given_up = merged(left, right)
                        self.not_held |= given_up
                        found += [] if whole is None else [whole]
        return found

    def _opened(self, schema: dict[str, Any], *, always: bool = False) -> list[dict[str, Any]]:
        """With the definition in place of a reference that has other keywords beside it."""
        if "$ref" not in schema or (len(schema) == 1 and not always):
            return [schema]
        name = _definition_name(schema["$ref"])
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        if name in self._opening or name not in self._definitions:
            # A definition within itself stays a reference alone.
            self.not_held |= rest.keys() or {"$ref"}
            return [{"$ref": schema["$ref"]}] if name in self._definitions else [rest]
        self._opening.append(name)
        found = self.alternatives(self._definitions[name])
        self._opening.pop()
        return self._both(found, [rest]) if rest else found

    # ------------------------------------------------------------ one alternative

    def _finished(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            if _definition_name(schema["$ref"]) in self._definitions:
                return {"$ref": f"#/$defs/{_definition_name(schema['$ref'])}"}
            self.not_held.add("$ref")
            return {}
        if "enum" in schema or "const" in schema:
            return {"enum": _fitting(schema)}
        if not schema:
            return {}
        types = _types(schema)
        found: dict[str, Any] = {"type": types if len(types) > 1 else types[0]}
        for name in types:
            if name in ("number", "integer"):
                found |= self._number(schema, whole=name == "integer")
            elif name in ("string", "array", "object"):
                make = {"string": self._text, "array": self._array, "object": self._object}
                found |= make[name](schema)
        empty = found.get("minimum", 0) > found.get("maximum", math.inf) and len(types) == 1
        return {"enum": []} if empty else found

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            limit = schema.get(key)
            if limit is None:
                continue
            if isinstance(limit, bool) or abs(limit) > _LARGEST_INTEGER:
                self.not_held.add(key)
                continue
            least = key in ("minimum", "exclusiveMinimum")
            bound, best = ("minimum", max) if least else ("maximum", min)
            if not whole:
                found[key] = limit
                continue
            # Whole numbers have a bound that belongs to them.
            nearest = math.ceil(limit) if least else math.floor(limit)
            if key != bound and nearest == limit:
                nearest += 1 if least else -1
            found[bound] = best(found.get(bound, nearest), nearest)
        factor = schema.get("multipleOf", 1)
        # Of a range that is open on one side xgrammar does not count.
        counted = whole and ("minimum" in found) == ("maximum" in found)
        if counted and factor == int(factor) and 1 < factor <= _LARGEST_FACTOR:
            found["multipleOf"] = int(factor)
        elif not (whole and factor == 1):
            self.not_held |= {"multipleOf"} & schema.keys()
        return found

    def _text(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        lengths = {key: int(schema[key]) for key in ("minLength", "maxLength") if key in schema}
        if "pattern" in schema:
            pattern = whole_pattern(schema["pattern"], self._barred)
            if pattern is not None:
                self.not_held |= lengths.keys() | ({"format"} & schema.keys())
                return {"pattern": f"^(?:{pattern})$"}
            self.not_held.add("pattern")
        if schema.get("format") in HELD_FORMATS:
            self.not_held |= lengths.keys()
            return {"format": schema["format"]}
        return lengths

    def _array(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        counts = ("minItems", "maxItems")
        found: dict[str, Any] = {key: int(schema[key]) for key in counts if key in schema}
        if schema.get("uniqueItems") is True and found.get("maxItems", 2) > 1:
            self.not_held.add("uniqueItems")
        first = (schema.get("prefixItems") or [])[: found.get("maxItems")]
        if first:
            found["prefixItems"] = [self.reduced(item) for item in first]
        items = schema.get("items", True)
        # A list of them, as older drafts have it, is not read by the check either.
        found["items"] = False if items is False else self.reduced(_one(items))
        return found

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        given = schema.get("properties") or {}
        properties = {key: self.reduced(part) for key, part in given.items() if part is not False}
        rest = schema.get("additionalProperties")
        found: dict[str, Any] = {}
        if rest is not None or "properties" not in schema:
            rest = True if rest is None else rest
            found["additionalProperties"] = False if rest is False else self.reduced(rest)
        required = [name for name in required_names(schema) if given.get(name) is not False]
        for name in required:
            if name not in properties and rest is False:
                self.not_held.add("required")
            elif name not in properties:
                # It is no property, but may be a further one.
                properties[name] = self.reduced(_one(rest))
        if properties:
            found["properties"] = properties
            found["required"] = [name for name in properties if name in required]
        named = schema.get("patternProperties") or {}
        patterns = {whole_pattern(key, self._barred): part for key, part in named.items()}
        if None in patterns:
            self.not_held.add("patternProperties")
        elif patterns:
            found["patternProperties"] = {
                f"^(?:{key})$": self.reduced(part) for key, part in patterns.items()
            }
        if "propertyNames" in schema:
            found["propertyNames"] = self.reduced(schema["propertyNames"])
        counts = ("minProperties", "maxProperties")
        return found | {key: int(schema[key]) for key in counts if key in schema}


def _types(schema: Mapping[str, Any]) -> list[str]:
    declared = schema.get("type") or _ALL_TYPES
    names = [declared] if isinstance(declared, str) else list(declared)
    return [name for name in names if name != "integer" or "number" not in names]


def _definition_name(reference: Any) -> str:
    return str(reference).removeprefix("#/$defs/").removeprefix("#/definitions/")


def _references(found: Any) -> Iterator[str]:
    if isinstance(found, list):
        for item in found:
            yield from _references(item)
    elif isinstance(found, Mapping):
        if isinstance(found.get("$ref"), str):
            yield _definition_name(found["$ref"])
        for key, item in found.items():
            if key != "enum":
                yield from _references(item)


def _one(schema: Any) -> Schema:
    return schema if isinstance(schema, (Mapping, bool)) else True


def _fitting(schema: Mapping[str, Any]) -> list[Any]:
    """The values of an enumeration that everything beside it allows."""
    values: Iterable[Any] = schema["enum"] if "enum" in schema else [schema["const"]]
    whole = {"properties": {"it": schema}}
    return [value for value in values if not check_arguments({"it": value}, whole)[1]]
