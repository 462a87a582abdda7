"""The lock of a runner: one at a time, in the order of asking, also when waiting is interrupted."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace

import pytest

from sfi_agent.engine import turn_lock
from sfi_agent.engine.turn_lock import TurnLock


def test_one_thread_at_a_time_and_the_same_one_again() -> None:
    lock, inside, most = TurnLock(), 0, 0

    def work() -> None:
        nonlocal inside, most
        rng = random.Random()
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                if rng.random() < 0.1:
                    with lock, lock:
                        time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (inside, most) == (0, 1)


def test_it_goes_to_whoever_waits_longest() -> None:
    """Threads that take it again and again get it in turn."""
    lock, order, count = TurnLock(), list[int](), 4
    begin = threading.Barrier(count)

    def work(number: int) -> None:
        begin.wait(timeout=20)
        for _ in range(50):
            with lock:
                order.append(number)
                # Long enough for the others to ask again.
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    rounds = [set(order[start : start + count]) for start in range(count, 40 * count, count)]
    assert sum(len(found) == count for found in rounds) >= 0.9 * len(rounds), order


@pytest.mark.parametrize("moment", ["while it waits", "when it has its turn"])
def test_who_is_interrupted_gives_up_its_turn(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = TurnLock()
    caught: list[type[BaseException]] = []

    class Interrupted:
        """A gate whose second acquire is interrupted, as by Ctrl-C."""

        def __init__(self) -> None:
            self.inner, self.asked = threading.Lock(), 0

        def acquire(self) -> None:
            self.asked += 1
            if self.asked == 2:
                if moment == "when it has its turn":
                    self.inner.acquire()
                raise KeyboardInterrupt
            self.inner.acquire()

        def release(self) -> None:
            self.inner.release()

    def wait() -> None:
        try:
            with lock:
                raise AssertionError
        except KeyboardInterrupt:
            caught.append(KeyboardInterrupt)

    gates = SimpleNamespace(Lock=Interrupted, get_ident=threading.get_ident)
    with lock:
        monkeypatch.setattr(turn_lock, "threading", gates)
        thread = threading.Thread(target=wait)
        thread.start()
        if moment == "while it waits":
            thread.join(timeout=20)
        while moment == "when it has its turn" and not lock._waiting:
            time.sleep(0.001)
        monkeypatch.undo()
    thread.join(timeout=20)
    assert caught == [KeyboardInterrupt]
    # It is free, and works.
    assert not lock._waiting and lock._owner == 0
    with lock:
        pass


def test_what_raises_inside_gives_it_back() -> None:
    lock = TurnLock()
    with pytest.raises(ZeroDivisionError), lock, lock:
        raise ZeroDivisionError
    done = threading.Event()

    def work() -> None:
        with lock:
            done.set()

    threading.Thread(target=work).start()
    assert done.wait(timeout=20)
