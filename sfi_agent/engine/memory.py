"""The memory of a sequence: what its fast steps attend to.

Each sparse layer has one static buffer, laid out

    selected (right-aligned) | sink | recent | segment

so that heads with different numbers of selected tokens differ in where they start, and all heads
of all layers share where they end (attention does not care about the order: keys carry their
positions). A refresh rewrites everything before the segment; a fast step writes its key and value
into the segment and nowhere else, at an index that lives on the device: addresses and shapes are
fixed between refreshes, which is what a captured graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule, tiled_attention
from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.history_buffer import copy_rows
from sfi_agent.engine.sdpa import attend_rows
from sfi_agent.engine.surroundings import own_surroundings

__all__ = ["LayerMemory", "MemoryLayout"]

_ALLOCATION_STEP_TOKENS = 256
"""Buffers smaller than the configured budget grow in these steps, at least doubling."""


@dataclass(frozen=True, slots=True)
class RefreshPlan:
    """Which positions of the history a refresh copies besides the selected ones.

    Attributes:
        sink_tokens: Positions `[0, sink_tokens)`.
        recent_start: Positions `[recent_start, history_tokens)`.
        history_tokens: Length of the history at the refresh.
        prompt_end: See `Evidence`.
    """

    sink_tokens: int
    recent_start: int
    history_tokens: int
    prompt_end: int | None = None

    @property
    def recent_tokens(self) -> int:
        return self.history_tokens - self.recent_start

    @property
    def candidates(self) -> int:
        return max(0, self.recent_start - self.sink_tokens)


class MemoryLayout:
    """What all layers of a sequence share: sizes, and where the segment starts and ends.

    Args:
        sink_tokens: First tokens of the history that are always visible.
        selected_tokens: Budget per KV head.
        recent_tokens: Last tokens at a refresh that are visible until the next one.
        device: Where the buffers live.

    Attributes:
        segment_start: First slot of the segment, the same in every layer.
        segment_tokens: Fast tokens written since the last refresh.
        ready: Whether a refresh has filled the memory of this decoding.
        mean_selected_tokens: Selected tokens, averaged over sparse layers and KV heads.
        prompt_end: Length of the history when the decoding began; None before the first one.
        evidence_scratch: Flat float32 room for the logits of one layer, kept from layer to layer
            and from refresh to refresh.
    """

    def __init__(
        self, sink_tokens: int, selected_tokens: int, recent_tokens: int, device: torch.device
    ) -> None:
        self.sink_tokens = sink_tokens
        self.selected_tokens = selected_tokens
        self.recent_tokens = recent_tokens
        self.selected_capacity = 0
        self.tail_capacity = 0
        self.segment_start = 0
        self.segment_tokens = 0
        self._indexed_end = 0
        self.ready = False
        self.mean_selected_tokens = 0.0
        self.prompt_end: int | None = None
        with own_surroundings(device):
            self._write_index = torch.zeros(1, dtype=torch.int64, device=device)
            self.evidence_scratch = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        return self._write_index.device

    @property
    def capacity(self) -> int:
        return self.selected_capacity + self.tail_capacity

    @property
    def end(self) -> int:
        """The slot behind the last visible one."""
        return self.segment_start + self.segment_tokens

    @property
    def write_index(self) -> Tensor:
        """`[1]` int64 on the device, the slot of the next fast token."""
        if self._indexed_end != self.end:
            # Captured steps know the end on their own; only eager ones ask.
            self._indexed_end = self.end
            self._write_index.fill_(self.end)
        return self._write_index

    @property
    def visible_tokens(self) -> int:
        """Tokens a fast step can attend to, averaged over sparse layers and KV heads."""
        return round(self.mean_selected_tokens) + self.end - self.selected_capacity

    def plan(self, history_tokens: int) -> RefreshPlan:
        """Split a history into sink, candidates and recent (the recent start is not rounded)."""
        sink = min(self.sink_tokens, history_tokens)
        recent_start = max(sink, history_tokens - self.recent_tokens)
        return RefreshPlan(sink, recent_start, history_tokens, self.prompt_end)

    def evidence_logits(self, heads: int, rows: int, tokens: int) -> Tensor:
        """Room for `[heads, rows, tokens]` float32 logits, valid until it is asked for again.

        It grows by an eighth, as the history does, so that decoding seldom allocates it anew.
        """
        wanted = heads * rows * tokens
        if self.evidence_scratch.numel() < wanted:
            # Freed first: the old and the new one are never needed together.
            self.evidence_scratch = self.evidence_scratch.new_empty(0)
            self.evidence_scratch = self.evidence_scratch.new_empty(wanted + wanted // 8)
        return self.evidence_scratch[:wanted].view(heads, rows, tokens)

    def begin_segment(self, plan: RefreshPlan, segment_capacity: int) -> None:
        """Set the slots for a refresh; buffers only ever grow, so addresses settle.

        The memory is not ready until the refresh has filled every layer and says so.
        """
        wanted = min(self.selected_tokens, plan.candidates)
        self.selected_capacity = _grown(self.selected_capacity, wanted, self.selected_tokens)
        head = plan.sink_tokens + plan.recent_tokens
        full = self.sink_tokens + self.recent_tokens + segment_capacity
        self.tail_capacity = _grown(self.tail_capacity, head + segment_capacity, full)
        self.segment_start = self.selected_capacity + head
        self.segment_tokens = 0
        self.ready = False

    def advance(self, tokens: int) -> None:
        """Move the end by `tokens` (negative after a discarded fast step)."""
        self.segment_tokens += tokens


def _grown(current: int, wanted: int, limit: int) -> int:
    if current >= wanted:
        return current
    rounded = -(-wanted // _ALLOCATION_STEP_TOKENS) * _ALLOCATION_STEP_TOKENS
    return max(wanted, min(limit, max(rounded, 2 * current)))


class LayerMemory:
    """The memory buffer of one sparse layer.

    Attributes:
        keys: `[kv_heads, capacity, key_dim]`, zero where nothing was written.
        values: `[kv_heads, capacity, value_dim]`.
        starts: `[kv_heads]` int64, the first visible slot of each head.
        common_start: The same as an int where all heads agree and the host knows it, else None.
    """

    def __init__(self, layout: MemoryLayout) -> None:
        self.layout = layout
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.starts = torch.empty(0, dtype=torch.int64)
        self.common_start: int | None = None

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def refresh(
        self, history: LayerHistory, plan: RefreshPlan, positions: Tensor, counts: Tensor
    ) -> None:
        """Copy selected, sink and recent tokens out of the history.

        Args:
            history: The layer's history, at least `plan.history_tokens` long.
            plan: From `MemoryLayout.plan`, after `MemoryLayout.begin_segment`.
            positions: `[kv_heads, places]` int64, per head ascending, the first `counts` valid.
            counts: `[kv_heads]` int64.
        """
        self.allocate(history)
        selected = self.layout.selected_capacity
        self.starts = selected - counts
        self._copy_selected(history, plan, positions)
        offset = selected
        for start, end in ((0, plan.sink_tokens), (plan.recent_start, plan.history_tokens)):
            for piece in history.pieces(start, end):
                stop = offset + piece.keys.shape[1]
                self.keys[:, offset:stop] = piece.keys
                self.values[:, offset:stop] = piece.values
                offset = stop
        assert offset == self.layout.segment_start

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write one fast token at the layout's write index: `[kv_heads, 1, dim]` each."""
        self.keys.index_copy_(1, self.layout.write_index, keys)
        self.values.index_copy_(1, self.layout.write_index, values)

    def segment(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the first `tokens` fast tokens since the refresh, `[kv_heads, tokens, dim]`."""
        start = self.layout.segment_start
        return self.keys[:, start : start + tokens], self.values[:, start : start + tokens]

    def attend(self, query: Tensor, rule: AttentionRule) -> Tensor:
        """Attention of one fast token, already appended, over the memory.

        Args:
            query: `[query_heads, 1, key_dim]`.
            rule: Of the layer.

        Returns:
            `[query_heads, 1, value_dim]`.
        """
        end = self.layout.end + 1
        if self.common_start is not None:
            visible = slice(self.common_start, end)
            keys, values = self.keys[:, visible], self.values[:, visible]
            return attend_rows(query, keys, values, rule)
        kv_heads = self.keys.shape[0]
        folded = query.reshape(kv_heads, -1, query.shape[-1])
        mask = self.visible()[:, None]
        if not rule.plain:
            out, lse = tiled_attention(folded, self.keys, self.values, rule, visible=mask)
            return rule.share(out.reshape(query.shape[0], 1, -1), lse.reshape(-1, 1))
        mask = mask.expand(-1, folded.shape[1], -1)[None]
        out = F.scaled_dot_product_attention(
            folded[None], self.keys[None], self.values[None], attn_mask=mask, scale=rule.scale
        )
        return out.reshape(query.shape[0], 1, -1)

    def selected_mass(self, query: Tensor, rule: AttentionRule) -> Tensor:
        """Share of the token's attention on the selected part, mean over heads: `[]` float32."""
        folded = query.reshape(self.keys.shape[0], -1, query.shape[-1]).float()
        logits = rule.cap(torch.matmul(folded, self.keys.float().transpose(-1, -2)) * rule.scale)
        logits = logits.masked_fill(~self.visible()[:, None, :], float("-inf"))
        total = rule.total(logits.logsumexp(-1).view(-1, 1)).view(*logits.shape[:2], 1)
        selected = logits[..., : self.layout.selected_capacity]
        return (selected - total).exp().sum(-1).mean()

    def visible(self) -> Tensor:
        """`[kv_heads, capacity]` bool from device-side bounds, the token just written included."""
        slots = torch.arange(self.layout.capacity, device=self.keys.device)
        return (slots >= self.starts[:, None]) & (slots <= self.layout.write_index)

    def allocate(self, history: LayerHistory) -> None:
        """Make the buffers as large as the layout says; what they held is lost if they were not.

        Args:
            history: Of the same layer, not empty.
        """
        capacity = self.layout.capacity
        if self.keys.ndim == 3 and self.keys.shape[1] == capacity:
            return
        like, device = history.extents[0].buffer, self.layout.device
        # Zeroed, because slots outside the visible range take part in masked arithmetic.
        self.keys, self.values = (
            part.new_zeros(part.shape[0], capacity, part.shape[-1], device=device)
            for part in (like.keys, like.values)
        )

    def _copy_selected(self, history: LayerHistory, plan: RefreshPlan, positions: Tensor) -> None:
        selected = self.layout.selected_capacity
        if not plan.candidates or not positions.shape[-1]:
            return
        slots = torch.arange(selected, device=positions.device)
        column = (slots - self.starts[:, None]).clamp(0, positions.shape[-1] - 1)
        aligned = positions.gather(1, column).clamp(min=0)
        pieces = list(history.pieces(plan.sink_tokens, plan.recent_start))
        for index, piece in enumerate(pieces):
            tokens = piece.keys.shape[1]
            local = aligned - piece.start
            place = local.clamp(0, tokens - 1)
            inside = ((local >= 0) & (local < tokens))[..., None]
            for source, target in ((piece.keys, self.keys), (piece.values, self.values)):
                region = target[:, :selected]
                if index == 0:
                    copy_rows(source, place, region)
                else:
                    copied = copy_rows(source, place, torch.empty_like(region))
                    region.copy_(torch.where(inside, copied, region))
