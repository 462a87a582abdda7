"""What a session must compute, from its ids alone: one forward pass of a model of its own.

Dense, full budget, rectify and verify are plain dense passes. Fast steps of observe left keys and
values behind that saw less: their rows see what the step saw (`tests.reference`), whatever the
session that goes on from there does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfi_agent import SessionConfig, StepRecord
from sfi_agent.engine.sampling import Sampler
from tests.reference import Refresh, VisibilityRules, _fast_row, masked_run, visibility_masks
from tests.test_guarantees.play import LOGITS_TOLERANCE, choice_lead

__all__ = ["FastRow", "drawn_as_expected", "expected_logits", "new_fast_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class FastRow:
    """What one fast step saw.

    Attributes:
        rules: Of the policy that took it.
        refresh: What its segment saw of the past.
    """

    rules: VisibilityRules
    refresh: Refresh


def new_fast_rows(
    rules: VisibilityRules,
    records: Sequence[StepRecord],
    refreshes: Sequence[Refresh],
    processed_tokens: int,
    is_exact: Callable[[int], bool],
) -> dict[int, FastRow]:
    """The rows of a call that observe processed by fast steps, by position.

    Args:
        rules: Of the policy.
        records: What the call added to the trace.
        refreshes: Of the call, in order.
        processed_tokens: Rows from there on have no keys and values.
        is_exact: Whether the token of a position had to be exact. Asked of drafts whose
            verification left no record, because the call ended while they were told.
    """
    verified = _verified(records, is_exact)
    rows = {}
    for record in records:
        row = record.position - 1
        if record.kind == "fast" and record.position not in verified and row < processed_tokens:
            refresh = [entry for entry in refreshes if entry.tokens <= row][-1]
            rows[row] = FastRow(rules, refresh)
    return rows


def _verified(records: Sequence[StepRecord], is_exact: Callable[[int], bool]) -> set[int]:
    """Positions of fast tokens that a dense pass processed again and let stand."""
    found: set[int] = set()
    fast: list[int] = []
    for record in records:
        if record.kind == "fast":
            fast.append(record.position)
        if record.drafted_tokens:
            found.update(fast[len(fast) - record.accepted_tokens :])
        if record.kind != "fast":
            fast = []
    while fast and is_exact(fast[-1]):
        found.add(fast.pop())
    return found


@torch.no_grad()
def expected_logits(
    twin: Any, ids: Sequence[int], fast_rows: Mapping[int, FastRow], rules: VisibilityRules
) -> Tensor:
    """Logits behind every id, `[tokens, vocabulary]` float32.

    Args:
        twin: No session is open on it.
        ids: The whole sequence.
        fast_rows: By position; all other rows are dense.
        rules: Of any policy on this model: its layers.
    """
    if not fast_rows:
        tokens = torch.tensor([list(ids)])
        # The mask of ones says that no id is padding.
        result = twin(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        dense: Tensor = result.logits[0].float()
        return dense
    masks = visibility_masks(rules, len(ids), [], [])
    for row, fast in fast_rows.items():
        for layer, mask in enumerate(masks):
            if rules.windows[layer] is None and layer not in fast.rules.dense_layers:
                mask[:, row] = _fast_row(fast.rules, len(ids), row, layer, fast.refresh)
    return masked_run(twin, ids, masks).logits


def drawn_as_expected(
    ids: Sequence[int], positions: range, expected: Tensor, config: SessionConfig
) -> None:
    """Every token is the one that the expected logits and the noise of its place give.

    A token behind one that differs within rounding is compared with logits of what was taken.
    """
    sampling = config.sampling
    sampler = Sampler(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    for position in positions:
        logits = expected[position - 1]
        chosen = int(sampler.choose(logits, position))
        if chosen != ids[position]:
            lead = choice_lead(logits, config, position)
            allowed = LOGITS_TOLERANCE * float(logits.abs().max())
            assert lead <= allowed, (
                f"position {position}: {ids[position]} was drawn, {chosen} leads by {lead:.3g}"
            )
