"""A refresh: evidence from the last dense step, a selection per layer, new memory contents."""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.memory import LayerMemory, RefreshPlan
from sfi_agent.engine.sequence import LayerState, SequenceState
from sfi_agent.errors import PluginError, explain
from sfi_agent.protocols import Evidence, Selection, Selector

__all__ = ["layer_evidence", "refresh_memory"]

_EVIDENCE_CHUNK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Keys are widened to float32 in pieces of this size: on a CPU the widened copy then never leaves
the cache, on a GPU fewer launches count for more."""


def refresh_memory(
    sequence: SequenceState, selector: Selector, segment_capacity: int
) -> list[Selection | None]:
    """Replace the selection of every sparse layer by what its last dense step attended to.

    Args:
        sequence: Just processed densely with `evidence_rows` of at least 1.
        selector: Asked once per sparse layer, unless nothing is there to choose from.
        segment_capacity: How many fast tokens must fit until the next refresh.

    Returns:
        The selection per layer; None for dense and sliding layers and where no candidates exist.

    Raises:
        PluginError: The selector broke its contract.
    """
    layout = sequence.layout
    assert layout is not None
    plan = layout.plan(sequence.processed_tokens)
    layout.begin_segment(plan, segment_capacity)
    budget = min(layout.selected_tokens, plan.candidates)
    selections: list[Selection | None] = []
    for layer in sequence.layers:
        if layer.memory is None:
            selections.append(None)
            continue
        selection = _select(layer, plan, selector, budget) if budget else None
        selections.append(selection)
        _fill(layer.memory, layer.history, plan, selection)
        layer.captured_query = None
    layout.mean_selected_tokens = _check_values(selections, plan, selector)
    _note_starts(sequence)
    layout.ready = True
    return selections


def layer_evidence(layer: LayerState, plan: RefreshPlan, *, with_norms: bool) -> Evidence:
    """The attention logits of a layer's captured queries over its candidates (see `Evidence`).

    The logits are recomputed from the history, in float32 whatever the model's dtype.
    """
    captured = layer.captured_query
    assert captured is not None, "the last dense step captured no queries"
    query_heads, queries, dim = captured.shape
    kv_heads = next(layer.history.pieces()).keys.shape[0]
    group = query_heads // kv_heads
    rows = captured.reshape(kv_heads, group, queries, dim).transpose(1, 2)
    rows = rows.reshape(kv_heads, queries * group, dim).float()
    logits = _all_logits(rows, layer.history, plan.history_tokens) * layer.scale
    if queries > 1:
        logits = _mask_future(logits, queries, group)
    start, end = plan.sink_tokens, plan.recent_start
    candidates = logits[..., start:end]
    share = (candidates.logsumexp(-1) - logits.logsumexp(-1)).exp()
    return Evidence(
        logits=candidates[None],
        key_norms=layer.history.key_norms(start, end)[None] if with_norms else None,
        rest_mass=(1.0 - share).clamp(min=0.0)[None],
        candidate_start=start,
        prompt_end=plan.prompt_end,
    )


def _all_logits(rows: Tensor, history: LayerHistory, tokens: int) -> Tensor:
    """Unscaled logits `[kv_heads, rows, tokens]` float32 of `rows` `[kv_heads, rows, dim]`."""
    logits = rows.new_empty(*rows.shape[:2], tokens)
    size = _EVIDENCE_CHUNK_TOKENS.get(rows.device.type, 1024)
    widened = rows.new_empty(rows.shape[0], min(size, tokens), rows.shape[-1])
    for piece in history.pieces(0, tokens):
        for low in range(0, piece.keys.shape[1], size):
            keys = piece.keys[:, low : low + size]
            chunk = widened[:, : keys.shape[1]]
            chunk.copy_(keys)
            first = piece.start + low
            # Rows come first: with the keys first a CPU takes several times as long for a few rows,
            # and a product written into the slice takes longer than one copied there.
            logits[..., first : first + keys.shape[1]] = torch.bmm(rows, chunk.transpose(1, 2))
    return logits


def _mask_future(logits: Tensor, queries: int, group: int) -> Tensor:
    """Each of the last `queries` tokens sees itself and what came before."""
    tokens = logits.shape[-1]
    row = torch.arange(queries, device=logits.device).repeat_interleave(group)
    column = torch.arange(tokens, device=logits.device)
    future = column[None] > (tokens - queries + row)[:, None]
    return logits.masked_fill(future, float("-inf"))


def _select(layer: LayerState, plan: RefreshPlan, selector: Selector, budget: int) -> Selection:
    evidence = layer_evidence(layer, plan, with_norms="key_norms" in selector.needs)
    selection = selector.select(evidence, budget)
    heads = evidence.logits.shape[:2]
    found = (getattr(selection, "positions", None), getattr(selection, "counts", None))
    if not all(isinstance(tensor, Tensor) for tensor in found):
        raise _broken(
            selector,
            f"{type(selection).__name__} with {type(found[0]).__name__} and "
            f"{type(found[1]).__name__}",
            "a Selection whose positions and counts are tensors",
        )
    got_positions, got_counts = selection.positions, selection.counts
    wrong_type = {got_positions.dtype, got_counts.dtype} != {torch.int64}
    wrong_shape = got_positions.shape[:2] != heads or got_counts.shape != heads
    wrong_size = got_positions.ndim != 3 or got_positions.shape[-1] > budget
    wrong_device = {got_positions.device, got_counts.device} != {evidence.logits.device}
    if wrong_type or wrong_shape or wrong_size or wrong_device:
        raise _broken(
            selector,
            f"positions {_described(got_positions)}, counts {_described(got_counts)}",
            f"int64 positions {(*heads, budget)} and counts {tuple(heads)} "
            f"on {evidence.logits.device}",
        )
    return selection


def _fill(
    memory: LayerMemory, history: LayerHistory, plan: RefreshPlan, selection: Selection | None
) -> None:
    if selection is None:
        heads = next(history.pieces()).keys.shape[0]
        counts = memory.layout.write_index.new_zeros(heads)
        memory.refresh(history, plan, counts[:, None][:, :0], counts)
    else:
        memory.refresh(history, plan, selection.positions[0], selection.counts[0])


def _check_values(
    selections: list[Selection | None], plan: RefreshPlan, selector: Selector
) -> float:
    """Every selected position is a candidate, in order, once: one host read for all layers.

    Returns:
        The mean number of selected tokens, over layers and KV heads.
    """
    found = [selection for selection in selections if selection is not None]
    if not found:
        return 0.0
    verdicts = []
    for selection in found:
        positions, counts = selection.positions, selection.counts
        places = positions.shape[-1]
        valid = torch.arange(places, device=positions.device) < counts[..., None]
        inside = (positions >= plan.sink_tokens) & (positions < plan.recent_start)
        ascending = positions[..., 1:] > positions[..., :-1]
        verdicts.append(
            (inside | ~valid).all()
            & (ascending | ~valid[..., 1:]).all()
            & (counts >= 0).all()
            & (counts <= places).all()
        )
    means = torch.stack([selection.counts.double().mean() for selection in found])
    valid_all, mean = torch.stack([torch.stack(verdicts).all().double(), means.mean()]).tolist()
    if not valid_all:
        raise _broken(
            selector,
            "positions outside the candidates, out of order, or counts beyond the places",
            f"ascending positions in [{plan.sink_tokens}, {plan.recent_start}), "
            "the first `counts` of each head valid",
        )
    return float(mean)


def _note_starts(sequence: SequenceState) -> None:
    """On a CPU, know on the host where heads start, so that fast steps can slice the buffer.

    On other devices the bounds stay where they are: reading them would stall the device, and a
    captured graph needs shapes that do not depend on them.
    """
    for layer in sequence.layers:
        memory = layer.memory
        if memory is None:
            continue
        memory.common_start = None
        if memory.starts.device.type == "cpu":
            first = int(memory.starts[0])
            if bool((memory.starts == first).all()):
                memory.common_start = first


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _broken(selector: Selector, got: str, allowed: str) -> PluginError:
    name = type(selector).__name__
    return PluginError(
        explain(
            f"selector {name} returned a selection that breaks its contract",
            got=got,
            allowed=allowed,
            remedy="run sfi_agent.testing's contract test on it",
        ),
        plugin=name,
    )
