"""From the evidence of a program to filled memories, for the rows of a batch that refresh now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.kernels import flush, gather, select_ranked
from sfi_agent.engine.memory import RefreshPlan
from sfi_agent.engine.programs.cohort import Cohort
from sfi_agent.engine.programs.layer_steps import EvidenceStore
from sfi_agent.engine.refresh import check_selections, checked_selection
from sfi_agent.engine.requests import RefreshOrder
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Evidence, Selection

__all__ = ["RowRefresh", "flush_segments", "refresh_rows", "to_device"]

_NUMBERS_AT_ONCE = 1 << 25
"""Logits that a selector gets at once; what it makes of them is several times as much."""


@dataclass(frozen=True, slots=True)
class RowRefresh:
    """A refresh of one row.

    Attributes:
        slot: Of the sequence.
        sequence: Just processed densely by a program with evidence.
        order: What is asked for.
    """

    slot: int
    sequence: SequenceState
    order: RefreshOrder


def to_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers as a tensor on the device, without making the host wait."""
    tensor = torch.tensor(numbers)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def flush_segments(cohort: Cohort, slots: Sequence[int], rows: Sequence[SequenceState]) -> None:
    """Append the open segments of some rows to their histories, in one launch.

    The histories have room, and the tables are up to date.
    """
    numbers = [[0] * cohort.batch for _ in range(3)]
    most = 0
    for slot, sequence in zip(slots, rows, strict=True):
        tokens, layout = sequence.segment_tokens, sequence.layout
        if layout is not None and tokens:
            start = sequence.processed_tokens - tokens
            for column, number in zip(numbers, (layout.segment_start, tokens, start), strict=True):
                column[slot] = number
            most = max(most, tokens)
    if not most:
        return
    starts, lengths, ends = to_device(numbers, cohort.device)
    active = (lengths > 0)[None] & cohort.sparse_rows
    flush(cohort.memory, cohort.history, starts, lengths, ends, active, most_tokens=most)
    for slot, sequence in zip(slots, rows, strict=True):
        if tokens := numbers[1][slot]:
            for layer in sequence.layers:
                if layer.memory is not None:
                    layer.history.note_written(tokens)
            sequence.end_segment()


def refresh_rows(
    cohort: Cohort, store: EvidenceStore, rows: Sequence[RowRefresh]
) -> list[list[Selection | None] | None]:
    """Replace the selection of some rows by what their evidence says.

    Args:
        cohort: Whose rows these are.
        store: With the evidence of their last step.
        rows: At least one.

    Returns:
        Per row the selections, where its order wants to see them.

    Raises:
        PluginError: A selector broke its contract.
    """
    plans = []
    for row in rows:
        layout = row.sequence.layout
        assert layout is not None
        plan = layout.plan(row.sequence.processed_tokens)
        layout.begin_segment(plan, row.order.segment_capacity)
        for layer in row.sequence.layers:
            if layer.memory is not None:
                layer.memory.allocate(layer.history)
                # What the host knew of the starts before is no longer so.
                layer.memory.common_start = None
        plans.append(plan)
    cohort.place([row.slot for row in rows], [row.sequence for row in rows])
    tokens = [0] * cohort.batch
    for row, plan in zip(rows, plans, strict=True):
        tokens[row.slot] = plan.history_tokens
    lengths = to_device(tokens, cohort.device)
    shown: list[list[Selection | None] | None] = [None] * len(rows)
    for members in _alike(rows):
        chosen = [rows[index] for index in members]
        positions, counts = _choose(cohort, store, lengths, chosen, [plans[i] for i in members])
        for index in members:
            if rows[index].order.with_selections:
                shown[index] = _selections(cohort, rows[index], plans[index], positions, counts)
    return shown


