"""Saving, loading and going on: a handful of directories that all sessions save to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent import SessionConfig, StoreConflictError, StoreError, StoreMismatchError
from tests.test_soak.branches import overflow_of
from tests.test_soak.plants import Plant
from tests.test_soak.replay import FastRow
from tests.test_soak.watched import Moment, Watched

__all__ = ["Places"]


@dataclass(frozen=True, eq=False)
class _Saved:
    """What a directory holds.

    Attributes:
        number: Of the save, all directories counted together.
        revision: Of the directory.
        session_id: Who saved.
        config: Its policy.
        moment: What could be seen of it.
        logits: Its next logits; None without ids.
        fast_rows, tools, talks, shortens, backlog, lost, odd_from, raw_from: As in `Watched`.
    """

    number: int
    revision: int
    session_id: str
    config: SessionConfig
    moment: Moment
    logits: Tensor | None
    fast_rows: dict[int, FastRow]
    tools: bool
    talks: bool
    shortens: bool
    backlog: bool
    lost: bool
    odd_from: int | None
    raw_from: int | None


class Places:
    """Directories that sessions are saved to, and what each of them must hold.

    Args:
        folder: Holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: dict[int, _Saved] = {}
        self._count = 0

    def holds(self, place: int) -> bool:
        """Whether anybody has saved there."""
        return place in self._saved

    def save(self, watched: Watched, place: int, *, overwrite: bool) -> None:
        """Save, unless somebody has gone on with the conversation there meanwhile."""
        path, session, there = self._path(place), watched.session, self._saved.get(place)
        if there is not None and self._conflicts(watched, place, there) and not overwrite:
            with pytest.raises(StoreConflictError):
                session.save(path)
            watched.check_untouched()
            return
        report = session.save(path, overwrite=overwrite)
        assert report.revision == (there.revision + 1 if there is not None else 1)
        assert report.bytes_written <= report.bytes_total
        self._count += 1
        self._saved[place] = _Saved(
            self._count,
            report.revision,
            session.id,
            session.config,
            watched.moment(),
            watched.logits,
            dict(watched.fast_rows),
            watched.tools,
            watched.talks,
            watched.shortens,
            watched.backlog,
            watched.lost,
            watched.odd_from,
            watched.raw_from,
        )
        watched.places[place] = self._count
        watched.check_untouched()

    def load(
        self, plant: Plant, place: int, tools: list[Any], config: SessionConfig | None
    ) -> Watched | None:
        """What was saved, as it was saved; None where nothing was.

        Args:
            plant: Whose engine loads it.
            place: Where.
            tools: For a session that has tools.
            config: Another policy than it was saved with, so that its history cannot be used.
        """
        path, saved = self._path(place), self._saved.get(place)
        if saved is None:
            with pytest.raises(StoreError):
                plant.engine.load_session(path)
            return None
        given: dict[str, Any] = {"tools": tools if saved.tools else []}
        given["overflow"] = overflow_of(saved.shortens)
        other = config is not None and config != saved.config
        if other:
            with pytest.raises(StoreMismatchError):
                plant.engine.load_session(path, config=config, **given)
            given |= {"config": config, "on_mismatch": "reprefill"}
        session = plant.engine.load_session(path, **given)
        watched = Watched(
            session,
            plant,
            saved.tools,
            saved.talks,
            saved.shortens,
            fast_rows={} if other else dict(saved.fast_rows),
            calls=dict(saved.moment.calls),
            backlog=saved.backlog or other,
            lost=saved.lost or (other and saved.moment.processed_tokens > 0),
            odd_from=saved.odd_from,
            raw_from=saved.raw_from,
            places={place: saved.number},
        )
        self._check_loaded(watched, saved, other=other)
        return watched

    def _check_loaded(self, watched: Watched, saved: _Saved, *, other: bool) -> None:
        session, moment, now = watched.session, saved.moment, watched.seen
        assert (session.status, session.id) == ("open", saved.session_id)
        assert (now.ids, now.messages, now.trace) == (moment.ids, moment.messages, moment.trace)
        assert now.processed_tokens == (0 if other else moment.processed_tokens)
        assert session.config == (session.config if other else saved.config)
        assert session.stats.history_bytes == 0
        watched.settle()
        if saved.logits is not None and not other:
            assert watched.logits is not None
            assert torch.equal(watched.logits, saved.logits)

    def _conflicts(self, watched: Watched, place: int, there: _Saved) -> bool:
        """Whether what is there came after what the session knows of."""
        if there.number in watched.places.values():
            return False
        return place in watched.places or there.session_id == watched.session.id

    def _path(self, place: int) -> Path:
        return self._folder / f"place_{place}"
