"""What a session benchmark takes in memory and on disk, added up before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.decode_benchmark.needs import free_bytes, host_bytes, needed_bytes
from sfi_agent.evaluation.decode_benchmark.options import DecodeOptions
from sfi_agent.evaluation.decode_benchmark.setting import Setting

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.decode_benchmark import ModelSizes

__all__ = ["Workload", "disk_bytes", "refuse_without_memory", "refuse_without_room"]

_RECORD_BYTES = 500
"""Of an id with its record and its place in lists and messages, a few times over."""
_KEPT = (
    "rooms for histories in host memory",
    "evidence",
    "norms of keys",
    "logits of captured steps",
    "working space",
)
"""What is counted as the decode benchmark counts it."""
_MANIFEST_TOKEN_BYTES = 200
"""Of an id and a record on disk, at most."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions that are in memory at the same time, each with a history of its own.

    Attributes:
        sizes: Of the model.
        device: Where it is.
        tokens: Of each session, those to come included.
        config: The policy.
        sessions: How many they are.
    """

    sizes: ModelSizes
    device: torch.device
    tokens: int
    config: SessionConfig
    sessions: int = 1

    @property
    def history(self) -> str:
        """What the histories are called."""
        number = f"{self.sessions} histories" if self.sessions > 1 else "a history"
        return f"{number} of {self.tokens:,} tokens"

    def device_bytes(self) -> dict[str, int]:
        """Bytes of the device by what takes them."""
        counted = needed_bytes(self._setting)
        parts = {"weights": counted["weights"], self.history: self._history_bytes(counted)}
        if self.device.type == "cpu":
            parts["ids and records"] = self.sessions * self.tokens * _RECORD_BYTES
        kept = {name: size for name, size in counted.items() if name in _KEPT}
        memories = {name: size for name, size in counted.items() if "memories" in name}
        return {**parts, **memories, **kept}

    def host_bytes(self) -> dict[str, int]:
        """The same of host memory, where the policy keeps histories there; else nothing."""
        counted = host_bytes(self._setting)
        return {self.history: self._history_bytes(counted)} if counted else {}

    @property
    def _setting(self) -> Setting:
        options = DecodeOptions(self.sessions, arms=("slow",))
        return Setting(self.sizes, self.device, self.tokens, self.config, options)

    def _history_bytes(self, counted: Mapping[str, int]) -> int:
        """Without the room that the other benchmark needs behind its context."""
        size = next(size for name, size in counted.items() if " histories of " in name)
        return size * self.tokens // (self.tokens + self._setting.room_tokens)


def disk_bytes(sizes: ModelSizes, tokens: int) -> dict[str, int]:
    """Bytes on disk by what takes them: a saved session, and beside it the plain file."""
    size = tokens * (sizes.token_bytes + _MANIFEST_TOKEN_BYTES)
    return {f"a saved session of {tokens:,} tokens": size, "a plain file as large": size}


def refuse_without_memory(
    load: Workload, *, what: str, remedy: str, files: Mapping[str, int] | None = None
) -> None:
    """Refuse what does not fit into memory.

    Args:
        load: What would be there.
        what: What was asked for, in words.
        remedy: What to change.
        files: Files that would be in host memory too, by what they hold.

    Raises:
        InputError: With all parts.
    """
    host = torch.device("cpu")
    parts, on_host = load.device_bytes(), {**load.host_bytes(), **(files or {})}
    if load.device.type == "cpu":
        parts, on_host = {**parts, **on_host}, {}
    for taken, where, place in ((parts, "in memory", load.device), (on_host, "on the host", host)):
        refuse_without_room(taken, free_bytes(place), what=what, where=where, remedy=remedy)


def refuse_without_room(
    parts: Mapping[str, int], free: int | None, *, what: str, where: str, remedy: str
) -> None:
    """Refuse what does not fit.

    Args:
        parts: Bytes by what takes them.
        free: How many there are; None is not looked at.
        what: What was asked for, in words.
        where: Where the bytes would be, such as "on the disk".
        remedy: What to change.

    Raises:
        InputError: With all parts.
    """
    needed = sum(parts.values())
    if free is None or needed <= free:
        return
    shown = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    raise InputError(
        explain(
            f"benchmarked {what}",
            got=f"{needed / 1e9:.1f} GB needed {where} ({shown})",
            allowed=f"{free / 1e9:.1f} GB, which are free {where}",
            remedy=remedy,
        )
    )
