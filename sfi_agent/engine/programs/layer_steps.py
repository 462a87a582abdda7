"""The attention of a program's layers: fast and slow rows in one launch, and their evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.kernels import (
    AttentionOptions,
    AttentionPlan,
    EvidenceBuffers,
    LayerExtents,
    SelectionScratch,
    attend,
    kept_range,
    make_scratch,
    merge_parts,
    rank_layer,
)
from sfi_agent.engine.programs.cohort import Cohort
from sfi_agent.engine.programs.sinks import evidence_with_sinks, sink_part
from sfi_agent.protocols import Ranking

__all__ = ["EvidenceStore", "LayerSteps", "SharedPrefix", "StepRows"]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Tokens at the start of every row's history that lie in the same buffers.

    Attributes:
        fields: `[layers, 1, extents + 1, 5]` int64, the table rows of one of the sequences.
        end: `[1]` int64, how many tokens are shared.
        starts: `[1, kv_heads]` int64, all 0.
    """

    fields: Tensor
    end: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the rows of a step read, on the device; made anew inside every step.

    Attributes:
        fields: `[layers, batch, extents + 1, 5]` int64, see `ExtentTable`.
        starts: `[layers, batch, kv_heads]` int64, first visible position.
        ends: `[layers, batch]` int64, tokens before the step's own.
        history_tokens: `[batch]` int64, length of the histories of slow rows when the step is done;
            0 for others, which have no candidates then.
        prompt_ends: `[batch]` int64, see `Evidence`.
        prefix: What all rows share, where the program reads it once; None elsewhere.
    """

    fields: Tensor
    starts: Tensor
    ends: Tensor
    history_tokens: Tensor
    prompt_ends: Tensor
    prefix: SharedPrefix | None = None


class EvidenceStore:
    """Where slow steps leave what a selector looks at; shared by the programs of a cohort.

    Args:
        cohort: Whose slots they are.
        query_heads: Query heads of a layer.
        capacity: Most tokens of a history.
        ranking: Of the selector, if it has one: evidence then becomes ranking keys layer by layer
            and one layer's logits are kept; else those of all sparse layers are.

    Attributes:
        logits: `[layers or 1, batch, kv_heads, group, capacity]` float32.
        rest_mass: `[layers or 1, batch, kv_heads, group]` float32.
        scratch: Ranking keys of all layers; None without a ranking.
    """

    def __init__(
        self, cohort: Cohort, query_heads: int, capacity: int, ranking: Ranking | None
    ) -> None:
        geometry, batch, device = cohort.geometry, cohort.batch, cohort.device
        layers = len(geometry.sparse)
        group = query_heads // geometry.kv_heads
        kept = 1 if ranking is not None else layers
        self.capacity = capacity
        self.ranking = ranking
        self.scratch: SelectionScratch | None = None
        if ranking is not None:
            self.scratch = make_scratch(ranking, layers, batch, geometry.kv_heads, capacity, device)
        shape = (kept, batch, geometry.kv_heads, group)
        self.logits = torch.zeros(*shape, capacity, device=device)
        self.rest_mass = torch.zeros(shape, device=device)

    @property
    def bytes(self) -> int:
        scratch = self.scratch.bytes if self.scratch is not None else 0
        return self.logits.nbytes + self.rest_mass.nbytes + scratch

    def buffers(self, layer: int, sink_tokens: int, recent_tokens: int) -> EvidenceBuffers:
        """Where the attention of a layer writes."""
        index = layer if len(self.logits) > 1 else 0
        return EvidenceBuffers(
            self.logits[index], self.rest_mass[index], sink_tokens, recent_tokens
        )


class LayerSteps:
    """Attention of the layers of one program (see `ProgramLayers`).

    Args:
        cohort: Whose rows are stepped.
        plans: Of sparse layers, and of layers that read their history at every step.
        query_heads: Query heads of a layer.
        queries: Tokens per row.
        evidence: Where sparse layers leave evidence; None leaves none.
        captured_queries: `[layers, batch, queries or more, query_heads, key_dim]`, where the
            queries of blocks are kept; None keeps none.
        prefix_plan: Of the shared prefix, where there is one, read by all rows at once.
    """

    def __init__(
        self,
        cohort: Cohort,
        plans: tuple[AttentionPlan, AttentionPlan],
        query_heads: int,
        queries: int,
        evidence: EvidenceStore | None = None,
        captured_queries: Tensor | None = None,
        prefix_plan: AttentionPlan | None = None,
    ) -> None:
        geometry = cohort.geometry
        self.cohort = cohort
        self.plans = plans
        self.evidence = evidence
        self.captured_queries = captured_queries
        self.prefix_plan = prefix_plan
        rows = queries * query_heads // geometry.kv_heads
        pairs = cohort.batch * geometry.kv_heads
        needed = max(plan.counters(pairs, rows) for plan in plans)
        if prefix_plan is not None:
            needed = max(needed, prefix_plan.counters(geometry.kv_heads, rows * cohort.batch))
        self._counters = torch.zeros(needed, dtype=torch.int32, device=cohort.device)
        self._kinds: Sequence[int] = ()
        self._rows: StepRows | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._next = 0
        self.order: list[int] = []
        self.rules: list[AttentionRule] = []

    def begin(self, rows: StepRows, kinds: Sequence[int]) -> None:
        """A forward pass begins.

        Args:
            rows: What its rows read.
            kinds: The same kinds on the host, for the plain references.
        """
        self._rows, self._kinds, self._next = rows, kinds, 0
        self.order, self.rules = [], []
        geometry, store = self.cohort.geometry, self.evidence
        self._kept = None
        if store is not None and store.ranking is not None:
            self._kept = kept_range(
                store.ranking,
                rows.prompt_ends,
                rows.history_tokens,
                geometry.selected_tokens,
                geometry.sink_tokens,
                geometry.recent_tokens,
            )

    def note_layer(self, index: int) -> None:
        """See `ProgramLayers`; a model must ask in the order of its layers."""
        self.order.append(index)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `attend_in_program`."""
        assert self._rows is not None
        layer, rows = self._next, self._rows
        self._next += 1
        self.rules.append(rule)
        geometry = self.cohort.geometry
        sparse = geometry.sparse[layer]
        query = query.transpose(1, 2).contiguous()
        if self.captured_queries is not None and sparse:
            kept = self.captured_queries[layer, :, : query.shape[1]]
            # Other slots may hold the queries of a block that was not refreshed from yet.
            steps = (rows.history_tokens > 0)[:, None, None, None]
            kept.copy_(torch.where(steps, query, kept))
        buffers = None
        if self.evidence is not None and sparse:
            buffers = self.evidence.buffers(layer, geometry.sink_tokens, geometry.recent_tokens)
        window = geometry.windows[layer] or 0
        options = AttentionOptions(rule.scale, rule.softcap, window)
        out, lse = attend(
            query,
            keys.transpose(1, 2).contiguous(),
            values.transpose(1, 2).contiguous(),
            self.extents(layer),
            rows.starts[layer],
            rows.ends[layer],
            self._counters,
            self.plans[0 if sparse else 1],
            options,
            buffers,
        )
        if self.evidence is not None and buffers is not None:
            self.rank(layer, buffers, evidence_with_sinks(rule, buffers, lse))
        parts = [(out, lse), *sink_part(rule, out, lse)]
        if rows.prefix is not None and geometry.windows[layer] is None:
            parts.append(self._attend_prefix(layer, query, rule, rows.prefix))
        return out if len(parts) == 1 else merge_parts(parts)

    def _attend_prefix(
        self, layer: int, query: Tensor, rule: AttentionRule, prefix: SharedPrefix
    ) -> tuple[Tensor, Tensor]:
        """The queries of all rows over the prefix they share, which is read once."""
        assert self.prefix_plan is not None
        geometry, (batch, queries, heads, _) = self.cohort.geometry, query.shape
        together = query.flatten(0, 1)[None]
        shape = (1, batch * queries, geometry.kv_heads)
        first = next((slot for slot, kind in enumerate(self._kinds) if kind), 0)
        places = self.cohort.history.layer(layer).places[first]
        out, lse = attend(
            together,
            query.new_zeros(*shape, geometry.key_dim),
            query.new_zeros(*shape, geometry.value_dim),
            LayerExtents(prefix.fields[layer], (places,)),
            prefix.starts,
            prefix.end,
            self._counters,
            self.prefix_plan,
            AttentionOptions(rule.scale, rule.softcap, append=False, own_tokens=False),
        )
        by_row = lse[0].view(heads, batch, queries).transpose(0, 1)
        return out.view(batch, queries, heads, -1), by_row

    def attend_for_evidence(self, layer: int, query: Tensor, rule: AttentionRule) -> None:
        """Evidence of queries whose tokens are in the history already; reads keys only.

        Args:
            layer: A sparse one.
            query: `[batch, 1, query_heads, key_dim]`, post-RoPE.
            rule: Of the layer.
        """
        assert self._rows is not None and self.evidence is not None
        geometry = self.cohort.geometry
        buffers = self.evidence.buffers(layer, geometry.sink_tokens, geometry.recent_tokens)
        nothing = query.new_zeros(query.shape[0], 1, geometry.kv_heads, geometry.key_dim)
        options = AttentionOptions(
            rule.scale, rule.softcap, append=False, own_tokens=False, with_values=False
        )
        _, lse = attend(
            query.contiguous(),
            nothing,
            query.new_zeros(query.shape[0], 1, geometry.kv_heads, geometry.value_dim),
            self.extents(layer),
            self._rows.starts[layer],
            self._rows.ends[layer],
            self._counters,
            self.plans[0],
            options,
            buffers,
        )
        self.rank(layer, buffers, evidence_with_sinks(rule, buffers, lse))

    def rank(self, layer: int, buffers: EvidenceBuffers, lse: Tensor) -> None:
        """Turn a layer's evidence into ranking keys, where the selector is a ranking."""
        store, rows = self.evidence, self._rows
        if store is None or store.scratch is None or store.ranking is None or rows is None:
            return
        sink, recent = buffers.sink_tokens, buffers.recent_tokens
        rank_layer(
            store.ranking,
            buffers.logits,
            lse,
            rows.history_tokens,
            store.scratch.layer(layer),
            sink,
            recent,
            kept=self._kept,
        )

    def extents(self, layer: int) -> LayerExtents:
        """What the rows of this step read in a layer."""
        assert self._rows is not None
        places = self.cohort.extent_places(layer, self._kinds)
        return LayerExtents(self._rows.fields[layer], places)
