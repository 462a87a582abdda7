"""Refreshes of sequences whose history is in host memory.

Evidence needs every key, so it is taken from the pieces that a dense step streams anyway: a
selector is asked for a layer as soon as the step has attended to it. Only where it is known later
which queries count, behind a block that was verified, the keys are streamed once more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.host_gather import HostGather
from sfi_agent.engine.memory import RefreshPlan
from sfi_agent.engine.refresh import (
    EvidenceWriter,
    check_selections,
    checked_selection,
    note_starts,
)
from sfi_agent.engine.sequence import LayerState, SequenceState
from sfi_agent.protocols import Selection, Selector

__all__ = ["LayerWatch", "PassSelections", "refresh_streamed", "select_again"]


class LayerWatch:
    """Evidence of one layer from the pieces of its history that a step attends to.

    Args:
        layer: With captured queries.
        plan: Of the refresh.
        with_norms: Whether the selector needs norms of keys. They are computed from the pieces
            each time, which is little beside bringing them.
    """

    def __init__(self, layer: LayerState, plan: RefreshPlan, *, with_norms: bool) -> None:
        self._writer = EvidenceWriter(layer, plan)
        self._plan = plan
        self._norms: Tensor | None = None
        if with_norms and layer.captured_query is not None:
            shape = (layer.history.kv_heads, plan.history_tokens)
            self._norms = layer.captured_query.new_empty(shape, dtype=torch.float32)

    def see(self, piece: Piece) -> None:
        """A piece of the layer's history is on the device now."""
        self._writer.see(piece)
        if self._norms is not None:
            end = piece.start + piece.keys.shape[1]
            self._norms[:, piece.start : end] = torch.linalg.vector_norm(
                piece.keys, dim=-1, dtype=torch.float32
            )

    def choose(self, selector: Selector, budget: int) -> Selection:
        """Ask a selector, when every token has been seen.

        Raises:
            PluginError: What it returned is not shaped like a selection.
        """
        norms = self._norms
        if norms is not None:
            norms = norms[:, self._plan.sink_tokens : self._plan.recent_start]
        return checked_selection(selector, self._writer.evidence(norms), budget)


class PassSelections:
    """Selections that are made while a dense step runs, layer by layer.

    What a selector raises ends nothing: the step is finished, and the refresh raises it.

    Args:
        sequence: With a memory; its history ends where the step begins.
        selector: Asked once per layer with a memory, unless nothing is there to choose from.
        new_tokens: Of the step.
    """

    def __init__(self, sequence: SequenceState, selector: Selector, new_tokens: int) -> None:
        assert sequence.layout is not None
        self.plan = sequence.layout.plan(sequence.processed_tokens + new_tokens)
        self.selector = selector
        self._budget = min(sequence.layout.selected_tokens, self.plan.candidates)
        self._selections: list[Selection | None] = [None] * len(sequence.layers)
        self._failure: Exception | None = None

    def asks(self, layer: LayerState) -> bool:
        """Whether something has to be selected for a layer, so far as is known now."""
        return bool(self._budget) and self._failure is None and layer.captured_query is not None

    def watch(self, layer: LayerState) -> LayerWatch:
        """Who has to see the pieces of a layer that asks; one layer after the other."""
        return LayerWatch(layer, self.plan, with_norms="key_norms" in self.selector.needs)

    def choose(self, index: int, watch: LayerWatch) -> None:
        """All pieces of a layer have been seen."""
        try:
            self._selections[index] = watch.choose(self.selector, self._budget)
        except Exception as error:
            self._failure = error

    def selections(self) -> list[Selection | None]:
        """Per layer what was selected; None where nothing was.

        Raises:
            Exception: What the selector raised.
        """
        if self._failure is not None:
            raise self._failure
        return self._selections


def select_again(
    sequence: SequenceState, selector: Selector, stream: HistoryStream
) -> PassSelections:
    """Selections from queries that an earlier step has kept; streams the keys of all layers."""
    chosen = PassSelections(sequence, selector, 0)
    tokens = chosen.plan.history_tokens
    asking = [(i, layer) for i, layer in enumerate(sequence.layers) if chosen.asks(layer)]
    histories = [layer.history for _, layer in asking if layer.history.streamed]
    with stream.reading(histories, with_values=False):
        for index, layer in asking:
            if chosen.asks(layer):
                watch = chosen.watch(layer)
                for piece in _pieces(layer.history, tokens, stream):
                    watch.see(piece)
                chosen.choose(index, watch)
    return chosen


def refresh_streamed(
    sequence: SequenceState,
    chosen: PassSelections,
    segment_capacity: int,
    gather: HostGather,
) -> list[Selection | None]:
    """Replace the selection of every layer with a memory by what was chosen.

    Args:
        sequence: Just processed densely.
        chosen: By its last step, or from the queries that this has kept.
        segment_capacity: How many fast tokens must fit until the next refresh.
        gather: Fills memories.

    Returns:
        The selection per layer; None for dense and sliding layers and where no candidates exist.

    Raises:
        PluginError: The selector broke its contract; or whatever it raised.
    """
    layout, plan = sequence.layout, chosen.plan
    assert layout is not None and plan == layout.plan(sequence.processed_tokens)
    layout.begin_segment(plan, segment_capacity)
    selections = chosen.selections()
    # Before anybody follows the positions.
    mean = check_selections(selections, plan, chosen.selector)
    for layer in sequence.layers:
        layer.captured_query = None
        if layer.memory is not None:
            layer.memory.allocate(layer.history)
    gather.fill(sequence, plan, selections)
    layout.mean_selected_tokens = mean
    note_starts(sequence)
    layout.ready = True
    return selections


def _pieces(history: LayerHistory, tokens: int, stream: HistoryStream) -> Iterator[Piece]:
    return stream.pieces(history, tokens) if history.streamed else history.pieces(0, tokens)
