"""A boundary detector and a selector for sfi-agent."""

from __future__ import annotations

from sfi_example.fading import Fading, FadingConfig
from sfi_example.keyword import Keyword, KeywordConfig

__all__ = ["Fading", "FadingConfig", "Keyword", "KeywordConfig"]
