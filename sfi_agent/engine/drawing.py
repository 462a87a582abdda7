"""Drawing tokens from logits on the device, and reading what was drawn in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfi_agent.engine.decoding_state import Choice
from sfi_agent.engine.requests import Drawing
from sfi_agent.engine.sampling import entropy_nats

__all__ = ["draw_each", "draw_rows"]


def draw_each(
    logits: Tensor, drawings: Sequence[Drawing], masses: Sequence[Tensor | None]
) -> list[Choice]:
    """Draw one token from each row, for sequences that may be drawn from differently.

    Args:
        logits: `[batch, vocabulary]` float32.
        drawings: One per row.
        masses: One per row: `[]` float32, attention mass on the selected tokens, or None.
    """
    numbers: list[Tensor] = []
    for row, drawing, mass in zip(logits, drawings, masses, strict=True):
        numbers.append(drawing.chooser.choose(row, drawing.position).double())
        if drawing.with_entropy:
            numbers.append(entropy_nats(row).double())
        if mass is not None:
            numbers.append(mass.double())
    found = iter(torch.stack(numbers).tolist())
    return [
        Choice(
            int(next(found)),
            next(found) if drawing.with_entropy else None,
            next(found) if mass is not None else None,
            row if drawing.with_logits else None,
        )
        for row, drawing, mass in zip(logits, drawings, masses, strict=True)
    ]


def draw_rows(logits: Tensor, drawing: Drawing) -> list[Choice]:
    """What is chosen after each row of a block: row i is for `drawing.position + i`.

    Args:
        logits: `[rows, vocabulary]` float32.
        drawing: Of the whole block.
    """
    chosen = [
        drawing.chooser.choose(row, drawing.position + index) for index, row in enumerate(logits)
    ]
    tokens = torch.stack(chosen).tolist()
    entropies: list[float | None] = [None] * len(tokens)
    if drawing.with_entropy:
        entropies = entropy_nats(logits).tolist()
    return [
        Choice(token, entropy, None, row if drawing.with_logits else None)
        for token, entropy, row in zip(tokens, entropies, logits, strict=True)
    ]
