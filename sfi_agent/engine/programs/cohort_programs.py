"""The programs of one cohort: made when they are first needed, kept, and made anew when it outgrows
what they were made for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.kernels import AttentionPlan, device_limits, plan_attention
from sfi_agent.engine.programs.cohort import Cohort
from sfi_agent.engine.programs.compilation import compiled_modules
from sfi_agent.engine.programs.layer_steps import EvidenceStore, LayerSteps
from sfi_agent.engine.programs.program import DrawMode, EvidenceProgram, Program, StepProgram
from sfi_agent.engine.requests import StepOutcome
from sfi_agent.errors import SfiError
from sfi_agent.observe.log import log_event
from sfi_agent.protocols import Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CohortPrograms", "ProgramNotMade", "ProgramOptions", "capacity_class"]

StepKind = Literal["fast", "dense", "mixed", "slow", "block"]
_SLOW_SHARE = 4
"""Mixed steps are planned for as many slow rows as a batch takes at once (`engine/batch.py`)."""

_LEAST_CAPACITY = 8192


class ProgramNotMade(Exception):
    """A program could not be compiled or captured; its cause says why. It stepped nothing.

    Attributes:
        outcomes: Of the requests that were executed before; None for the others.
    """

    outcomes: Sequence[StepOutcome | None] = ()


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """How programs are made.

    Attributes:
        capture: Whether they become CUDA graphs.
        compile_backend: Compiles the model's modules for steps of single tokens; None leaves them.
        pool: Memory that all captured graphs of a model share.
        position_limit: Positions that the model has, for tokens that fill up a block.
        on_progress: Told what is compiled and captured.
    """

    capture: bool
    compile_backend: Callable[..., Any] | None
    pool: tuple[int, int] | None
    position_limit: int
    on_progress: Callable[[str], None]


def capacity_class(tokens: int) -> int:
    """Room that programs are made for: the next quarter step between powers of two."""
    size = _LEAST_CAPACITY
    while size * 2 < tokens:
        size *= 2
    return next(size * quarters // 4 for quarters in range(4, 9) if size * quarters // 4 >= tokens)


class CohortPrograms:
    """See the module text.

    Args:
        model: Its attention is switched to ours.
        cohort: Whose steps these are.
        query_heads: Query heads of a layer.
        options: See `ProgramOptions`.

    Attributes:
        capacity: Most tokens of a history that the present programs are made for.
        rules: How products become logits per layer, known with the first program.
    """

    def __init__(
        self, model: PreTrainedModel, cohort: Cohort, query_heads: int, options: ProgramOptions
    ) -> None:
        self.cohort = cohort
        self.capacity = 0
        self._model = model
        self._query_heads = query_heads
        self._options = options
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._stores: dict[Ranking | None, EvidenceStore] = {}
        self._captured_queries: Tensor | None = None
        self.rules: list[AttentionRule] = []

    @property
    def bytes(self) -> int:
        """Of evidence, ranking keys and kept queries."""
        kept = self._captured_queries.nbytes if self._captured_queries is not None else 0
        return kept + sum(store.bytes for store in self._stores.values())

    @property
    def any_made(self) -> bool:
        """Whether some step has been made a program."""
        return bool(self._programs)

    def make_room(self, tokens: int) -> None:
        """Let histories of so many tokens be stepped; programs that lack room are dropped."""
        if tokens > self.capacity:
            self.capacity = capacity_class(tokens)
            self._programs.clear()
            self._stores.clear()

    def store(self, ranking: Ranking | None) -> EvidenceStore:
        """Where evidence for such a selector is left."""
        if ranking not in self._stores:
            self._stores[ranking] = EvidenceStore(
                self.cohort, self._query_heads, self.capacity, ranking
            )
        return self._stores[ranking]

    def step(
        self,
        kind: StepKind,
        mode: DrawMode,
        queries: int = 1,
        ranking: Ranking | None = None,
        *,
        shared: bool = False,
    ) -> StepProgram:
        """The program of a kind of step.

        Args:
            kind: "fast" steps no slow rows, "dense" leaves no evidence, "mixed" does for its slow
                rows, which are few, "slow" for many, "block" keeps queries.
            mode: What the draw has to do.
            queries: Tokens per row, above 1 for blocks alone.
            ranking: Of the selector, for "mixed" and "slow".
            shared: Whether all rows share a prefix that is read once, for "dense" and "block".
        """
        key = (kind, mode, queries, ranking, shared)
        program = self._programs.get(key)
        if program is None:
            evidence = self.store(ranking) if kind in ("mixed", "slow") else None
            kept = self._queries_buffer(queries) if kind == "block" else None
            layers = LayerSteps(
                self.cohort,
                self._plans(kind, queries),
                self._query_heads,
                queries,
                evidence,
                kept,
                self._plan(1, queries * self.cohort.batch, self.capacity) if shared else None,
            )
            program = StepProgram(
                self._model, self.cohort, layers, queries, mode, self._options.position_limit
            )
            self._make(program, f"{kind} step, batch {self.cohort.batch}, {queries} queries")
            self._programs[key] = program
        assert isinstance(program, StepProgram)
        return program

    def evidence(self, ranking: Ranking | None) -> EvidenceProgram:
        """The program that asks kept queries for evidence."""
        key = ("evidence", ranking)
        program = self._programs.get(key)
        if program is None:
            store = self.store(ranking)
            layers = LayerSteps(
                self.cohort,
                self._plans("mixed", 1),
                self._query_heads,
                1,
                store,
                self._captured_queries,
            )
            program = EvidenceProgram(self.cohort, layers, self.rules)
            self._make(program, f"evidence, batch {self.cohort.batch}")
            self._programs[key] = program
        assert isinstance(program, EvidenceProgram)
        return program

    def kept_query(self, layer: int, slot: int) -> Tensor:
        """Kept queries of a slot, `[query_heads, rows, key_dim]`, a copy."""
        assert self._captured_queries is not None
        return self._captured_queries[layer, slot].transpose(0, 1).clone()

    def _plans(self, kind: StepKind, queries: int) -> tuple[AttentionPlan, AttentionPlan]:
        """Plans of sparse layers and of layers that read their history at every step."""
        geometry, batch = self.cohort.geometry, self.cohort.batch
        slow = max(1, -(-batch // _SLOW_SHARE)) if kind == "mixed" else batch
        memory = geometry.sink_tokens + geometry.selected_tokens + geometry.recent_tokens
        sizes = {
            "fast": ((batch, memory), (batch, self.capacity)),
            "mixed": ((slow, self.capacity), (batch, self.capacity)),
        }
        whole = ((batch, self.capacity), (batch, self.capacity))
        first, second = (
            self._plan(sequences, queries, tokens) for sequences, tokens in sizes.get(kind, whole)
        )
        return first, second

    def _plan(self, sequences: int, queries: int, tokens: int) -> AttentionPlan:
        geometry = self.cohort.geometry
        return plan_attention(
            sequences * geometry.kv_heads,
            queries * self._query_heads // geometry.kv_heads,
            max(1, tokens),
            max(geometry.key_dim, geometry.value_dim),
            geometry.dtype.itemsize,
            device_limits(self.cohort.device),
        )

    def _queries_buffer(self, queries: int) -> Tensor:
        """Room for the queries of blocks; other block programs are dropped when it moves."""
        geometry, present = self.cohort.geometry, self._captured_queries
        if present is None or present.shape[2] < queries:
            for key in [key for key in self._programs if key[0] in ("block", "evidence")]:
                del self._programs[key]
            shape = (len(geometry.sparse), self.cohort.batch, queries, self._query_heads)
            self._captured_queries = torch.zeros(
                *shape, geometry.key_dim, dtype=geometry.dtype, device=self.cohort.device
            )
            if present is not None:
                self._captured_queries[:, :, : present.shape[2]].copy_(present)
        assert self._captured_queries is not None
        return self._captured_queries

    def _make(self, program: Program, what: str) -> None:
        options = self._options
        if not options.capture or not self.rules:
            # Run idle, so that what goes wrong goes wrong before anything is stepped; and once as
            # it is, because compiled code does not say which layer asks.
            program.start({})
        if not self.rules:
            self._check_order(program.layers)
        if not options.capture:
            return
        started = time.perf_counter()
        options.on_progress(f"preparing {what}")
        backend = options.compile_backend
        around = (
            compiled_modules(self._model, backend, options.on_progress)
            if backend is not None
            else nullcontext()
        )
        try:
            with around:
                program.capture(options.pool)
        except (SfiError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Nothing was stepped: programs are warmed up and captured with idle slots.
            raise ProgramNotMade(what) from error
        seconds = time.perf_counter() - started
        log_event("info", "program_captured", step=what, seconds=round(seconds, 3))

    def _check_order(self, layers: LayerSteps) -> None:
        """Layers must have asked one after the other: they are told apart by their turn."""
        expected = len(self.cohort.geometry.sparse)
        if layers.order != list(range(expected)):
            got = f"attention calls of layers {layers.order} instead of 0 to {expected - 1} in turn"
            raise ProgramNotMade(got)
        self.rules = list(layers.rules)
