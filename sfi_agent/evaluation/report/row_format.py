"""A row of the table as the page reads it, and the base of all parts of a results folder."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

__all__ = ["FolderPart", "Row", "Stretch"]


class FolderPart(BaseModel):
    """Part of a file of the folder: fields that the page does not use are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Stretch(FolderPart):
    """A stretch of the right answers, by the token where it begins, summed over a row's cases.

    Attributes:
        output_tokens: Of the answers that begin in it; `dense_output_tokens` those of mode dense
            on the same cases, None where they are not known.
    """

    first_token: int = Field(ge=0)
    right: int = Field(ge=0)
    parts: int = Field(ge=1)
    output_tokens: int = Field(ge=0)
    dense_output_tokens: int | None = Field(default=None, ge=0)


class Row(FolderPart):
    """One policy on one task, context length and protocol; numbers are None where nothing ran."""

    policy: str
    task: str
    context_tokens: int
    protocol: str
    answers: str
    cases: int = Field(ge=0)
    failed: int = Field(ge=0)
    right: int | None
    parts: int | None
    exact: int | None
    answers_given: int | None
    slow_share: float | None
    acceptance: float | None = None
    retries: int | None = None
    generated_tokens: int | None
    dense_passes: int | None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    memory_tokens_mean: float | None = None
    agreed_tokens_median: float | None = None
    agreed_share: float | None = None
    seconds_per_token: float | None = None
    reasons: dict[str, int] | None = None
    stretches: list[Stretch] | None = None

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        pairs = (("right", "parts"), ("exact", "answers_given"))
        for part, whole in pairs:
            few, many = getattr(self, part), getattr(self, whole)
            if few is not None and many is not None and not 0 <= few <= many:
                raise ValueError(f"{part} {few} does not lie between 0 and {whole} {many}")
        for stretch in self.stretches or ():
            if stretch.right > stretch.parts:
                raise ValueError(
                    f"right {stretch.right} of {stretch.parts} parts in the stretch "
                    f"from {stretch.first_token}"
                )
        return self
