"""What one eager step leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sfi_agent.engine.streamed_refresh import PassSelections

__all__ = ["StepOutput"]


class StepOutput:
    """What a step leaves on the device.

    Attributes:
        logits: `[vocabulary]` float32, for the token after the last one processed.
        selected_mass: `[]` float32, mean over sparse layers; None unless it was measured.
        selections: What was selected while the step ran; None where that comes later.
    """

    __slots__ = ("logits", "selected_mass", "selections")

    def __init__(
        self,
        logits: Tensor,
        selected_mass: Tensor | None = None,
        selections: PassSelections | None = None,
    ) -> None:
        self.logits = logits
        self.selected_mass = selected_mass
        self.selections = selections
