"""Preparing an engine for a policy by decoding a little under it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.engine.decoding import LONGEST_EXACT_DRAFT
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
        for policy, segment in _plays(config):
            _decode(engine, _with_segment(policy, segment), batch, segment)

    return prepare(
        engine.runner,
        context_tokens,
        play,
        on_progress,
        compiled=compiled,
        early_launch=early_launch,
    )


def _plays(config: SessionConfig) -> list[tuple[SessionConfig, int]]:
    """Policies and lengths of segments that bring every kind of step; blocks come in sizes of
    their own."""
    most = config.refresh.max_segment_tokens
    if config.mode == "dense":
        return [(config, min(_SEGMENT_TOKENS, most))]
    if config.slow_step != "observe":
        # Longer blocks are eager: nothing is prepared for them.
        return [(config, size) for size in _block_segments(min(most, LARGEST_BLOCK - 1))]
    plays = [(config, min(_SEGMENT_TOKENS, most))]
    if config.tools.decode_calls == "exact":
        # The blocks of tool calls are those of verify.
        verifying = config.replace(slow_step="verify")
        sizes = _block_segments(min(most, LONGEST_EXACT_DRAFT))
        plays += [(verifying, size) for size in sizes]
    return plays


def _block_segments(longest: int) -> list[int]:
    return sorted({min(size, longest) for size in range(_BLOCK_STEP - 1, longest + 8, _BLOCK_STEP)})


def _with_segment(config: SessionConfig, segment_tokens: int) -> SessionConfig:
    """The policy with segments of one length and no boundaries that depend on the text; it is
    played without tools, to which calls could be held."""
    return config.replace(
        refresh={"min_segment_tokens": segment_tokens, "max_segment_tokens": segment_tokens},
        tools={"constrain_calls": False},
    )


def _decode(engine: Engine, config: SessionConfig, batch: int, segment_tokens: int) -> None:
    shape, memory, new_tokens = engine.shape, config.memory, 2 * (segment_tokens + 2)
    tokens = memory.sink_tokens + memory.recent_tokens + _CANDIDATE_TOKENS
    tokens = max(1, min(tokens, shape.context_limit_tokens - new_tokens))
    prompt = [index % shape.vocabulary_size for index in range(tokens)]
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for _ in range(batch)]
        engine.decode_batch(sessions, [prompt] * batch, max_new_tokens=new_tokens)
