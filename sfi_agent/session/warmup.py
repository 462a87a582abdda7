"""Preparing an engine for a policy by decoding a little under it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.engine.programs.support import LARGEST_BLOCK
from sfi_agent.engine.warmup import WarmUpReport, prepare
from sfi_agent.errors import ContextOverflowError, explain
from sfi_agent.session.arguments import at_least

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["warm_up"]

_CANDIDATE_TOKENS = 64
"""Tokens of the prompt that are neither sink nor recent, so that something is selected."""

_SEGMENT_TOKENS = 4
_BLOCK_STEP = 8


def warm_up(
    engine: Engine,
    config: SessionConfig,
    batch: int,
    context_tokens: int,
    on_progress: Callable[[str], None],
    *,
    compiled: bool,
    early_launch: bool,
) -> WarmUpReport:
    """See `Engine.warmup`."""
    at_least("batch", batch, 1)
    at_least("context_tokens", context_tokens, 0)
    limit = engine.shape.context_limit_tokens
    if context_tokens > limit:
        raise ContextOverflowError(
            explain(
                "warmed up an engine",
                got=f"context_tokens={context_tokens}",
                allowed=f"at most {limit}",
            ),
            needed_tokens=context_tokens,
            limit_tokens=limit,
        )

    def play() -> None:
        for segment in _segments(config):
            _decode(engine, _with_segment(config, segment), batch, segment)

    return prepare(
        engine.runner,
        context_tokens,
        play,
        on_progress,
        compiled=compiled,
        early_launch=early_launch,
    )


def _segments(config: SessionConfig) -> list[int]:
    """Lengths that bring every kind of step; blocks come in sizes of their own."""
    refresh = config.refresh
    if config.mode == "dense" or config.slow_step == "observe":
        return [min(_SEGMENT_TOKENS, refresh.max_segment_tokens)]
    # Longer blocks are eager: nothing is prepared for them.
    longest = min(refresh.max_segment_tokens, LARGEST_BLOCK - 1)
    return sorted({min(size, longest) for size in range(_BLOCK_STEP - 1, longest + 8, _BLOCK_STEP)})


def _with_segment(config: SessionConfig, segment_tokens: int) -> SessionConfig:
    """The policy with segments of one length and no boundaries that depend on the text."""
    return config.replace(
        refresh={"min_segment_tokens": segment_tokens, "max_segment_tokens": segment_tokens}
    )


def _decode(engine: Engine, config: SessionConfig, batch: int, segment_tokens: int) -> None:
    shape, memory, new_tokens = engine.shape, config.memory, 2 * (segment_tokens + 2)
    tokens = memory.sink_tokens + memory.recent_tokens + _CANDIDATE_TOKENS
    tokens = max(1, min(tokens, shape.context_limit_tokens - new_tokens))
    prompt = [index % shape.vocabulary_size for index in range(tokens)]
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for _ in range(batch)]
        engine.decode_batch(sessions, [prompt] * batch, max_new_tokens=new_tokens)
