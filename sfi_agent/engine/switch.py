"""Switching a model's attention to ours and back, counted over all open sessions.

The attention implementation lives on the model's configuration, so it is shared by everybody who
holds the model: the first open session switches it on, the last one that closes restores it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sfi_agent.engine.attention import ATTENTION_NAME, register_attention
from sfi_agent.errors import UnsupportedModelError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AttentionSwitch"]

_switches: WeakKeyDictionary[PreTrainedModel, AttentionSwitch] = WeakKeyDictionary()
# Reentrant, like the lock of each switch: a session that is garbage-collected gives its use back
# wherever the collector happens to run, which may be inside these very blocks.
_switches_lock = threading.RLock()


class AttentionSwitch:
    """Counts who needs our attention on one model. Use `AttentionSwitch.of(model)`.

    Attributes:
        users: Open sessions, and self-checks while they run.
    """

    def __init__(self) -> None:
        self.users = 0
        self._previous = ""
        self._lock = threading.RLock()

    @classmethod
    def of(cls, model: PreTrainedModel) -> AttentionSwitch:
        """The one switch of a model, however many engines were made for it."""
        with _switches_lock:
            switch = _switches.get(model)
            if switch is None:
                switch = _switches[model] = cls()
            return switch

    def acquire(self, model: PreTrainedModel) -> None:
        """Switch our attention on if nobody has yet.

        Raises:
            UnsupportedModelError: The model did not take the implementation.
        """
        with self._lock:
            if self.users == 0:
                register_attention()
                self._previous = model.config._attn_implementation
                model.set_attn_implementation(ATTENTION_NAME)
                self._check(model)
            self.users += 1

    def release(self, model: PreTrainedModel) -> None:
        """Give one use back; the last one restores what was set before."""
        with self._lock:
            assert self.users, "released more often than acquired"
            self.users -= 1
            if self.users == 0:
                model.set_attn_implementation(self._previous)

    @contextmanager
    def switched_on(self, model: PreTrainedModel) -> Iterator[None]:
        """Our attention for the length of a with block, also when it raises."""
        self.acquire(model)
        try:
            yield
        finally:
            self.release(model)

    def _check(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        if config._attn_implementation != ATTENTION_NAME:
            model.set_attn_implementation(self._previous)
            raise UnsupportedModelError(
                explain(
                    f"tried to switch the attention of {type(model).__name__}",
                    got=f"{config._attn_implementation!r} after setting {ATTENTION_NAME!r}",
                    remedy="the model does not use transformers' attention interface",
                )
            )
