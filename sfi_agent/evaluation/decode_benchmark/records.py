"""What a decode benchmark found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ArmTiming", "Bandwidth", "DecodeBenchmark", "DraftCounts", "WarmUpTimes"]


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What became of drafts, over all timed samples of verify.

    Attributes:
        judged: Drafts that a verifying step looked at: those that stand, and the first that does
            not.
        accepted: Those that stand.
        verifications: Verifying steps.
        drafted: Drafts, those behind a rejected one included.
    """

    judged: int = 0
    accepted: int = 0
    verifications: int = 0
    drafted: int = 0

    def plus(self, other: DraftCounts) -> DraftCounts:
        """Both together."""
        return DraftCounts(
            self.judged + other.judged,
            self.accepted + other.accepted,
            self.verifications + other.verifications,
            self.drafted + other.drafted,
        )

    @property
    def acceptance(self) -> float | None:
        """Share of the judged drafts that stand; None where none was judged."""
        return self.accepted / self.judged if self.judged else None


@dataclass(frozen=True, slots=True)
class ArmTiming:
    """Seconds of one arm, per token of each sequence; a whole batch takes one such step together.

    Attributes:
        median_seconds: Median over the rounds, by the clock on the wall; lower is better.
        quartile_seconds: First and third quartile.
        rounds: Samples.
        device_seconds: Median between device events around the same steps; None on a CPU and for
            decodings, where a step that is not counted may have been begun.
        tokens: Tokens per sequence in one sample.
        tokens_per_second: Of the whole batch; higher is better.
        times_dense: Median over that of the arm "dense"; lower is better. None without it.
        roof_bytes: What such a step has to read and write at least.
        roof_seconds: How long the copy of the same run would take to move them, or, if that is
            longer, how long a copy from host memory would take for `bus_bytes`.
        share_of_roof: `roof_seconds` over `median_seconds`; higher is better, 1 is the roof.
        drafts: What became of drafts; None where there are none.
        bus_bytes: What such a step has to bring from host memory at least; 0 where histories are
            on the device.
    """

    median_seconds: float
    quartile_seconds: tuple[float, float]
    rounds: int
    device_seconds: float | None = None
    tokens: float = 1.0
    tokens_per_second: float = 0.0
    times_dense: float | None = None
    roof_bytes: int = 0
    roof_seconds: float = 0.0
    share_of_roof: float = 0.0
    drafts: DraftCounts | None = None
    bus_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        if self.drafts is not None:
            document["drafts"]["acceptance"] = self.drafts.acceptance
        return document


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A plain copy, in the same rounds.

    Attributes:
        buffer_bytes: Size of what is copied.
        bytes_per_second: Read and written bytes over the median time; higher is better.
        quartile_bytes_per_second: The same from the third and the first quartile of the times.
    """

    buffer_bytes: int
    bytes_per_second: float
    quartile_bytes_per_second: tuple[float, float]


@dataclass(frozen=True, slots=True)
class WarmUpTimes:
    """What was prepared before anything was timed.

    Attributes:
        seconds: Compiling and capturing, as `Engine.warmup` does it.
        first_pass_seconds: One untimed sample of every arm behind it.
        compiled: Whether the model's layers are compiled in captured steps.
        captured: Whether steps run as CUDA graphs.
        reason: Why not, where something was not prepared; "" otherwise.
    """

    seconds: float = 0.0
    first_pass_seconds: float = 0.0
    compiled: bool = False
    captured: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DecodeBenchmark:
    """Result of `benchmark_decode`; JSON by `as_json()`.

    Attributes:
        context_tokens: Length of each history.
        batch: Sequences that decode together.
        memory_tokens: What a fast step attends to per sequence, its segment half full.
        segment_tokens, acceptance, verify_tokens: As asked for, see `DecodeOptions`.
        arms: Timing by arm.
        left_out: Arms that were asked for and not timed, with the reason.
        dense_over_fast: Ratio of the medians; higher is better. None without one of the two.
        slow_over_dense: Ratio of the medians; 1 is a refresh for free. None without one of them.
        copy: The measure of the roof; None where no arm of steps was timed.
        weight_bytes: Of the model.
        active_weight_bytes: Of what one step of the batch reads: without an embedding table that
            is only looked up, and with the experts that are expected to be chosen.
        history_bytes: Of keys and values of the histories.
        host_bytes: How many of them are in host memory.
        bus: A copy of pinned host memory to the device, in the same rounds, arriving bytes counted;
            None where histories are on the device.
        memory_bytes: Of the memory buffers.
        peak_bytes: Peak resident memory of the process (CPU) or allocated memory (CUDA), without
            the arms `generate` and `kernels`.
        start_bytes: The same before the model was built (interpreter and libraries).
        warmup: See `WarmUpTimes`.
        kernels: Document of the kernel benchmark, if that arm was wanted.
    """

    context_tokens: int
    batch: int
    memory_tokens: int
    segment_tokens: int
    verify_tokens: int | None
    acceptance: float
    device: str
    dtype: str
    threads: int
    arms: dict[str, ArmTiming]
    left_out: dict[str, str]
    dense_over_fast: float | None
    slow_over_dense: float | None
    copy: Bandwidth
    weight_bytes: int
    active_weight_bytes: int
    history_bytes: int
    memory_bytes: int
    peak_bytes: int
    start_bytes: int
    warmup: WarmUpTimes = field(default_factory=WarmUpTimes)
    kernels: dict[str, Any] | None = None
    host_bytes: int = 0
    bus: Bandwidth | None = None

    @property
    def peak_over_needed(self) -> float:
        """Peak memory without the start, over weights, history and memory; 1 is the least. What
        is in host memory does not count on a device."""
        needed = self.weight_bytes + self.history_bytes - self.host_bytes + self.memory_bytes
        return max(0, self.peak_bytes - self.start_bytes) / needed

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "arms": {name: arm.as_json() for name, arm in self.arms.items()},
            "peak_over_needed": self.peak_over_needed,
            "warmup_seconds": self.warmup.seconds,
        }