def _alike(rows: Sequence[RowRefresh]) -> list[list[int]]:
    """Rows that one launch can fill: the selected part of their memories has the same size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        layout = row.sequence.layout
        assert layout is not None
        groups.setdefault((layout.selected_capacity, id(row.order.selector)), []).append(index)
    return list(groups.values())


def _choose(
    cohort: Cohort,
    store: EvidenceStore,
    lengths: Tensor,
    rows: Sequence[RowRefresh],
    plans: Sequence[RefreshPlan],
) -> tuple[Tensor, Tensor]:
    """Select and gather for rows that are alike; positions and counts as `gather` takes them."""
    geometry = cohort.geometry
    slots = [row.slot for row in rows]
    refreshing = [slot in slots for slot in range(cohort.batch)]
    active = (to_device([refreshing], cohort.device) & cohort.sparse_rows).contiguous()
    shape = (len(geometry.sparse), cohort.batch, geometry.kv_heads)
    sink, recent = geometry.sink_tokens, geometry.recent_tokens
    budget = geometry.selected_tokens
    layout = rows[0].sequence.layout
    assert layout is not None
    # Without sparse layers nothing is selected anywhere.
    most = budget if any(geometry.sparse) else 0
    mean = [float(min(most, plan.candidates)) for plan in plans]
    if not layout.selected_capacity:
        positions = torch.full((*shape, 1), -1, dtype=torch.int64, device=cohort.device)
        counts = torch.zeros(shape, dtype=torch.int64, device=cohort.device)
    elif store.ranking is not None and store.scratch is not None:
        positions, counts = select_ranked(
            store.ranking, store.scratch, lengths, budget, geometry.kv_heads, sink, recent,
            active=active,
        )  # fmt: skip
    else:
        positions = torch.full((*shape, budget), -1, dtype=torch.int64, device=cohort.device)
        counts = torch.zeros(shape, dtype=torch.int64, device=cohort.device)
        mean = [
            _ask_selector(cohort, store, row, plan, positions, counts)
            for row, plan in zip(rows, plans, strict=True)
        ]
    gather(
        cohort.history, cohort.memory, positions, counts, lengths, cohort.memory_starts, active,
        selected_capacity=layout.selected_capacity, sink_tokens=sink, recent_tokens=recent,
    )  # fmt: skip
    for row, selected in zip(rows, mean, strict=True):
        assert row.sequence.layout is not None
        row.sequence.layout.mean_selected_tokens = selected
        row.sequence.layout.ready = True
    return positions, counts


def _ask_selector(
    cohort: Cohort,
    store: EvidenceStore,
    row: RowRefresh,
    plan: RefreshPlan,
    positions: Tensor,
    counts: Tensor,
) -> float:
    """Let a selector that is no ranking choose; the mean number selected.

    Selectors choose for every row of a batch as for that row alone, which their contract test
    holds them to. So several layers are asked for at once, as a batch.
    """
    selector, budget = row.order.selector, min(cohort.geometry.selected_tokens, plan.candidates)
    layers = cohort.geometry.sparse_layers
    if not budget or not layers:
        return 0.0
    at_once = max(1, _NUMBERS_AT_ONCE // store.logits[0, 0, ..., : plan.candidates].numel())
    selections: list[Selection | None] = []
    for first in range(0, len(layers), at_once):
        asked = list(layers[first : first + at_once])
        evidence = _evidence(store, row, plan, asked, with_norms="key_norms" in selector.needs)
        chosen = checked_selection(selector, evidence, budget)
        places = chosen.positions.shape[-1]
        positions[asked, row.slot, :, :places] = chosen.positions
        counts[asked, row.slot] = chosen.counts
        selections += [
            Selection(found[None], number[None])
            for found, number in zip(chosen.positions, chosen.counts, strict=True)
        ]
    return check_selections(selections, plan, selector)


def _evidence(
    store: EvidenceStore, row: RowRefresh, plan: RefreshPlan, layers: list[int], *, with_norms: bool
) -> Evidence:
    """What some layers of a row show, the layers as a batch."""
    start, end = plan.sink_tokens, plan.recent_start
    histories = [row.sequence.layers[index].history for index in layers]
    norms = [history.key_norms(start, end) for history in histories if with_norms]
    return Evidence(
        logits=store.logits[layers, row.slot, :, :, start:end],
        key_norms=torch.stack(norms) if with_norms else None,
        rest_mass=store.rest_mass[layers, row.slot],
        candidate_start=start,
        prompt_end=plan.prompt_end,
    )


def _selections(
    cohort: Cohort, row: RowRefresh, plan: RefreshPlan, positions: Tensor, counts: Tensor
) -> list[Selection | None]:
    """What one row selected, as instruments see it."""
    budget = min(cohort.geometry.selected_tokens, plan.candidates)
    return [
        Selection(
            positions[index, row.slot, None, :, :budget].clone(),
            counts[index, row.slot, None].clone(),
        )
        if sparse and budget
        else None
        for index, sparse in enumerate(cohort.geometry.sparse)
    ]
