"""`drift`: the fast step's own attention has left the tokens that were selected for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["Drift", "DriftConfig"]


class DriftConfig(Settings):
    """Options of `drift`."""

    minimum_mass: float = Field(
        default=0.05,
        ge=0.0,
        le=1.0,
        description="Share of a fast step's attention mass that must stay on the selected "
        "tokens; below it the selection no longer serves.",
        json_schema_extra={"unit": "fraction"},
    )


class Drift:
    """Reports a boundary when a fast step's attention mass on the selected tokens falls too low.

    `StepEvent.selected_mass` is the mass on the selected tokens, averaged over sparse layers and
    query heads, 0 to 1, higher is better served. The report is made with `when="now"`: the mass
    is known only when the fast step has run, and the step that ran without support is this one.
    Waiting for the next step would keep the token that was drawn from it.

    One report per fall: after a report the detector waits until a fast step is back at
    `minimum_mass`. If the fresh selection draws no more mass than the old one, the model is
    writing from its recent tokens, and running every other token densely would not change that.

    A low mass has two causes that this signal cannot tell apart: what is needed was not
    selected, or nothing of the history is needed. Models differ widely in how much mass their
    sink takes, so read a few masses of your checkpoint before trusting a threshold; the default
    is a starting value that was not calibrated. Our own detector, from the argument of
    Slow-Fast Inference (arXiv 2603.12038) that the support is stable within a sentence and
    moves between sentences.

    A model without sparse layers has no such mass; then nothing is reported.
    """

    needs: frozenset[str] = frozenset({"attention_drift"})

    def __init__(self, config: DriftConfig, tokenizer: Any = None) -> None:
        self._minimum_mass = config.minimum_mass
        self._armed = True

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """The next fall is reported."""
        self._armed = True

    def after_step(self, event: StepEvent) -> Boundary | None:
        """A retry when the mass has fallen below the minimum since it was last above it.

        Without a mass, in a model without sparse layers, there is nothing to drift from.
        """
        mass = event.selected_mass
        if mass is None or mass >= self._minimum_mass:
            self._armed = True
            return None
        if not self._armed:
            return None
        self._armed = False
        return Boundary(f"drift: selected mass below {self._minimum_mass:g}", when="now")

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """No boundary: drift is seen in steps."""
        return None

    def snapshot(self) -> bool:
        """Whether the next fall is reported."""
        return self._armed

    def restore(self, state: bool) -> None:
        """Set whether the next fall is reported."""
        self._armed = state
