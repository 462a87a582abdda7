"""Entries of a configuration that name a plugin: a name and its options, flat in YAML and JSON.

The options are validated by the model that the plugin registered. An entry is plain data: it
keeps what was given, and compares by what is in force, so `{name: entropy}` equals an entry
that spells the plugin's defaults out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from sfi_agent.plugin_loading import load_plugins
from sfi_agent.problems import Problem, problems_error, problems_of, show_value
from sfi_agent.registry import PluginKind, Registered, unknown_name

__all__ = ["BoundaryEntry", "PluginEntry", "SelectorEntry", "validate_options"]

Entry = TypeVar("Entry", bound="PluginEntry")


@dataclass(frozen=True, slots=True, repr=False)
class PluginEntry:
    """A plugin's name with its options. Written as a mapping: `{name: entropy, when: now}`.

    Attributes:
        name: Name under which the plugin registered.
        given_json: The options that were given, validated, as canonical JSON.
        resolved_json: All options, with the defaults of those not given, as canonical JSON.
    """

    kind: ClassVar[PluginKind]
    example: ClassVar[str]

    name: str
    given_json: str = field(compare=False)
    resolved_json: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, without the name; a new dict at each call."""
        options: dict[str, Any] = json.loads(self.given_json)
        return options

    @property
    def resolved_options(self) -> dict[str, Any]:
        """All options in force, the plugin's defaults included; a new dict at each call."""
        options: dict[str, Any] = json.loads(self.resolved_json)
        return options

    def flat(self) -> dict[str, Any]:
        """The entry as configurations write it: the name, then the given options."""
        return {"name": self.name, **self.options}

    def resolved(self) -> dict[str, Any]:
        """The name, then all options in force."""
        return {"name": self.name, **self.resolved_options}

    def __repr__(self) -> str:
        return repr(self.flat())

    @classmethod
    def parse(cls: type[Entry], value: object) -> Entry:
        """Read an entry from a mapping with `name`, or return an entry as it is.

        Raises:
            PydanticCustomError: For pydantic to collect; carries one problem per wrong option.
            PluginError: An installed plugin is broken.
        """
        if isinstance(value, cls):
            return value
        name, given = _split(cls, value)
        known = load_plugins().of_kind(cls.kind)
        if name not in known:
            raise problems_error([Problem("name", unknown_name(cls.kind, name, known))])
        options = validate_options(known[name], given)
        resolved = options.model_dump(mode="json", by_alias=True)
        return cls(
            name=name,
            given_json=json.dumps(_given(options, given), allow_nan=False),
            resolved_json=json.dumps(resolved, sort_keys=True, allow_nan=False),
        )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                PluginEntry.flat, return_schema=core_schema.dict_schema()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "description": f"The name of a {cls.kind} and its options.",
        }


class BoundaryEntry(PluginEntry):
    """A boundary detector with its options."""

    __slots__ = ()
    kind = "detector"
    example = "{name: punctuation}"


class SelectorEntry(PluginEntry):
    """A selector with its options."""

    __slots__ = ()
    kind = "selector"
    example = "{name: per_head}"


def validate_options(registered: Registered, options: Mapping[str, Any]) -> BaseModel:
    """The plugin's options model filled with these options; those not given keep their defaults.

    Raises:
        PydanticCustomError: An option is unknown, out of range, or not plain data.
    """
    name = registered.name
    try:
        # Through JSON, so that YAML, JSON and Python callers meet the same rules.
        text = json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = Problem(
            name,
            f"options are not plain data ({error})",
            got=show_value(dict(options)),
            allowed="text, finite numbers, true, false, null, lists and mappings of these",
        )
        raise problems_error([problem]) from error
    try:
        return registered.config_model.model_validate_json(text)
    except ValidationError as error:
        found = problems_of(error, registered.config_model)
        raise problems_error([problem.below([name]) for problem in found]) from error


def _split(cls: type[PluginEntry], value: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        remedy = f"Write {{name: {value}}}" if isinstance(value, str) else ""
        allowed = f"a mapping with name and options, such as {cls.example}"
        raise problems_error([Problem("", got=show_value(value), allowed=allowed, remedy=remedy)])
    options = dict(value)
    if "name" not in options:
        allowed = f"a mapping with a name, such as {cls.example}"
        raise problems_error([Problem("name", "missing", got=show_value(options), allowed=allowed)])
    name = options.pop("name")
    if not isinstance(name, str):
        raise problems_error([Problem("name", got=show_value(name), allowed="text")])
    return name, options


def _given(options: BaseModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The validated values of the options that the author wrote, in the model's order."""
    data = options.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if given.keys() - data.keys():
        return data  # A model that renames options is taken at its word.
    return {key: value for key, value in data.items() if key in given}
