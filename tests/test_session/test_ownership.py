"""Owners, those who look while an owner rests, and owners that leave."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest

from sfi_agent import SessionBusy
from sfi_agent.session.ownership import Ownership
from tests.test_session.async_cases import in_another_thread, until


def test_one_owner_at_a_time() -> None:
    owner = Ownership()
    with owner.held_for("send"):
        for action in (lambda: owner.take("run"), lambda: asyncio.run(owner.take_async("arun"))):
            error = in_another_thread(action)
            assert isinstance(error, SessionBusy)
            assert "session.send() still under way" in str(error)
        with pytest.raises(SessionBusy):
            with owner.looking("fork"):
                pass
    with pytest.raises(ZeroDivisionError), owner.held_for("run"):
        raise ZeroDivisionError
    lease = owner.take("again")
    lease.release()
    lease.release()
    second = owner.take("third")
    # A lease that is over cannot take away another's.
    lease.release()
    assert isinstance(in_another_thread(lambda: owner.take("x")), SessionBusy)
    second.release()


def test_looking_at_a_session_that_nobody_owns_is_owning_it() -> None:
    owner = Ownership()
    with owner.looking("fork"):
        assert isinstance(in_another_thread(lambda: owner.take("send")), SessionBusy)
        error = in_another_thread(lambda: owner.looking("mark").__enter__())
        assert isinstance(error, SessionBusy)
    owner.take("send").release()


def test_an_owner_goes_on_when_nobody_looks_any_more() -> None:
    owner = Ownership()
    lease = owner.take("run")
    lease.rest()
    order: list[str] = []

    def resume() -> None:
        lease.resume()
        order.append("resumed")

    with owner.looking("fork"):
        thread = threading.Thread(target=resume)
        thread.start()
        time.sleep(0.05)
        order.append("looked")
    thread.join(timeout=20)
    assert order == ["looked", "resumed"]
    assert isinstance(in_another_thread(lambda: owner.looking("x").__enter__()), SessionBusy)
    lease.rest()
    looking = owner.looking("save")
    looking.__enter__()
    lease.release()
    # The next owner waits for the one who looks.
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(owner.take("send")))
    thread.start()
    time.sleep(0.05)
    assert not taken
    looking.__exit__(None, None, None)
    until(lambda: taken)
    thread.join(timeout=20)


def test_an_owner_that_leaves_is_waited_for() -> None:
    owner = Ownership()
    first = owner.take("astream")
    first.leave()
    taken: list[str] = []

    async def take() -> None:
        lease = await owner.take_async("asend")
        taken.append("asend")
        lease.release()

    def take_here() -> None:
        with owner.held_for("send"):
            taken.append("send")

    threads = [
        threading.Thread(target=lambda: asyncio.run(take())),
        threading.Thread(target=take_here),
    ]
    threads[0].start()
    time.sleep(0.05)
    assert not taken
    first.release()
    threads[0].join(timeout=20)
    assert taken == ["asend"]
    second = owner.take("astream")
    second.leave()
    threads[1].start()
    time.sleep(0.05)
    second.release()
    threads[1].join(timeout=20)
    assert taken == ["asend", "send"]


def test_a_tool_is_known_by_its_context() -> None:
    owner, other = Ownership(), Ownership()

    def inside_a_tool() -> None:
        owner.enter_tool()
        owner.refuse_in_tool("close")  # Nothing is under way that would wait for it.
        lease = owner.take("run")
        with pytest.raises(SessionBusy, match=r"session.run\(\) still under way"):
            owner.refuse_in_tool("close")
        other.take("run")
        other.refuse_in_tool("close")
        lease.release()

    contextvars.copy_context().run(inside_a_tool)
    owner.take("run")
    owner.refuse_in_tool("close")
