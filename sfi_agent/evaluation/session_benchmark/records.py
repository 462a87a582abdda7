"""What a session benchmark found, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sfi_agent.session.reply import Usage

__all__ = [
    "ForkCost",
    "LoadCost",
    "SaveCost",
    "SessionBenchmark",
    "Target",
    "Timing",
    "TurnCost",
]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one arm, by the clock on the wall; lower is better.

    Attributes:
        median_seconds: Median of the samples.
        quartile_seconds: First and third quartile.
        samples_seconds: All of them, in the order in which they were taken.
    """

    median_seconds: float
    quartile_seconds: tuple[float, float]
    samples_seconds: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """From at least two samples."""
        first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (first, third), tuple(samples))


@dataclass(frozen=True, slots=True)
class Target:
    """A number that was set before anything was measured, and whether it was reached.

    Attributes:
        limit: The number.
        unit: "seconds", "share" or "tokens".
        measured: What was measured.
        higher_is_better: Whether `limit` is the least (else the most) that is wanted.
    """

    limit: float
    unit: str
    measured: float
    higher_is_better: bool = False

    @property
    def met(self) -> bool:
        if self.higher_is_better:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True)
class ForkCost:
    """What one fork takes in memory; nothing of the past is copied if this is about nothing.

    Attributes:
        history_bytes: Buffers that the child owns, by its own statistics.
        tensor_bytes: By which all tensors that are alive have grown.
        resident_bytes: By which the process has grown: ids, messages and records of the child;
            None where the system does not say.
        shared_tokens: Tokens of the past that the child reads.
    """

    history_bytes: int
    tensor_bytes: int
    resident_bytes: int | None
    shared_tokens: int


@dataclass(frozen=True, slots=True)
class SaveCost:
    """Saving the session, beside plain files of the same sizes on the same disk.

    Attributes:
        bytes_written: By a save into an empty folder.
        bytes_total: What lies there after it.
        share_of_write: Time of a plain write and fsync of as many bytes over that of the save;
            higher is better, 1 is as fast as the disk.
        more_tokens: Tokens that the session had more at the next save.
        again_bytes_written: By that save.
        again_bytes_total: What lies there after it.
    """

    bytes_written: int
    bytes_total: int
    share_of_write: float
    more_tokens: int
    again_bytes_written: int
    again_bytes_total: int


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Loading the session again.

    Attributes:
        bytes_read: What lies in the folder.
        from_disk: Whether the system was told to forget the files before each load and read, so
            that they came from the disk; else they may have come from memory.
        share_of_read: Time of a plain read of as many bytes over that of the load with check
            "full"; higher is better.
        logits_difference: Largest difference of the next token's logits from those before the
            save, as a share of the largest logit; 0 is bit for bit.
    """

    bytes_read: int
    from_disk: bool
    share_of_read: float
    logits_difference: float


@dataclass(frozen=True, slots=True)
class TurnCost:
    """A turn behind a history.

    Attributes:
        usage: Of the turn, see `Usage`.
        new_tokens: Ids that the turn brought, and the one that was pending.
        first_token: Until the first token.
        whole: Until the end of the turn.
    """

    usage: Usage
    new_tokens: int
    first_token: Timing
    whole: Timing

    @property
    def only_new(self) -> bool:
        """Whether nothing was processed that had been processed before."""
        return self.usage.prefilled_tokens == self.new_tokens

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "only_new": self.only_new}


@dataclass(frozen=True, slots=True)
class SecondTurn:
    """Turn 2 of a chat, with a history that was computed, beside processing everything anew.

    Attributes:
        model: What was asked for.
        threads: On which torch computed.
        context_limit_tokens: What the model takes.
        asked_tokens: Tokens that the first prompt should have had.
        prompt_tokens: Tokens that it has.
        reason: Why it is not what was asked for; "" where it is.
        first_turn_seconds: Of turn 1, which processes the long prompt.
        turn: Turn 2 of the session.
        anew: The same messages given to a session without a past.
    """

    model: str
    threads: int
    context_limit_tokens: int
    asked_tokens: int
    prompt_tokens: int
    reason: str
    first_turn_seconds: float
    turn: TurnCost
    anew: TurnCost

    @property
    def times_faster(self) -> float:
        """To the first token: anew over turn 2, of the medians; higher is better."""
        return self.anew.first_token.median_seconds / self.turn.first_token.median_seconds

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "turn": self.turn.as_json(),
            "anew": self.anew.as_json(),
            "times_faster": self.times_faster,
        }


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Where sessions were saved.

    Attributes:
        directory: The folder in which a temporary one was made.
        file_system: Its kind, such as "ext4"; "" where the system does not say.
        free_bytes: Before anything was written.
    """

    directory: str
    file_system: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class LongSessionFacts:
    """The session that forks, marks, rewinds and saves were measured on.

    Attributes:
        context_tokens: Tokens of its history.
        generated_tokens: How many of its ids were generated, in answers.
        long_answer_tokens: Length of the answer that "rewind_inside" goes into.
        history_bytes: Keys and values of these tokens.
        weight_bytes: Of the model.
        dtype: Of both.
        nested_forks: Forks above the one that "fork_nested" forks.
        rewinds: Ids before and behind which each rewind cuts, by arm.
    """

    context_tokens: int
    generated_tokens: int
    long_answer_tokens: int
    history_bytes: int
    weight_bytes: int
    dtype: str
    nested_forks: int
    rewinds: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class SessionBenchmark:
    """Result of `benchmark_sessions`; JSON by `as_json()`.

    Attributes:
        device: Where the models were.
        threads: On which torch computed, outside of turn 2.
        times: Timing by arm, of everything but turn 2.
        forks: What forks take in memory, by arm.
        long: See `LongSessionFacts`; None where only turn 2 was measured.
        long_turn: A turn behind the long session, between the two saves; None without them.
        save, load: See `SaveCost` and `LoadCost`; None without the arm.
        second_turn: See `SecondTurn`; None without the arm.
        disk: Where was saved; None without the arm.
        targets: By arm, what was to be reached.
    """

    device: str
    threads: int
    times: dict[str, Timing] = field(default_factory=dict)
    forks: dict[str, ForkCost] = field(default_factory=dict)
    long: LongSessionFacts | None = None
    long_turn: TurnCost | None = None
    save: SaveCost | None = None
    load: LoadCost | None = None
    second_turn: SecondTurn | None = None
    disk: DiskFacts | None = None
    targets: dict[str, Target] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        for name in ("long_turn", "second_turn"):
            found: TurnCost | SecondTurn | None = getattr(self, name)
            document[name] = None if found is None else found.as_json()
        document["targets"] = {name: target.as_json() for name, target in self.targets.items()}
        return document
