"""Arguments of a tool call made ready for the function: by its type hints, and by the schema.

Models write JSON. A function with type hints gets what its hints ask for: numbers that came as
text, enumerations, dataclasses, pydantic models, dates. What does not fit is named in words that a
model can act on. Arguments without a hint are checked against the schema alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints
from weakref import WeakKeyDictionary

from pydantic import (
    BaseModel,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from sfi_agent.session.tool_use.json_schema import check_arguments, required_names, show_value

__all__ = ["hints_of", "validate_arguments"]

_TYPES: dict[str, str] = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "integer"),
    **dict.fromkeys(("float_parsing", "float_type"), "number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "boolean"),
    **dict.fromkeys(("string_type", "string_sub_type"), "string"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "array"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "object"),
    **dict.fromkeys(("dataclass_type", "dataclass_exact_type", "mapping_type"), "object"),
    "none_required": "null",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def validate_arguments(
    function: Callable[..., Any], schema: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments as the function takes them, and what is wrong with them (empty if nothing is).

    Values are converted as pydantic converts them (text to numbers, lists to tuples and sets,
    objects to models and dataclasses, values to enumerations), but true and false are no numbers.
    What the schema says beyond the hints (such as the choices of a docstring) is checked as well.

    Args:
        function: What will be called, by name; partials and bound methods are fine.
        schema: JSON schema of the arguments.
        arguments: What the model wrote, plain JSON data.
    """
    properties: Mapping[str, Mapping[str, Any]] = schema.get("properties") or {}
    adapters = _adapters(function)
    hinted = {name: adapters[name] for name in arguments if name in adapters and name in properties}
    ready, problems = dict(arguments), list[str]()
    checked = dict(arguments)
    for name, adapter in hinted.items():
        try:
            ready[name] = adapter.validate_python(arguments[name])
        except ValidationError as error:
            problems += _problems_of(error, name, arguments[name])
            del checked[name]
            continue
        plain = _as_json(adapter, ready[name], arguments[name])
        problems += _numbers_from_truth(arguments[name], plain, name)
        problems += _unknown_fields(arguments[name], ready[name], name)
        only_this = {"properties": {name: properties[name]}, "$defs": schema.get("$defs", {})}
        if check_arguments({name: arguments[name]}, only_this)[1]:
            checked[name] = plain
    # What was named above is not named again as missing.
    failed = set(arguments) - set(checked)
    required = [name for name in required_names(schema) if name not in failed]
    converted, more = check_arguments(checked, {**schema, "required": required})
    problems += more
    if problems:
        return {}, tuple(problems)
    return {name: ready[name] if name in hinted else converted[name] for name in arguments}, ()


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Type hints by argument, of whatever can be called; empty where they cannot be read."""
    while isinstance(function, functools.partial):
        function = function.func
    called = function if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004
    try:
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(called, include_extras=True)
    except (TypeError, ValueError, NameError, AttributeError):
        return {}
    return {name: hints[name] for name in parameters if name in hints}


def _adapters(function: Callable[..., Any]) -> Mapping[str, TypeAdapter[Any]]:
    # By the plain function below bound methods and partials, which does not keep objects alive.
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    plain = getattr(plain, "__func__", plain)
    if not inspect.isfunction(plain):
        return _made_adapters(function)
    if plain not in _known_adapters:
        _known_adapters[plain] = _made_adapters(function)
    return _known_adapters[plain]


_known_adapters: WeakKeyDictionary[Callable[..., Any], Mapping[str, TypeAdapter[Any]]] = (
    WeakKeyDictionary()
)


def _made_adapters(function: Callable[..., Any]) -> Mapping[str, TypeAdapter[Any]]:
    found: dict[str, TypeAdapter[Any]] = {}
    for name, hint in hints_of(function).items():
        try:
            found[name] = TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError):
            continue  # A class that pydantic does not know: the schema alone decides.
    return found


def _as_json(adapter: TypeAdapter[Any], value: Any, given: Any) -> Any:
    try:
        return adapter.dump_python(
            value, mode="json", by_alias=True, exclude_unset=True, warnings=False
        )
    except ValueError:
        return given


def _numbers_from_truth(given: Any, plain: Any, path: str) -> Iterator[str]:
    """Where true or false became a number: a mistake, and no way of writing one."""
    if isinstance(given, bool) and isinstance(plain, (int, float)) and not isinstance(plain, bool):
        kind = "integer" if isinstance(plain, int) else "number"
        yield f"Argument {path} must be of type {kind}, not {show_value(given)}."
    elif isinstance(given, Mapping) and isinstance(plain, Mapping):
        for name in given:
            if name in plain:
                yield from _numbers_from_truth(given[name], plain[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(plain, list):
        for index, (item, other) in enumerate(zip(given, plain, strict=False)):
            yield from _numbers_from_truth(item, other, f"{path}[{index}]")


def _unknown_fields(given: Any, value: Any, path: str) -> Iterator[str]:
    """Fields that a model or dataclass does not have: pydantic would leave them out silently."""
    if isinstance(given, list) and isinstance(value, (list, tuple)):
        for index, (item, other) in enumerate(zip(given, value, strict=False)):
            yield from _unknown_fields(item, other, f"{path}[{index}]")
    if not isinstance(given, Mapping):
        return
    present = dict(value) if isinstance(value, Mapping) else _fields(value)
    # A mapping that has become shorter is a TypedDict; others have keys of any type.
    known_fields = not isinstance(value, Mapping) or (
        len(present) < len(given) and all(isinstance(name, str) for name in present)
    )
    for name, item in given.items():
        if name in present:
            yield from _unknown_fields(item, present[name], f"{path}.{name}")
        elif present and known_fields:
            known = "" if isinstance(value, Mapping) else ", ".join(present)
            hint = f"; known arguments: {known}" if known else ""
            yield f"Unknown argument {path}.{name}{hint}."


def _fields(value: Any) -> dict[str, Any]:
    """Values by what a field may be called; empty for what has no fields."""
    if isinstance(value, BaseModel):
        found = {**(value.model_extra or {})}
        for name, field in type(value).model_fields.items():
            names = [name, field.alias, field.validation_alias]
            found.update({item: getattr(value, name) for item in names if isinstance(item, str)})
        return found
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name, None) for item in fields(value)}
    return {}


def _problems_of(error: ValidationError, name: str, given: Any) -> list[str]:
    """One sentence per place in the argument, alternatives joined."""
    places: dict[str, tuple[Any, list[str]]] = {}
    sentences: list[str] = []
    for item in error.errors(include_url=False, include_context=True):
        path, value = _place(name, given, item["loc"])
        kind, last = item["type"], str(item["loc"][-1]) if item["loc"] else ""
        if kind in _MISSING:
            sentences.append(f"Missing argument {path}.{last}.")
        elif kind in _UNKNOWN:
            sentences.append(f"Unknown argument {path}.")
        else:
            wanted = places.setdefault(path, (value, []))[1]
            if (phrase := _wanted(item)) not in wanted:
                wanted.append(phrase)
    for path, (value, wanted) in places.items():
        sentences.append(f"Argument {path} {_joined(wanted)}, not {show_value(value)}.")
    return sentences


def _place(name: str, given: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """Path and value of a place. Names of alternatives are no part of the data and left out."""
    path, value = name, given
    for part in location:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(part, str) and isinstance(value, Mapping) and part in value:
            path, value = f"{path}.{part}", value[part]
    return path, value


def _wanted(item: Mapping[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx") or {}
    if kind in _TYPES:
        return f"must be of type {_TYPES[kind]}"
    if kind in ("literal_error", "enum"):
        choices = str(context.get("expected", "")).replace(" or ", ", ").replace("'", '"')
        return f"must be one of {choices}"
    message = str(item["msg"])
    if message.startswith("Input should "):
        return "must " + message.removeprefix("Input should ")
    return "is not valid: " + message.removeprefix("Value error, ")


def _joined(wanted: Iterable[str]) -> str:
    types = [phrase.removeprefix("must be of type ") for phrase in wanted]
    if all(phrase.startswith("must be of type ") for phrase in wanted):
        return f"must be of type {' or '.join(types)}"
    return ", or ".join(wanted)
