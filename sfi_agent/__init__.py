"""Slow-fast sparse decoding for agent loops on Hugging Face checkpoints.

Importing this package imports neither torch nor transformers: names that need them are resolved
on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfi_agent.hookspecs import hookimpl
from sfi_agent.protocols import (
    Boundary,
    BoundaryDetector,
    Evidence,
    Selection,
    Selector,
    StepEvent,
    TokenEvent,
)
from sfi_agent.settings import Settings
