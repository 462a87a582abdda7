"""The numbers per slot that change from step to step, in one small tensor.

The host writes them into pinned memory, one copy brings them to the device, and everything else
about a step (tokens, positions, lengths, whose keys) is computed there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.sampling import Sampler

__all__ = ["CHAINED", "FAST", "IDLE", "SLOW", "Control", "SlotStep"]

IDLE, FAST, SLOW = 0, 1, 2
"""What a slot does in a step: nothing, read its memory, or read its history."""

CHAINED = -1
"""In place of a token: the one that this program drew in the step before."""

(
    _KIND,
    _MEMORY_END,
    _HISTORY_END,
    _PROMPT_END,
    _SHARED_END,
    _TEMPERATURE,
    _TOP_P,
    _TOP_K,
    _SEED,
    _TOKENS,
) = range(10)
_RING = 4
"""Copies may still be under way while the host writes the next ones."""


@dataclass(frozen=True, slots=True)
class SlotStep:
    """One slot's part of a step.

    Attributes:
        kind: FAST or SLOW.
        memory_end: The memory slot behind the last one that is visible.
        history_end: Tokens in the history, and the position of the step's first token.
        tokens: Ids, as many as the program's queries at most, or CHAINED.
        sampler: How tokens are drawn.
        prompt_end: See `Evidence`; 0 where there is none.
        shared_end: Tokens of a prefix that all slots of the step share; 0 where there is none.
    """

    kind: int
    memory_end: int
    history_end: int
    tokens: tuple[int, ...]
    sampler: Sampler = Sampler()
    prompt_end: int = 0
    shared_end: int = 0


class Control:
    """The control tensor of a program.

    Args:
        batch: Number of slots.
        queries: Tokens per slot and step.
        device: Where the steps run.

    Attributes:
        fields: `[batch, 9 + queries]` int64 on the device.
    """

    def __init__(self, batch: int, queries: int, device: torch.device) -> None:
        shape = (batch, _TOKENS + queries)
        self.fields = torch.zeros(shape, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._ring = [
            torch.zeros(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(_RING)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * _RING
        self._turn = 0

    def write(self, steps: dict[int, SlotStep]) -> None:
        """Bring the parts of a step to the device; slots without a part are idle."""
        self._turn = (self._turn + 1) % _RING
        copied, host = self._copied[self._turn], self._ring[self._turn]
        if copied is not None:
            copied.synchronize()
        rows = [[0] * host.shape[1] for _ in range(host.shape[0])]
        for slot, step in steps.items():
            sampler = step.sampler
            rows[slot][: _TOKENS + len(step.tokens)] = [
                step.kind,
                step.memory_end,
                step.history_end,
                step.prompt_end,
                step.shared_end,
                _bits(sampler.temperature),
                _bits(sampler.top_p),
                sampler.top_k,
                sampler.seed,
                *step.tokens,
            ]
        host.copy_(torch.tensor(rows, dtype=torch.int64))
        self.fields.copy_(host, non_blocking=True)
        if self.fields.device.type == "cuda":
            copied = copied or torch.cuda.Event()
            copied.record()
            self._copied[self._turn] = copied

    @property
    def kinds(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _KIND]

    @property
    def memory_ends(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _MEMORY_END]

    @property
    def history_ends(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _HISTORY_END]

    @property
    def prompt_ends(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _PROMPT_END]

    @property
    def shared_ends(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _SHARED_END]

    @property
    def tokens(self) -> Tensor:
        """`[batch, queries]` int64, CHAINED where the drawn token is meant."""
        return self.fields[:, _TOKENS:]

    @property
    def temperatures(self) -> Tensor:
        """`[batch]` float64."""
        return self.fields[:, _TEMPERATURE].contiguous().view(torch.float64)

    @property
    def top_ps(self) -> Tensor:
        """`[batch]` float64."""
        return self.fields[:, _TOP_P].contiguous().view(torch.float64)

    @property
    def top_ks(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _TOP_K]

    @property
    def seeds(self) -> Tensor:
        """`[batch]` int64."""
        return self.fields[:, _SEED]


def _bits(number: float) -> int:
    """A float64 as the int64 with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
