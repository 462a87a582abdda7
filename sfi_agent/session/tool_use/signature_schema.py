"""The schema of a function's arguments from any type hints that pydantic knows.

transformers describes plain types only; this also describes pydantic models, dataclasses, dates and
whatever else pydantic can make of JSON, in the form that chat templates know: references replaced
by what they point to, and "this or null" written as `nullable`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin

from sfi_agent.session.tool_use.call_arguments import hints_of

__all__ = ["HintProblem", "parameters_of_signature", "with_constraints"]


class HintProblem(ValueError):
    """A type hint that cannot be written as JSON."""


def with_constraints(function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that transformers reads from a function, with what it leaves out: limits in
    `Annotated` hints, and how long tuples are. What pydantic cannot describe stays as it is."""
    properties = dict(parameters["properties"])
    for name, hint in hints_of(function).items():
        if name in properties and _says_more(hint):
            kept = ("description", "enum")
            beside = {key: properties[name][key] for key in kept if key in properties[name]}
            try:
                properties[name] = {**_of_hint(hint), **beside}
            except ValueError:
                continue
    return {**parameters, "properties": properties}


def _says_more(hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is Annotated or (get_origin(hint) is tuple and ... not in arguments):
        return True
    return any(map(_says_more, arguments))


def parameters_of_signature(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of the arguments; their descriptions come from a Google-style docstring.

    Raises:
        ValueError: An argument has no type hint, none that can be written as JSON, or no
            description.
    """
    from transformers.utils.chat_template_utils import parse_google_format_docstring

    _, documented, _ = parse_google_format_docstring(inspect.getdoc(function) or "")
    described: Mapping[str, str] = documented or {}
    hints = hints_of(function)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hints:
            raise ValueError(f"the argument {name!r} has no type hint")
        if name not in described:
            raise ValueError(f"the docstring does not describe the argument {name!r}")
        try:
            schema = _of_hint(hints[name])
        except ValueError as error:
            raise HintProblem(f"the hint of {name!r} cannot be described: {error}") from error
        properties[name] = {**schema, "description": described[name]}
        if parameter.default is parameter.empty:
            required.append(name)
    found: dict[str, Any] = {"type": "object", "properties": properties}
    return {**found, "required": required} if required else found


def _of_hint(hint: Any) -> dict[str, Any]:
    from pydantic import PydanticInvalidForJsonSchema, PydanticUserError, TypeAdapter

    try:
        schema = TypeAdapter(hint).json_schema()
    except (PydanticUserError, PydanticInvalidForJsonSchema) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    plain: dict[str, Any] = _plain(_inlined(schema, schema.get("$defs", {}), ()))
    return plain


def _inlined(part: Any, definitions: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    """With definitions in place of references; one inside itself is any object."""
    if isinstance(part, list):
        return [_inlined(item, definitions, inside) for item in part]
    if not isinstance(part, Mapping):
        return part
    rest = {
        key: _inlined(item, definitions, inside)
        for key, item in part.items()
        if key not in ("$ref", "$defs")
    }
    name = str(part.get("$ref", "")).removeprefix("#/$defs/")
    if not name:
        return rest
    if name in inside:
        return {"type": "object", **rest}
    return {**_inlined(definitions[name], definitions, (*inside, name)), **rest}


def _plain(schema: Any) -> Any:
    """Without titles and defaults, and with `nullable`."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {
        name: {key: _plain(item) for key, item in part.items()}
        if name == "properties"
        else _plain(part)
        for name, part in schema.items()
        if name not in ("title", "default")
    }
    choices = kept.get("anyOf")
    if choices and {"type": "null"} in choices:
        others = [choice for choice in choices if choice != {"type": "null"}]
        beside = {name: part for name, part in kept.items() if name != "anyOf"}
        if len(others) == 1:
            return {**others[0], **beside, "nullable": True}
    return kept
