"""How the shipped checkpoint was trained: seed and phases."""

from __future__ import annotations

from dataclasses import replace

from sfi_agent.embedded.train_progress import Phase, Shape

__all__ = ["PHASES", "SEED"]

SEED = 7
_LAST_POSITION = 9_000
_SHORT = Shape(448, 8, (0.25, 0.55), _LAST_POSITION)
_PAGE = Shape(1_536, 2, (0.5, 0.85), _LAST_POSITION)
_PAGES = Shape(4_096, 1, (0.5, 0.85), _LAST_POSITION)
_WHOLE = Shape(9_216, 1, (0.7, 0.9))
_MISSING_SHARE = 0.05
_SHORT_GAPS = replace(_SHORT, missing_share=_MISSING_SHARE)
_PAGE_GAPS = replace(_PAGE, missing_share=_MISSING_SHARE)
_PAGES_GAPS = replace(_PAGES, missing_share=_MISSING_SHARE)

PHASES = (
    Phase("short", (_SHORT,), 560, 3e-3, 3e-3, 0.3),
    Phase("long", (_SHORT, _PAGE, _SHORT, _PAGE, _SHORT, _PAGES), 480, 2.5e-3, 1e-3, 0.3),
    Phase("whole", (_WHOLE, _SHORT, _PAGES, _PAGE, _SHORT, _PAGE), 163, 1e-3, 5.69861e-4, 0.1),
    Phase(
        "doubt",
        (
            _SHORT_GAPS,
            _PAGE_GAPS,
            _SHORT_GAPS,
            _PAGES_GAPS,
            _PAGE_GAPS,
            _SHORT_GAPS,
            _WHOLE,
            _PAGE_GAPS,
            _SHORT_GAPS,
            _PAGES_GAPS,
        ),
        360,
        6e-4,
        3e-5,
        0.2,
    ),
)
"""First the circuits, on short documents whose positions are stretched; then real lengths, where
thousands of facts compete for the attention of one row; last documents in which some of the facts
asked for are missing, so that a step that does not see its fact is unsure instead of wrong."""
