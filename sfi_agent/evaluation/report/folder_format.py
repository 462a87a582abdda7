"""The files of a results folder that the page is made from, as checked models.

Fields that the page does not use are ignored, so a folder may hold more than is named here; what
is named must be there and of the right kind. A number that was not measured is None.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from sfi_agent.evaluation.report.row_format import FolderPart, Row, Stretch

__all__ = [
    "FORMAT",
    "FailedRun",
    "Model",
    "Policy",
    "Recall",
    "RecallFile",
    "Refresh",
    "Results",
    "Row",
    "SkippedPolicy",
    "Step",
    "Stretch",
    "Trace",
]

FORMAT = 1
"""The version of the folder's format that this page reads."""

Run = tuple[int, int, int]
"""Start position, length in tokens, count of (layer, head) pairs that selected each token."""


class Model(FolderPart):
    """Which model ran, and where. None where it was not written down."""

    name: str
    class_name: str | None = Field(default=None, alias="class")
    layers: int | None = None
    query_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    device: str | None = None


class Policy(FolderPart):
    """One policy of the grid; everything but the name is None in mode dense."""

    name: str
    preset: str | None = None
    mode: Literal["dense", "slow_fast"]
    boundaries: str | None = None
    selector: str | None = None
    slow_step: str | None = None
    sink_tokens: int | None = None
    selected_tokens: int | None = None
    recent_tokens: int | None = None
    settings: dict[str, Any] = {}
    config: dict[str, Any] = {}


class SkippedPolicy(FolderPart):
    """A combination of the grid that was not run, and why."""

    policy: str
    reason: str


class FailedRun(FolderPart):
    """A run that ended in an error."""

    policy: str
    task: str
    context_tokens: int
    seed: int | None = None
    case: int | None = None
    error: str
    message: str


class Results(FolderPart):
    """`results.json`: the table, and what the head of the page says."""

    format: int
    created: str
    command: str | None = None
    title: str = ""
    model: Model
    versions: dict[str, str] = {}
    workers: int | None = None
    planned_runs: int
    finished_runs: int
    failed_runs: int
    complete: bool
    seconds: float | None = None
    policies: list[Policy] = Field(min_length=1)
    skipped: list[SkippedPolicy] = []
    failed: list[FailedRun] = []
    notes: list[str] = []
    stretch_tokens: int | None = Field(default=None, ge=1)
    rows: list[Row]

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"policies named twice: {', '.join(twice)}")
        unknown = sorted({row.policy for row in self.rows} - set(names))
        if unknown:
            raise ValueError(f"rows of policies that are not listed: {', '.join(unknown)}")
        self._check_stretches()
        return self

    def _check_stretches(self) -> None:
        for row in self.rows:
            places = [stretch.first_token for stretch in row.stretches or ()]
            if not places:
                continue
            if self.stretch_tokens is None:
                raise ValueError("rows have stretches, but stretch_tokens is missing")
            if places != sorted(set(places)) or any(at % self.stretch_tokens for at in places):
                raise ValueError(
                    f"stretches of {row.policy} begin at {places}, not at multiples of "
                    f"{self.stretch_tokens} in order"
                )


class Step(FolderPart):
    """One generated token; the fields of `StepRecord`."""

    position: int
    kind: Literal["fast", "slow", "retry"]
    slow_step: str | None = None
    reason: str = ""
    memory_tokens: int
    segment_tokens: int
    seconds: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Refresh(FolderPart):
    """What one refresh selected.

    Attributes:
        history_tokens: Length of the history that the selection was made from.
        step: Index into the trace's steps; None where no kept token belongs to it.
        selected_heads_total: Layers times KV heads that selected.
        union: Runs of positions with the number of (layer, KV head) pairs that selected them.
        layers: The same per layer, counting KV heads.
        layers_total: How many layers selected; `layers` may hold fewer.
    """

    history_tokens: int
    step: int | None
    selected_heads_total: int
    union: list[Run]
    layers: dict[int, list[Run]] = {}
    layers_total: int

    @model_validator(mode="after")
    def _runs_ascend(self) -> Self:
        for runs in (self.union, *self.layers.values()):
            end = 0
            for start, length, count in runs:
                if start < end or length < 1 or count < 1 or start + length > self.history_tokens:
                    raise ValueError(
                        f"run [{start}, {length}, {count}] is out of order or outside the history "
                        f"of {self.history_tokens} tokens"
                    )
                end = start + length
        return self


class Trace(FolderPart):
    """`traces/<id>.json`: one answer, token by token."""

    format: int
    id: str
    policy: str
    task: str
    context_tokens: int
    protocol: str
    answers: str
    seed: int
    case: int
    case_seed: int | None = None
    question: str
    references: list[str]
    output: str
    right: int
    parts: int
    exact: bool
    num_layers: int
    kv_heads: int
    dense_layers: list[int] = []
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    selected_tokens: int | None = None
    prompt_tokens: int
    tokens: list[str]
    steps: list[Step]
    slow_steps_total: int
    refreshes: list[Refresh]

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        for index, step in enumerate(self.steps):
            if not 0 <= step.position < len(self.tokens):
                raise ValueError(
                    f"step {index} is at position {step.position}, but there are "
                    f"{len(self.tokens)} tokens"
                )
        for refresh in self.refreshes:
            if refresh.step is not None and not 0 <= refresh.step < len(self.steps):
                raise ValueError(f"a refresh names step {refresh.step} of {len(self.steps)}")
            if refresh.history_tokens > len(self.tokens):
                raise ValueError(
                    f"a refresh saw {refresh.history_tokens} tokens of {len(self.tokens)}"
                )
        return self


class Recall(FolderPart):
    """Attention mass recalled by one policy: per layer and query head, 0 to 1, higher is better.

    A layer that is None is dense; `layers` is None where nothing was measured, with the reason.
    """

    fast_steps: int
    layers: list[list[float] | None] | None
    mean: float | None
    reason: str = ""


class RecallFile(FolderPart):
    """`recall.json`: recall per policy, measured on one case."""

    format: int
    task: str
    context_tokens: int
    seed: int | None = None
    case: int | None = None
    policies: dict[str, Recall]
