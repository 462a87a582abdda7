"""One kind of step for a cohort: a forward pass and its draw, with fixed addresses.

A program runs its body directly, or, once captured, replays it as a CUDA graph. Everything a step
needs to know lies in the control tensor and in the cohort's tables, so one capture serves every
sequence that takes a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.program_attention import ProgramContext, running
from sfi_agent.engine.programs.cohort import Cohort
from sfi_agent.engine.programs.control import CHAINED, FAST, IDLE, SLOW, Control, SlotStep
from sfi_agent.engine.programs.layer_steps import LayerSteps, SharedPrefix, StepRows
from sfi_agent.engine.sampling import SamplingRows, entropy_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DrawMode", "EvidenceProgram", "PendingStep", "Program", "StepProgram"]

_WARM_UP_RUNS = 2
_RESULTS = 2
_IN_FLIGHT = 4
"""Steps whose results may be on their way to the host at once."""


@dataclass(frozen=True, slots=True)
class DrawMode:
    """What a program's draw has to be able to do; less is faster.

    Attributes:
        greedy: Whether every row is greedy.
        filtered: Whether some row has a top-k or top-p.
        with_entropy: Whether the entropy is computed.
    """

    greedy: bool = True
    filtered: bool = False
    with_entropy: bool = False


class PendingStep:
    """Results of a step on their way to the host.

    Args:
        results: `[batch, queries, 2]` float64 on the host once `copied` has happened.
        copied: None where the results are there already.
    """

    def __init__(self, results: Tensor, copied: torch.cuda.Event | None) -> None:
        self._results = results
        self._copied = copied

    def read(self, slot: int) -> list[tuple[int, float]]:
        """Token and entropy in nats per query of a slot; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return [(int(token), entropy) for token, entropy in self._results[slot].tolist()]


class Program:
    """What all programs share: control, capture, replay.

    Args:
        cohort: Whose rows are stepped.
        layers: The attention of its layers.
        queries: Tokens per row in the control tensor.
        own_tokens: Tokens that a step adds to a history.
    """

    def __init__(self, cohort: Cohort, layers: LayerSteps, queries: int, own_tokens: int) -> None:
        self.cohort = cohort
        self.layers = layers
        self.queries = queries
        self.own_tokens = own_tokens
        self.control = Control(cohort.batch, queries, cohort.device)
        self._kinds: list[int] = [IDLE] * cohort.batch
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def start(self, steps: dict[int, SlotStep]) -> None:
        """Start one step; slots without a part are idle.

        Args:
            steps: By slot. Its tables are up to date.
        """
        self.control.write(steps)
        self._kinds = [
            steps[slot].kind if slot in steps else IDLE for slot in range(self.cohort.batch)
        ]
        if self._graph is not None:
            self._graph.replay()
        else:
            self.body()

    @torch.no_grad()
    def capture(self, pool: tuple[int, int] | None) -> None:
        """Run the body idle, so that everything is compiled, then capture it.

        Args:
            pool: Memory shared with other graphs that never run at the same time.
        """
        device = self.cohort.device
        self.control.write({})
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self.body()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=cast(Any, pool), capture_error_mode="thread_local"):
            self.body()
        self._graph = graph

    def rows(self) -> StepRows:
        """What the rows of the step read, from the control tensor."""
        cohort, control = self.cohort, self.control
        kinds, sparse = control.kinds, cohort.sparse_rows
        from_memory = (kinds == FAST)[None, :] & sparse
        ends = torch.where(from_memory, control.memory_ends[None], control.history_ends[None])
        starts = torch.where(from_memory[..., None], cohort.memory_starts, 0)
        prefix = self._prefix(kinds)
        if prefix is not None:
            # What is shared is attended apart; rows of sliding layers read what is theirs.
            whole = cohort.whole_rows[:, None, None]
            starts = torch.where(whole, control.shared_ends[None, :, None], starts)
        processed = torch.where(kinds == SLOW, control.history_ends + self.own_tokens, 0)
        return StepRows(
            cohort.active_fields(kinds),
            starts.contiguous(),
            ends.contiguous(),
            processed,
            control.prompt_ends.contiguous(),
            prefix,
        )

    def _prefix(self, kinds: Tensor) -> SharedPrefix | None:
        """The prefix that the rows share, from any of them."""
        if self.layers.prefix_plan is None:
            return None
        some = (kinds != IDLE).int().argmax()[None]
        heads = self.cohort.geometry.kv_heads
        return SharedPrefix(
            self.cohort.history.fields.index_select(1, some),
            self.control.shared_ends.index_select(0, some),
            torch.zeros(1, heads, dtype=torch.int64, device=self.cohort.device),
        )

    def body(self) -> None:
        """What a step computes, from and into fixed addresses."""
        raise NotImplementedError


