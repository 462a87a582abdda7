"""The parts of a grid that are sections of their own: tasks, and what is recorded in detail."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sfi_agent.config_model import ConfigModel
from sfi_agent.errors import InputError
from sfi_agent.evaluation.tasks import task_named
from sfi_agent.problems import Problem, problems_error, show_value

__all__ = ["CASES_PER_SEED", "Distinct", "TaskEntry", "TraceSettings"]

CASES_PER_SEED = 10_000


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise problems_error([Problem("", got=f"{show_value(twice[0])} twice", allowed="distinct")])
    return values


Distinct = AfterValidator(_distinct)
"""Refuses a list with a value that occurs twice."""
PositiveInteger = Annotated[int, Field(ge=1)]


def _known_task(name: str) -> str:
    try:
        task_named(name)
    except InputError as error:
        raise problems_error([Problem("", str(error))]) from error
    return name


class TaskEntry(ConfigModel):
    """A task of the grid, with its lengths and how it is played."""

    name: Annotated[str, AfterValidator(_known_task)] = Field(
        description="Name of an evaluation task.", json_schema_extra={"unit": "name"}
    )
    context_tokens: Annotated[tuple[PositiveInteger, ...], Distinct] = Field(
        min_length=1,
        strict=False,
        description="Lengths of the contexts; every policy meets each of them.",
        json_schema_extra={"unit": "tokens"},
    )
    cases: int = Field(
        default=10,
        ge=1,
        le=CASES_PER_SEED,
        description="Cases per context length and seed.",
        json_schema_extra={"unit": "number"},
    )
    protocol: Literal["dense_question", "sparse_question"] = Field(
        default="dense_question",
        description="dense_question processes the question with the prompt, densely; "
        "sparse_question decodes its tokens under the policy.",
        json_schema_extra={"unit": "choice"},
    )
    answers: Literal["own", "reference"] = Field(
        default="own",
        description="What later turns of a case build on: the policy's own answers or the "
        "reference answers.",
        json_schema_extra={"unit": "choice"},
    )

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells the entries of a grid apart: name, protocol, answers."""
        return (self.name, self.protocol, self.answers)


class TraceSettings(ConfigModel):
    """How much of a few runs is recorded in detail, for the token view and the recall map."""

    policies: int = Field(
        default=12,
        ge=0,
        description="Policies whose first case is recorded, evenly spread over those of the "
        "grid; dense comes on top. 0 records nothing.",
        json_schema_extra={"unit": "number"},
    )
    slow_steps: int = Field(
        default=24,
        ge=2,
        description="Slow steps per run whose selection is kept, spread evenly.",
        json_schema_extra={"unit": "number"},
    )
    layers: int = Field(
        default=8,
        ge=1,
        description="Layers whose selection is kept, spread evenly; the union over all layers "
        "always is.",
        json_schema_extra={"unit": "layers"},
    )
    probe_every_steps: int = Field(
        default=4,
        ge=1,
        description="The recalled attention mass is measured at every so many steps; each of "
        "them reads the whole history.",
        json_schema_extra={"unit": "number"},
    )

    def as_recorded(self) -> dict[str, int]:
        """What decides the content of one trace; traces of other settings are made anew."""
        return self.model_dump(exclude={"policies"})
