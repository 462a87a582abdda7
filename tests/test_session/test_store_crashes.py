"""Saves that are killed: whatever byte they die at, the old state or the new one is there.

Processes are killed for real, at every call that changes the disk and at random moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.session.store.directory import MANIFEST_NAME
from sfi_agent.session.store.manifest_file import parse_manifest
from tests.families import tiny_engine
from tests.test_guarantees.test_save_load import history_of, same_bits

RANDOM_KILLS = 6
"""Of saves in a loop, at random moments. More of them find no less: raise it to look for longer."""

CONFIG = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 4}],
    memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 2},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)

CHANGES_OF_THE_DISK = ("mkdir", "open", "writev", "fsync", "fdatasync", "replace", "unlink")


def in_a_child(work: Callable[[], None], *, kill_after_seconds: float | None = None) -> int | None:
    """Run something in a process of its own; the signal that ended it, or None.

    The child is a copy of this process, so that it needs no time to begin.
    """
    with warnings.catch_warnings():
        # Of threads that are not copied; the work uses none of those that are there.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the work failed without being killed"
    return None


def kill_at(number: int, *, before: bool) -> None:
    """Let this process be killed at its n-th change of the disk: before it, or after a part."""
    left = [number]

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **keywords)
            left[0] -= 1
            if left[0]:
                return real(*arguments, **keywords)
            try:
                if name == "writev" and not before:
                    data = b"".join(arguments[1])
                    real(arguments[0], [data[: random.randint(0, len(data))]])
                elif not before:
                    real(*arguments, **keywords)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CHANGES_OF_THE_DISK:
        setattr(os, name, watched(name, getattr(os, name)))


def is_state(session: Session, other: Session) -> bool:
    if session.token_ids != other.token_ids:
        return False
    assert same_bits(history_of(session), history_of(other))
    assert [record.token_id for record in session.trace] == [
        record.token_id for record in other.trace
    ]
    assert torch.equal(session.next_logits(), other.next_logits())
    return True


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def require_clean(engine: Engine, folder: Path) -> None:
    """The next save leaves nothing of what was interrupted."""
    with engine.load_session(folder) as loaded:
        loaded.save(folder)
    saved = parse_manifest((folder / MANIFEST_NAME).read_bytes(), folder)
    assert names_in(folder) == {MANIFEST_NAME, *(shard.name for shard in saved.history.shards)}


def decoded(engine: Engine, *turns: list[int]) -> Session:
    session = engine.session(CONFIG)
    for turn in turns:
        session.decode(turn, max_new_tokens=3)
    return session


FIRST, SECOND = list(range(20)), [1, 2, 3]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["first", "more", "merging", "rewound"])
def test_a_save_that_is_killed_at_any_call(tmp_path: Path, kind: str, before: bool) -> None:
    """`more` adds a file, `merging` takes the old one in, `rewound` uses less of it."""
    engine = tiny_engine("llama")
    with decoded(engine, FIRST) as old, engine.session(CONFIG) as new:
        new.decode(FIRST, max_new_tokens=3)
        if kind != "first":
            new.save(tmp_path / "old")
        if kind == "rewound":
            new.rewind(new.mark(12))
        else:
            new.decode(SECOND, max_new_tokens=40 if kind == "merging" else 2)
        for number in range(1, 100):
            folder = tmp_path / f"{number}" / "session"
            if kind != "first":
                # A copy of the directory is the same state to who saved it.
                shutil.copytree(tmp_path / "old", folder)

            def work(folder: Path = folder, number: int = number) -> None:
                kill_at(number, before=before)
                new.save(folder)

            killed = in_a_child(work)
            if kind == "first" and not (folder / MANIFEST_NAME).exists():
                # As if nothing had been saved, and the next save finds its way.
                new.save(folder)
            with engine.load_session(folder) as found:
                is_old = kind != "first" and is_state(found, old)
                assert is_old or is_state(found, new)
                assert killed or not is_old
            require_clean(engine, folder)
            if killed is None:
                assert number > 8, "hardly anything was watched"
                return
        raise AssertionError("a save that never ends")


def test_saves_that_are_killed_at_random_moments(tmp_path: Path) -> None:
    """Many saves of a growing session, killed in between; what is there is one of its states."""
    engine, rounds = tiny_engine("llama"), 80
    states: list[int] = []
    with decoded(engine, FIRST) as whole:
        for _ in range(rounds):
            states.append(len(whole.token_ids))
            whole.decode([5], max_new_tokens=1)
        bits = history_of(whole)
        for number in range(RANDOM_KILLS):
            folder = tmp_path / str(number)

            def work(folder: Path = folder) -> None:
                session = decoded(engine, FIRST)
                session.save(folder)
                for _ in range(rounds - 1):
                    session.decode([5], max_new_tokens=1)
                    session.save(folder)

            in_a_child(work, kill_after_seconds=random.uniform(0.05, 0.5))
            if not (folder / MANIFEST_NAME).exists():
                continue
            with engine.load_session(folder) as found:
                ids = found.token_ids
                assert len(ids) in states and ids == whole.token_ids[: len(ids)]
                kept = len(ids) - 1
                assert same_bits(history_of(found), [tensor[:, :kept] for tensor in bits])
            require_clean(engine, folder)
