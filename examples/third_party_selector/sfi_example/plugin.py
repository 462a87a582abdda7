"""What this distribution offers to sfi-agent. Holds hook implementations only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfi_agent import hookimpl
from sfi_example.fading import Fading, FadingConfig
from sfi_example.keyword import Keyword, KeywordConfig


@hookimpl
def sfi_register_boundary_detectors(register: Callable[..., Any]) -> None:
    """Offer `keyword`."""
    register("keyword", KeywordConfig, Keyword)


@hookimpl
def sfi_register_selectors(register: Callable[..., Any]) -> None:
    """Offer `fading`."""
    register("fading", FadingConfig, Fading)
