"""The base class of every settings model: plain, frozen data that refuses what it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


class Settings(BaseModel):
    """Frozen, strict, without unknown keys, with validated defaults and no infinities.

    Fields are `Field(default=..., description="One sentence.", json_schema_extra={"unit": ...})`.
    Plugin authors may use it for their options; a plain pydantic model with `extra="forbid"`
    serves as well.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )
