"""Saves and loads of one long session, in turns with plain files of the same sizes."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfi_agent.evaluation.session_benchmark.disk import (
    files_of,
    forget_cached,
    plain_read,
    plain_write,
    settle,
)
from sfi_agent.evaluation.session_benchmark.records import LoadCost, SaveCost
from sfi_agent.evaluation.session_benchmark.turn_clock import TimedTurn, timed_turn

if TYPE_CHECKING:
    from torch import Tensor

    from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session
    from sfi_agent.session.store.report import SaveReport

__all__ = ["DiskRun"]

Check = Literal["full", "sizes"]
"""As `engine.load_session` has them."""
_READERS: tuple[Literal["read", "full", "sizes"], ...] = ("read", "full", "sizes")

_MESSAGE = "And then?"
"""Short: a CPU takes long for every token behind such a history."""


@dataclass(slots=True)
class DiskRun:
    """Takes the samples of the arm "save".

    Attributes:
        folder: An empty folder that everything is written into.
        expected_bytes: About how many bytes a save writes.
        watch: Reads the time.
        on_progress: Told how far it is.
        samples: Seconds by arm.
        turns: The turns between a save and the next one.
        first: Report of a save into an empty folder.
        again: Report of the save behind the turn.
        more_tokens: By how many tokens the session was longer then.
    """

    folder: Path
    expected_bytes: int
    watch: Stopwatch
    on_progress: Callable[[str], None]
    samples: dict[str, list[float]] = field(default_factory=dict)
    turns: list[TimedTurn] = field(default_factory=list)
    first: SaveReport | None = None
    again: SaveReport | None = None
    more_tokens: int = 0
    _logits: Tensor | None = None
    _round: int = 0

    def save(self, session: Session, rounds: int) -> None:
        """Save in every round: into an empty folder, and once more after a turn.

        The last state stays on the disk, and is what `load` loads.
        """
        mark = session.mark()
        for index in range(rounds):
            self.on_progress(f"round {index + 1} of {rounds}")
            self._begin_folder(index)
            session.rewind(mark)
            # The first to write after a while is slower, since memory for files has to be found;
            # so somebody else comes first, and each of the two second in every other round.
            self._write_plain(self.expected_bytes)
            for step in (self._save, self._write)[:: -1 if index % 2 else 1]:
                step(session)
            before = session.stats.history_tokens
            self.turns.append(timed_turn(session, _MESSAGE, self.watch))
            self.more_tokens = session.stats.history_tokens - before
            self._save_again(session)
            seconds, self._logits = self.watch.time(session.next_logits)
            self._note("logits", seconds)

    def load(self, engine: Engine, rounds: int) -> LoadCost:
        """Load what the last save left, both ways, in turns with a plain read of the files."""
        files = files_of(self._saved)
        from_disk, difference = True, 0.0
        for index in range(rounds):
            self.on_progress(f"round {index + 1} of {rounds}")
            # Rented disks read fast until an allowance is used up, so each is first in its turn.
            start = index % len(_READERS)
            for arm in (*_READERS[start:], *_READERS[:start]):
                from_disk = forget_cached(files) and from_disk
                if arm == "read":
                    self._note("read", plain_read(files))
                else:
                    difference = max(difference, self._load(engine, arm))
        seconds = {name: statistics.median(self.samples[name]) for name in ("read", "load_full")}
        return LoadCost(
            bytes_read=sum(file.stat().st_size for file in files),
            from_disk=from_disk,
            share_of_read=seconds["read"] / seconds["load_full"],
            logits_difference=difference,
        )

    def save_cost(self) -> SaveCost:
        """What the saves were like."""
        assert self.first is not None and self.again is not None, "nothing was saved"
        seconds = {name: statistics.median(self.samples[name]) for name in ("write", "save")}
        return SaveCost(
            bytes_written=self.first.bytes_written,
            bytes_total=self.first.bytes_total,
            share_of_write=seconds["write"] / seconds["save"],
            more_tokens=self.more_tokens,
            again_bytes_written=self.again.bytes_written,
            again_bytes_total=self.again.bytes_total,
        )

    @property
    def _saved(self) -> Path:
        return self.folder / f"session-{self._round}"

    def _begin_folder(self, index: int) -> None:
        """The one of the round before makes room."""
        shutil.rmtree(self._saved, ignore_errors=True)
        self._round = index

    def _quiet(self) -> None:
        """Nothing of what came before is still to be done, or in the memory that files pass
        through: everybody begins with the same."""
        forget_cached(files_of(self.folder))
        settle(self.folder)

    def _save(self, session: Session) -> None:
        self._quiet()
        seconds, self.first = self.watch.time(lambda: session.save(self._saved))
        self._note("save", seconds)

    def _save_again(self, session: Session) -> None:
        self._quiet()
        seconds, self.again = self.watch.time(lambda: session.save(self._saved))
        self._note("save_again", seconds)

    def _write(self, _: Session) -> None:
        written = self.first.bytes_written if self.first is not None else self.expected_bytes
        self._note("write", self._write_plain(written))

    def _write_plain(self, size_bytes: int) -> float:
        self._quiet()
        file = self.folder / "plain"
        seconds = plain_write(file, size_bytes)
        file.unlink()
        return seconds

    def _load(self, engine: Engine, check: Check) -> float:
        """Load and ask for logits; how far these are from those before the load."""
        assert self._logits is not None, "nothing was saved"
        seconds, session = self.watch.time(lambda: engine.load_session(self._saved, check=check))
        self._note(f"load_{check}", seconds)
        with session:
            seconds, logits = self.watch.time(session.next_logits)
        self._note(f"logits_{check}", seconds)
        return float((logits - self._logits).abs().max() / self._logits.abs().max())

    def _note(self, arm: str, seconds: float) -> None:
        self.samples.setdefault(arm, []).append(seconds)
