"""Base of the configuration models: settings whose every validation error is a ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from sfi_agent.errors import ConfigError
from sfi_agent.problems import QUANTITIES, problem_lines, problems_of
from sfi_agent.settings import Settings

__all__ = ["UNITS", "ConfigModel", "merge_deeply"]

Model = TypeVar("Model", bound="ConfigModel")

UNITS = QUANTITIES | {"choice", "entries", "flag", "name", "number", "seed", "text"}
"""The closed list of units that settings are given in. "number" is a plain ratio or exponent."""


class ConfigModel(Settings):
    """Settings that raise ConfigError wherever pydantic would raise its own ValidationError."""

    def __init__(self, /, **values: Any) -> None:
        __tracebackhide__ = True
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(type(self), error) from error

    # Without this mark pydantic calls `__init__` for nested models too, and the path of a nested
    # problem ("memory.sink_tokens") would be lost inside the text of another one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[Model], obj: Any, **options: Any) -> Model:
        """As pydantic's, with ConfigError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _config_error(cls, error) from error

    @classmethod
    def model_validate_json(
        cls: type[Model], json_data: str | bytes | bytearray, **options: Any
    ) -> Model:
        """As pydantic's, with ConfigError."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _config_error(cls, error) from error

    def model_copy(
        self: Model, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Model:
        """A copy; with `update`, validated (pydantic's own would not look at the new values)."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self).model_validate({**self.model_dump(), **update})


def merge_deeply(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top; mappings of sections are merged key by key, the rest replaced.

    A mapping with a `name` is an entry of a plugin and replaces the former entry as a whole: its
    options would mean nothing to another plugin. A settings object replaces its section.
    """
    merged = dict(base)
    for key, value in changes.items():
        former = merged.get(key)
        if isinstance(value, Mapping) and isinstance(former, Mapping) and "name" not in former:
            merged[key] = merge_deeply(former, value)
        else:
            merged[key] = value
    return merged


def _config_error(model: type[Settings], error: ValidationError) -> ConfigError:
    return ConfigError(problem_lines(f"{model.__name__} is not valid", problems_of(error, model)))
