"""Turns pydantic's validation errors into one line per problem: field path, value, what is allowed.

The description of what is allowed comes from the model's JSON schema, so that error messages and
the configuration reference say the same.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from sfi_agent.errors import explain

__all__ = [
    "QUANTITIES",
    "Problem",
    "describe_allowed",
    "field_schema",
    "problem_lines",
    "problems_error",
    "problems_of",
    "show_value",
]

_PROBLEMS_ERROR = "sfi_problems"
_VALUE_LIMIT_CHARACTERS = 80
_BOUNDS = (
    ("minimum", ">= {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "<= {}"),
    ("exclusiveMaximum", "< {}"),
)
QUANTITIES = frozenset(
    {
        "fraction",
        "layers",
        "nats",
        "probability",
        "queries",
        "seconds",
        "standard deviations",
        "tokens",
    }
)
"""Units that are said beside a number; the other ones of `UNITS` go without saying."""
_TYPE_WORDS = {"string": "text", "null": "null", "boolean": "true or false", "object": "a mapping"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with settings.

    Attributes:
        path: Where, as keys joined by dots; empty for the whole.
        summary: What is wrong, when path, value and range do not say it already.
        got: The value, as text.
        allowed: What would have been accepted.
        remedy: What to do, when that is not obvious.
    """

    path: str
    summary: str = ""
    got: str = ""
    allowed: str = ""
    remedy: str = ""

    def below(self, prefix: Iterable[object]) -> Problem:
        """The same problem seen from further outside."""
        return replace(self, path=_join([*prefix, self.path]))

    def line(self) -> str:
        """One line of an error message."""
        if self.summary:
            attempted = ": ".join(part for part in (self.path, self.summary.rstrip(".")) if part)
        else:
            attempted = f"{self.path or 'the value'} is not valid"
        return explain(attempted, got=self.got, allowed=self.allowed, remedy=self.remedy)


def problems_error(problems: Sequence[Problem]) -> PydanticCustomError:
    """An error to raise inside a validator that carries finished problems to `problems_of`."""
    text = " ".join(problem.line() for problem in problems)
    return PydanticCustomError(_PROBLEMS_ERROR, "{text}", {"text": text, "problems": problems})


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem in a pydantic error about `model`, in the order pydantic found them."""
    schema = model.model_json_schema()
    found: list[Problem] = []
    all_details = error.errors(include_url=False)
    for details in all_details:
        if details["type"] == "too_short" and _has_bad_items(details["loc"], all_details):
            continue
        if details["type"] == _PROBLEMS_ERROR:
            found += [problem.below(details["loc"]) for problem in details["ctx"]["problems"]]
        else:
            found.append(_problem(details, schema))
    return found


def _has_bad_items(location: tuple[int | str, ...], details: Iterable[ErrorDetails]) -> bool:
    """Pydantic counts valid items alone, so a list of wrong ones is also called too short."""
    below = (other["loc"] for other in details)
    return any(other[: len(location)] == location != other for other in below)


def problem_lines(attempted: str, problems: Sequence[Problem]) -> str:
    """A whole message: what was attempted, then one line per problem."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return "\n".join([f"{attempted} ({count}):", *(f"  {problem.line()}" for problem in problems)])


def show_value(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _VALUE_LIMIT_CHARACTERS else text[:_VALUE_LIMIT_CHARACTERS] + "..."


def describe_allowed(fragment: Mapping[str, Any]) -> str:
    """What a field's JSON-schema fragment accepts, in words: "integer >= 0 (tokens)"."""
    unit = fragment.get("unit")
    suffix = f" ({unit})" if unit in QUANTITIES else ""
    return _describe_shape(fragment) + suffix


def field_schema(model: type[BaseModel], name: str) -> Mapping[str, Any]:
    """The JSON-schema fragment of one field, with references resolved."""
    return _fragment(model.model_json_schema(), (name,))


def _describe_shape(fragment: Mapping[str, Any]) -> str:
    if "anyOf" in fragment:
        return " or ".join(_describe_shape(option) for option in fragment["anyOf"])
    if "enum" in fragment:
        return ", ".join(_plain(choice) for choice in fragment["enum"])
    if "const" in fragment:
        return _plain(fragment["const"])
    kind = fragment.get("type")
    if kind in ("integer", "number"):
        return " and ".join([kind, *(_bounds(fragment))]).replace(" and ", " ", 1)
    if kind == "array":
        items = fragment.get("items", {})
        return f"a list, each {_describe_shape(items)}" if items else "a list"
    return _TYPE_WORDS.get(str(kind), "a mapping")


def _bounds(fragment: Mapping[str, Any]) -> list[str]:
    return [text.format(_number(fragment[key])) for key, text in _BOUNDS if key in fragment]


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _problem(details: ErrorDetails, schema: Mapping[str, Any]) -> Problem:
    location, kind = details["loc"], details["type"]
    path, got = _join(location), show_value(details["input"])
    if kind == "extra_forbidden":
        siblings = list(_fragment(schema, location[:-1]).get("properties", {}))
        close = difflib.get_close_matches(str(location[-1]), siblings, n=1)
        hint = f"Perhaps {close[0]!r} was meant" if close else ""
        return Problem(path, "unknown key", got=got, allowed=", ".join(siblings), remedy=hint)
    if kind == "value_error":  # Raised by a validator of ours or of a plugin, with its own words.
        return Problem(path, summary=_clean(str(details["ctx"]["error"])))
    if kind == "too_short":
        return Problem(path, got=got, allowed=f"a list of at least {details['ctx']['min_length']}")
    fragment = _fragment(schema, location)
    if not fragment or kind not in _SCHEMA_SAYS_IT:
        return Problem(path, summary=_clean(details["msg"]), got=got)
    return Problem(path, got=got, allowed=describe_allowed(fragment))


_SCHEMA_SAYS_IT = frozenset(
    {
        "bool_type",
        "bool_parsing",
        "dict_type",
        "finite_number",
        "float_type",
        "float_parsing",
        "greater_than",
        "greater_than_equal",
        "int_type",
        "int_parsing",
        "int_from_float",
        "less_than",
        "less_than_equal",
        "list_type",
        "literal_error",
        "model_type",
        "none_required",
        "string_type",
        "tuple_type",
    }
)


def _fragment(schema: Mapping[str, Any], location: Sequence[int | str]) -> Mapping[str, Any]:
    """The part of a JSON schema that describes a location; empty where there is none."""
    current: Mapping[str, Any] = schema
    for key in location:
        current = _resolve(schema, current)
        inner = current.get("items") if isinstance(key, int) else None
        current = inner or current.get("properties", {}).get(key, {})
        if not current:
            return {}
    return _resolve(schema, current)


def _resolve(schema: Mapping[str, Any], fragment: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = fragment.get("$ref")
    if reference is None:
        return fragment
    target = schema["$defs"][reference.removeprefix("#/$defs/")]
    return {**target, **{key: value for key, value in fragment.items() if key != "$ref"}}


def _clean(message: str) -> str:
    return " ".join(message.split()).rstrip(".")


def _join(parts: Iterable[object]) -> str:
    return ".".join(str(part) for part in parts if part != "")
