"""A refresh: evidence from the last dense step, a selection per layer, new memory contents."""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.cpu_rows import row_kernels
from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.memory import LayerMemory, RefreshPlan
from sfi_agent.engine.sequence import LayerState, SequenceState
from sfi_agent.errors import PluginError, explain
from sfi_agent.protocols import Evidence, Selection, Selector

__all__ = [
    "EvidenceWriter",
    "check_selections",
    "checked_selection",
    "layer_evidence",
    "note_starts",
    "refresh_memory",
]

_EVIDENCE_CHUNK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Keys are widened to float32 in pieces of this size: on a CPU the widened copy of a head then
never leaves the cache, on a GPU fewer launches count for more."""

_SUM_CHUNK_NUMBERS = 1 << 18
"""Exponentials are summed in pieces of this many numbers on a CPU: they stay in the cache, and what
a step allocates for them does not grow with the history."""


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
    layout.mean_selected_tokens = check_selections(selections, plan, selector)
    note_starts(sequence)
    layout.ready = True
    return selections


def layer_evidence(layer: LayerState, plan: RefreshPlan, *, with_norms: bool) -> Evidence:
    """The attention logits of a layer's captured queries over its candidates (see `Evidence`).

    The logits are recomputed from the history, in float32 whatever the model's dtype. A layer with
    a memory writes them where its sequence keeps room for them: they are valid until the next
    layer's evidence, so that no step allocates anything of the length of the history.
    """
    writer = EvidenceWriter(layer, plan)
    for piece in layer.history.pieces(0, plan.history_tokens):
        writer.see(piece)
    start, end = plan.sink_tokens, plan.recent_start
    return writer.evidence(layer.history.key_norms(start, end) if with_norms else None)


class EvidenceWriter:
    """Writes a layer's evidence while pieces of its history come by, in any order.

    Args:
        layer: With captured queries; its history is not empty.
        plan: Says which tokens are candidates, and how many there are.
    """

    def __init__(self, layer: LayerState, plan: RefreshPlan) -> None:
        captured = layer.captured_query
        assert captured is not None, "the last dense step captured no queries"
        query_heads, self._queries, dim = captured.shape
        kv_heads = layer.history.kv_heads
        self._group = query_heads // kv_heads
        rows = captured.reshape(kv_heads, self._group, self._queries, dim).transpose(1, 2)
        self._rows = rows.reshape(kv_heads, self._queries * self._group, dim)
        self._rule, self._plan = layer.rule, plan
        shape = (*self._rows.shape[:2], plan.history_tokens)
        layout = layer.memory.layout if layer.memory else None
        if layout is None:
            self._logits = self._rows.new_empty(shape, dtype=torch.float32)
        else:
            self._logits = layout.evidence_logits(*shape)

    def see(self, piece: Piece) -> None:
        """Write the logits of some tokens, none of them behind the plan's last one."""
        end = piece.start + piece.keys.shape[1]
        target = self._logits[..., piece.start : end]
        _write_logits(self._rows, piece.keys, self._rule, target)

    def evidence(self, key_norms: Tensor | None) -> Evidence:
        """When every token has been seen.

        Args:
            key_norms: Of the candidates, `[kv_heads, candidates]` float32, if they are needed.
        """
        plan, logits = self._plan, self._logits
        if self._queries > 1:
            _mask_future(logits, self._queries, self._group)
        start, end = plan.sink_tokens, plan.recent_start
        candidates = logits[..., start:end]
        rest = torch.logaddexp(_log_sum(logits[..., :start]), _log_sum(logits[..., end:]))
        sinks = self._rule.grouped_sinks(logits.shape[0])
        if sinks is not None:
            rest = torch.logaddexp(rest, sinks.repeat(1, self._queries))
        total = torch.logaddexp(_log_sum(candidates), rest)
        return Evidence(
            logits=candidates[None],
            key_norms=key_norms[None] if key_norms is not None else None,
            rest_mass=(rest - total).exp().clamp(max=1.0)[None],
            candidate_start=start,
            prompt_end=plan.prompt_end,
        )


def _write_logits(rows: Tensor, keys: Tensor, rule: AttentionRule, target: Tensor) -> None:
    """Scaled logits of `rows` `[kv_heads, rows, dim]`, into `[kv_heads, rows, tokens]` float32."""
    chunk = _EVIDENCE_CHUNK_TOKENS.get(rows.device.type, 1024)
    kernels = row_kernels(rows, keys, keys)
    if kernels is not None:
        kernels.logits(rows, keys, rule.scale, target, rule.softcap)
        return
    if rows.device.type == "cpu":
        # Head by head: what one product reads fits the cache, and threads seldom meet.
        for head in range(rows.shape[0]):
            _widened_products(rows[head], keys[head], rule.scale, chunk, target[head])
    else:
        _widened_products(rows, keys, rule.scale, chunk, target)
    rule.cap(target)


def _widened_products(rows: Tensor, keys: Tensor, scale: float, chunk: int, out: Tensor) -> None:
    """`[..., rows, tokens]` float32 products, the keys widened `chunk` tokens at a time."""
    scaled = rows.float() * scale
    widened = scaled.new_empty(*keys.shape[:-2], min(chunk, keys.shape[-2]), keys.shape[-1])
    for low in range(0, keys.shape[-2], chunk):
        part = keys[..., low : low + chunk, :]
        wide = widened[..., : part.shape[-2], :].copy_(part)
        # Rows come first: with the keys first a CPU takes several times as long for a few rows.
        out[..., low : low + chunk] = torch.matmul(scaled, wide.transpose(-1, -2))


def _mask_future(logits: Tensor, queries: int, group: int) -> None:
    """Each of the last `queries` tokens sees itself and what came before."""
    row = torch.arange(queries, device=logits.device)
    future = (row > row[:, None]).repeat_interleave(group, 0)
    logits[..., logits.shape[-1] - queries :].masked_fill_(future, float("-inf"))


def _log_sum(logits: Tensor) -> Tensor:
    """Log of the summed exponentials of each row, `[kv_heads, rows]`; -inf where there are none."""
    heads, rows, tokens = logits.shape
    size = tokens
    if logits.device.type == "cpu":
        size = max(1, _SUM_CHUNK_NUMBERS // (heads * rows))
    if tokens <= size:
        return logits.logsumexp(-1)
    return torch.stack([part.logsumexp(-1) for part in logits.split(size, -1)]).logsumexp(0)


def _select(layer: LayerState, plan: RefreshPlan, selector: Selector, budget: int) -> Selection:
    evidence = layer_evidence(layer, plan, with_norms="key_norms" in selector.needs)
    return checked_selection(selector, evidence, budget)


def checked_selection(selector: Selector, evidence: Evidence, budget: int) -> Selection:
    """Ask a selector, and refuse what is not shaped like a selection.

    Raises:
        PluginError: Types, shapes, devices or layouts are wrong; `check_selections` looks at the
            values.
    """
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
    wrong_layout = {got_positions.layout, got_counts.layout} != {torch.strided}
    if wrong_type or wrong_shape or wrong_size or wrong_device or wrong_layout:
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
        counts = memory.layout.write_index.new_zeros(history.kv_heads)
        memory.refresh(history, plan, counts[:, None][:, :0], counts)
    else:
        memory.refresh(history, plan, selection.positions[0], selection.counts[0])


def check_selections(
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


def note_starts(sequence: SequenceState) -> None:
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
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout} on {tensor.device}"


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
