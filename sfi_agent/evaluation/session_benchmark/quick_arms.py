"""Arms that should cost next to nothing: forks, marks and rewinds of one long session."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sfi_agent.evaluation.session_benchmark.records import ForkCost

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
    from sfi_agent.evaluation.session_benchmark.synthetic_chat import LongSession
    from sfi_agent.session.session import Session

__all__ = ["QuickArms"]

_MARKS_PER_SAMPLE = 100
_BEFORE_END_TOKENS = 16
"""A rewind into an answer goes so far back from its end: most of it stays."""
_TAIL_IDS = 2


class QuickArms:
    """Takes samples of forks, marks and rewinds.

    Every rewind is one of a fresh fork, so that all of them start from the same past; making and
    closing the fork is not timed.

    Args:
        long: The session.
        other_config: The policy of the arm "fork_policy".
        nested_forks: See `SessionOptions`.
        watch: Reads the time.
    """

    def __init__(
        self, long: LongSession, other_config: SessionConfig, nested_forks: int, watch: Stopwatch
    ) -> None:
        self._long = long
        self._session = long.session
        self._other_config = other_config
        self._watch = watch
        self._nested_forks = nested_forks
        self._chain: list[Session] = []

    def forks(self) -> dict[str, Callable[[], Session]]:
        """The forks by arm."""
        return {
            "fork": self._session.fork,
            "fork_policy": lambda: self._session.fork(self._other_config),
            "fork_nested": self._deepest().fork,
        }

    def rewinds(self) -> dict[str, int]:
        """To how many ids the rewinds go back, by arm."""
        long = self._long
        return {
            "rewind_near": long.last_turn_start,
            "rewind_far": long.first_turn_end,
            "rewind_inside": long.last_turn_start - _BEFORE_END_TOKENS,
        }

    def samplers(self, arms: tuple[str, ...]) -> dict[str, Callable[[], float]]:
        """What takes one sample in seconds, by arm, of those that are wanted."""
        found: dict[str, Callable[[], float]] = {}
        if "fork" in arms:
            found |= {name: self._fork_sampler(fork) for name, fork in self.forks().items()}
        if "rewind" in arms:
            found |= {name: self._rewind_sampler(ids) for name, ids in self.rewinds().items()}
        if "mark" in arms:
            found["mark"] = self._mark
        return found

    def fork_cost(self, fork: Callable[[], Session]) -> ForkCost:
        """What a fork takes in memory."""
        growth, child = self._watch.growth(fork)
        with child:
            stats = child.stats
            return ForkCost(
                stats.history_bytes,
                growth.tensor_bytes,
                growth.resident_bytes,
                stats.history_tokens,
            )

    def close(self) -> None:
        """Close the chain of forks, the deepest first."""
        while self._chain:
            self._chain.pop().close()

    def _deepest(self) -> Session:
        """The last of a chain of forks, each of which has gone on from its parent for itself."""
        while len(self._chain) < self._nested_forks:
            parent = self._chain[-1] if self._chain else self._session
            child = parent.fork()
            self._chain.append(child)
            child.decode(child.token_ids[-_TAIL_IDS:], max_new_tokens=0)
        return self._chain[-1]

    def _fork_sampler(self, fork: Callable[[], Session]) -> Callable[[], float]:
        def sample() -> float:
            seconds, child = self._watch.time(fork)
            child.close()
            return seconds

        return sample

    def _rewind_sampler(self, ids: int) -> Callable[[], float]:
        def sample() -> float:
            with self._session.fork() as child:
                mark = child.mark(ids)
                seconds, _ = self._watch.time(lambda: child.rewind(mark))
                assert len(child.token_ids) == ids, "a rewind went elsewhere"
                return seconds

        return sample

    def _mark(self) -> float:
        def marks() -> None:
            for _ in range(_MARKS_PER_SAMPLE):
                self._session.mark()

        return self._watch.time(marks)[0] / _MARKS_PER_SAMPLE