class EvidenceProgram(Program):
    """Evidence of query rows that a block has kept, once it is known which of them count.

    The control's token of a slot is the number of its row. Only keys are read, since nobody wants
    the attention's output.

    Args:
        cohort: Whose rows these are.
        layers: With captured queries and an evidence store.
        rules: How products become logits, per layer.
    """

    def __init__(self, cohort: Cohort, layers: LayerSteps, rules: Sequence[AttentionRule]) -> None:
        super().__init__(cohort, layers, queries=1, own_tokens=0)
        self._rules = tuple(rules)

    def body(self) -> None:
        """See `Program`."""
        captured = self.layers.captured_queries
        assert captured is not None
        self.layers.begin(self.rows(), self._kinds)
        slots = torch.arange(self.cohort.batch, device=self.cohort.device)
        row = self.control.tokens[:, 0]
        for layer in self.cohort.geometry.sparse_layers:
            query = captured[layer][slots, row][:, None]
            self.layers.attend_for_evidence(layer, query, self._rules[layer])


class StepProgram(Program):
    """One kind of step of the whole model; see the module text.

    Args:
        model: Its attention is switched to ours while the program runs its body.
        cohort: Whose rows are stepped.
        layers: The attention of its layers.
        queries: Tokens per row.
        mode: What the draw has to do.
        position_limit: Positions that the model has; what fills up a block stays below.

    Attributes:
        logits: `[batch, queries, vocabulary]` float32 of the last step, on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cohort: Cohort,
        layers: LayerSteps,
        queries: int,
        mode: DrawMode,
        position_limit: int,
    ) -> None:
        super().__init__(cohort, layers, queries, queries)
        self._position_limit = position_limit
        self.mode = mode
        self._model = model
        self._last = torch.zeros(cohort.batch, dtype=torch.int64, device=cohort.device)
        shape = (cohort.batch, queries, _RESULTS)
        self._results = torch.zeros(shape, dtype=torch.float64, device=cohort.device)
        pinned = cohort.device.type == "cuda"
        self._landing = [
            torch.zeros(shape, dtype=torch.float64, pin_memory=pinned) for _ in range(_IN_FLIGHT)
        ]
        self._turn = 0
        self.logits = torch.empty(0)

    def run(self, steps: dict[int, SlotStep]) -> PendingStep:
        """Start one step and send its results on their way (see `start`)."""
        self.start(steps)
        return self._deliver()

    def body(self) -> None:
        """See `Program`."""
        control = self.control
        tokens = torch.where(control.tokens == CHAINED, self._last[:, None], control.tokens)
        offsets = torch.arange(self.queries, device=self.cohort.device)
        positions = control.history_ends[:, None] + offsets
        self.layers.begin(self.rows(), self._kinds)
        with running(self.layers):
            result = self._model(
                input_ids=tokens,
                position_ids=positions.clamp(max=self._position_limit - 1),
                use_cache=False,
                logits_to_keep=self.queries,
                sfi=ProgramContext(),
            )
        logits = result.logits.float()
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self._draw(logits, positions + 1)

    def _draw(self, logits: Tensor, positions: Tensor) -> None:
        """Tokens behind every row, and their entropies, into the results."""
        control, queries = self.control, self.queries
        rows = SamplingRows(
            control.temperatures.repeat_interleave(queries),
            control.top_ps.repeat_interleave(queries),
            control.top_ks.repeat_interleave(queries),
            control.seeds.repeat_interleave(queries),
        )
        flat = logits.flatten(0, 1)
        mode = self.mode
        chosen = rows.choose(
            flat, positions.flatten(), greedy=mode.greedy, filtered=mode.filtered
        ).view(-1, queries)
        self._last.copy_(chosen[:, -1])
        self._results[..., 0].copy_(chosen)
        if mode.with_entropy:
            self._results[..., 1].copy_(entropy_nats(flat).view(-1, queries))

    def _deliver(self) -> PendingStep:
        if self.cohort.device.type != "cuda":
            return PendingStep(self._results.clone(), None)
        self._turn = (self._turn + 1) % len(self._landing)
        landing = self._landing[self._turn]
        landing.copy_(self._results, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return PendingStep(landing, copied)
