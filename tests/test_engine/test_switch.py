"""Counting who needs our attention on a model."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from sfi_agent import UnsupportedModelError
from sfi_agent.engine.attention import ATTENTION_NAME
from sfi_agent.engine.switch import AttentionSwitch
from tests.families import FAMILIES, build_model


def test_the_first_switches_on_and_the_last_restores() -> None:
    model = build_model(FAMILIES[0])
    model.set_attn_implementation("eager")
    switch = AttentionSwitch.of(model)
    for users in (1, 2, 3):
        switch.acquire(model)
        assert (switch.users, model.config._attn_implementation) == (users, ATTENTION_NAME)
    for users in (2, 1):
        switch.release(model)
        assert (switch.users, model.config._attn_implementation) == (users, ATTENTION_NAME)
    switch.release(model)
    assert (switch.users, model.config._attn_implementation) == (0, "eager")
    with pytest.raises(AssertionError):
        switch.release(model)


def test_one_switch_per_model_and_none_keeps_a_model_alive() -> None:
    first, second = build_model(FAMILIES[0]), build_model(FAMILIES[0])
    assert AttentionSwitch.of(first) is AttentionSwitch.of(first)
    assert AttentionSwitch.of(first) is not AttentionSwitch.of(second)
    watched = weakref.ref(first)
    del first
    gc.collect()
    assert watched() is None


def test_a_with_block_releases_on_errors() -> None:
    model = build_model(FAMILIES[0])
    switch = AttentionSwitch.of(model)
    with pytest.raises(ZeroDivisionError), switch.switched_on(model):
        raise ZeroDivisionError
    assert (switch.users, model.config._attn_implementation) == (0, "sdpa")


def test_a_model_that_ignores_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(FAMILIES[0])
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    switch = AttentionSwitch.of(model)
    with pytest.raises(UnsupportedModelError, match=f"'sdpa' after setting '{ATTENTION_NAME}'"):
        switch.acquire(model)
    assert switch.users == 0


def test_many_threads_leave_it_as_it_was() -> None:
    model = build_model(FAMILIES[0])
    switch = AttentionSwitch.of(model)

    def use() -> None:
        for _ in range(30):
            with switch.switched_on(model):
                assert model.config._attn_implementation == ATTENTION_NAME

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (switch.users, model.config._attn_implementation) == (0, "sdpa")
