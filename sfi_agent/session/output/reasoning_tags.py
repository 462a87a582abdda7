"""Between which tags a checkpoint writes its reasoning, told by the chat template's source."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ReasoningTags", "reasoning_tags"]


class ReasoningTags(NamedTuple):
    """What begins a block of reasoning and what ends it."""

    opening: str
    closing: str


_KNOWN = (
    ("[THINK]", ReasoningTags("[THINK]", "[/THINK]")),
    ("<|channel>", ReasoningTags("<|channel>thought", "<channel|>")),
    ("<|START_THINKING|>", ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>")),
    ("<seed:think>", ReasoningTags("<seed:think>", "</seed:think>")),
)
_COMMON = ReasoningTags("<think>", "</think>")


def reasoning_tags(template_source: str) -> ReasoningTags:
    """The tags of a template; `<think>` where it shows none."""
    return next((tags for mark, tags in _KNOWN if mark in template_source), _COMMON)
