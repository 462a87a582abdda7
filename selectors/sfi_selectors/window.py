"""Select nothing: sink and recent tokens alone, the baseline every selector must beat."""

from __future__ import annotations

from sfi_agent import Evidence, Selection, Settings
from sfi_selectors._ranking import checked_count

__all__ = ["Window", "WindowConfig"]


class WindowConfig(Settings):
    """`window` has no options."""


class Window:
    """No selected tokens at all: fast steps see sink and recent tokens.

    Source: attention sinks with a window, StreamingLLM (arXiv 2309.17453); here the history stays
    and slow steps still read it.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: WindowConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Return `positions` full of -1 and `counts` of 0.

        Args:
            evidence: Only its shape and device are used.
            budget: Places per KV head, at least 1; all stay empty.

        Raises:
            InputError: The budget is below 1.
        """
        import torch

        batch, heads, _, candidates = evidence.logits.shape
        checked_count(budget, candidates)
        device = evidence.logits.device
        return Selection(
            positions=torch.full((batch, heads, budget), -1, dtype=torch.int64, device=device),
            counts=torch.zeros((batch, heads), dtype=torch.int64, device=device),
        )
