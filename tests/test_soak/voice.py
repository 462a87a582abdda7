"""Lets a tiny random model say what a test wants, on any number of sessions and under any policy.

Keys and values are real; only what the scripted sessions draw from is overwritten. A session that
says nothing scripted draws from what the model thinks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sfi_agent import Session
from sfi_agent.engine.attention import BatchContext

__all__ = ["Voice", "call_tags", "inside_call"]

_SURE = 30.0
_MISTAKE_EVERY = 5
"""Where tokens are verified one of so many drafts is wrong, so that drafts are rejected."""


def call_tags(session: Session) -> tuple[int, int] | None:
    """The ids that open and close a call in the output of a session; None without tools."""
    chat, tokenizer = session._chat, session.engine.tokenizer
    if chat is None or tokenizer is None or not len(chat.tools):
        return None
    opening, closing = map(tokenizer.convert_tokens_to_ids, ("<tool_call>", "</tool_call>"))
    assert isinstance(opening, int) and isinstance(closing, int)
    return opening, closing


def inside_call(output: Sequence[int], tags: tuple[int, int] | None) -> bool:
    """Whether the next token of an output belongs to a call."""
    if tags is None:
        return False
    last = next((token for token in reversed(output) if token in tags), None)
    return last == tags[0]


class _Script:
    """The outputs of one session's next turns.

    An output belongs to its prompt, so whichever pass asks for a token, a draft, a retry or the
    second run of a segment, gets the same one.
    """

    def __init__(self, session: Session, outputs: Sequence[Sequence[int]]) -> None:
        self.session = session
        self._verifies = session.config.slow_step == "verify"
        self._exact_calls = session.config.tools.decode_calls == "exact"
        self._tags = call_tags(session)
        self._outputs = [list(output) for output in outputs]
        self._by_prompt: dict[tuple[int, ...], list[int]] = {}

    def token(self, row: int, *, fast: bool) -> int | None:
        """What is drawn behind the token of a row; None leaves it to the model."""
        core: Any = self.session._core
        start = len(core.ids)
        for record in reversed(core.trace):
            if record.position != start - 1:
                break
            start -= 1
        if row < start - 1:
            return None
        prompt = tuple(core.ids[:start])
        if prompt not in self._by_prompt:
            self._by_prompt[prompt] = self._outputs.pop(0) if self._outputs else []
        output, index = self._by_prompt[prompt], row + 1 - start
        if index >= len(output):
            return None
        # Of a session without tools nothing is a call.
        exact = self._verifies or (self._exact_calls and inside_call(output[:index], self._tags))
        if fast and exact and row % _MISTAKE_EVERY == 0:
            return output[-1]
        return output[index]


class Voice:
    """Overwrites logits of a model while sessions on it have something scripted to say.

    Args:
        model: The engine's.
    """

    def __init__(self, model: Any) -> None:
        self._scripts: list[_Script] = []
        # Tools talk to forks while other sessions decode.
        self._lock = threading.Lock()
        self._handle = model.register_forward_hook(self._overwrite, with_kwargs=True)

    def close(self) -> None:
        """Leave the model alone from now on."""
        self._handle.remove()

    @contextmanager
    def says(self, session: Session, outputs: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within this block the session's next turns are these ids, stop tokens included."""
        script = _Script(session, outputs)
        with self._lock:
            self._scripts.append(script)
        try:
            yield
        finally:
            with self._lock:
                self._scripts.remove(script)

    def _overwrite(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        with self._lock:
            scripts = list(self._scripts)
        if not scripts:
            return None
        context, logits = kwargs["sfi"], result.logits
        steps = context.rows if isinstance(context, BatchContext) else [context]
        for batch, step in enumerate(steps):
            positions = kwargs["position_ids"][batch].tolist()[-logits.shape[1] :]
            for script in scripts:
                if script.session._core.sequence is not step.sequence:
                    continue
                for index, row in enumerate(positions):
                    token = script.token(row, fast=step.kind == "fast")
                    if token is not None:
                        logits[batch, index] = torch.full_like(logits[batch, index], -_SURE)
                        logits[batch, index, token] = _SURE
        return result
