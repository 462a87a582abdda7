"""What is measured: arms, batch, segments, and how much of each goes into one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, explain

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "LOOPS",
    "DecodeOptions",
    "arm_config",
    "position_room",
]

ARMS = (
    "generate",
    "dense",
    "slow",
    "fast",
    "observe",
    "rectify",
    "verify",
    "selection",
    "kernels",
)
"""In the order in which they are shown; see docs/performance.md."""

DEFAULT_ARMS = ARMS[:-1]
"""All that are timed in turns over one history."""

LOOPS = ("dense", "observe", "rectify", "verify")
"""Arms that are decodings of a real decoder."""

LONGEST_FREE_SEGMENT = 32
"""Most drafts of a verified segment whose length adapts."""

_BLOCK_ROOM = 256
"""Positions behind the last token: a block is filled up, and the last segment may overshoot."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """See the module text.

    Attributes:
        batch: Sequences that decode together.
        segment_tokens: Fast tokens between two slow steps of observe and rectify.
        verify_tokens: Drafts per verifying step; None lets the engine adapt their number to how
            many stand, from 1 to 32.
        acceptance: Probability that a drafted token stands, 0 to 1.
        arms: Names out of `ARMS`, in any order.
        cycles: Segments with their slow steps per sample; None takes 3 on CUDA and 1 on a CPU.
        compiled: Whether the model's layers are compiled in captured steps.
        early_launch: See `Engine.warmup`.
        copy_bytes: Size of the buffer whose copy measures bandwidth; None takes 1 GiB on CUDA
            and 256 MiB on a CPU.
        seed: Of history, tokens and coin.
    """

    batch: int = 1
    segment_tokens: int = 32
    verify_tokens: int | None = None
    acceptance: float = 0.95
    arms: tuple[str, ...] = DEFAULT_ARMS
    cycles: int | None = None
    compiled: bool = True
    early_launch: bool = True
    copy_bytes: int | None = None
    seed: int = 1

    def check(self) -> None:
        """Refuse numbers without meaning.

        Raises:
            InputError: Naming the number and what is allowed.
        """
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            got = ", ".join(map(repr, unknown)) or "no arm"
            raise InputError(explain("chose arms to time", got=got, allowed=", ".join(ARMS)))
        counts = {"batch": self.batch, "segment": self.segment_tokens}
        counts |= {
            name: number
            for name, number in (("verified segment", self.verify_tokens), ("cycles", self.cycles))
            if number is not None
        }
        for name, number in counts.items():
            if number < 1:
                raise InputError(
                    explain("benchmarked decoding", got=f"{name} {number}", allowed="1 or more")
                )
        if not 0.0 <= self.acceptance <= 1.0:
            raise InputError(
                explain(
                    "benchmarked decoding",
                    got=f"acceptance {self.acceptance:g}",
                    allowed="a probability from 0 to 1",
                )
            )

    def cycles_on(self, device_type: str) -> int:
        """Segments with their slow steps in one sample."""
        return self.cycles or (3 if device_type == "cuda" else 1)

    def longest_segment(self) -> int:
        """Most fast tokens of a segment in any arm."""
        return max(self.segment_tokens, self.verify_tokens or LONGEST_FREE_SEGMENT)

    def sample_tokens(self, device_type: str) -> int:
        """Tokens that a sample of observe, rectify and verify makes behind its first one."""
        return self.cycles_on(device_type) * (self.segment_tokens + 1)


def position_room(options: DecodeOptions) -> int:
    """Positions that a model and its histories need behind the context, on any device."""
    return options.sample_tokens("cuda") + options.longest_segment() + _BLOCK_ROOM


def arm_config(config: SessionConfig, arm: str, options: DecodeOptions) -> SessionConfig:
    """The policy of an arm: that of the benchmark, without detectors, its segments of one length.

    Args:
        config: Sizes of the memory, selector and sampling.
        arm: "dense", "observe", "rectify" or "verify"; for others what "observe" takes.
        options: Lengths of segments.
    """
    if arm == "dense":
        return config.replace(mode="dense", slow_step="observe", boundaries=[], refresh=_NO_REFRESH)
    least = most = options.segment_tokens
    if arm == "verify":
        most = options.verify_tokens or LONGEST_FREE_SEGMENT
        least = options.verify_tokens or 1
    refresh: dict[str, Any] = {"min_segment_tokens": least, "max_segment_tokens": most}
    kind: Any = arm if arm in ("rectify", "verify") else "observe"
    if kind == "observe":
        refresh["evidence_queries"] = 1
    return config.replace(mode="slow_fast", slow_step=kind, boundaries=[], refresh=refresh)


_NO_REFRESH: Any = {"evidence_queries": 1}
