"""Log events carry the numbers of the replies, and nobody hears them who did not ask."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from sfi_agent import SessionConfig
from tests.source_tree import ROOT
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    call_text,
    chat_engine,
    encode,
    says,
)

END = "<|im_end|>"


@pytest.fixture(autouse=True)
def structlog_untouched() -> Iterator[None]:
    """What a test configures is gone after it."""
    assert not structlog.is_configured()
    yield
    structlog.reset_defaults()


def add(left: int, right: int) -> int:
    """Adds two numbers.

    Args:
        left: One number.
        right: The other one.
    """
    return left + right


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_turn_finished_has_the_numbers_of_usage(config: SessionConfig) -> None:
    engine = chat_engine("CHATML_THINKING")
    thought = f"<think>\nHm.\n</think>\n{call_text('add', left=1, right=2)}{END}"
    with engine.session(config, tools=[add]) as session:
        with says(engine, thought, f"It is three. Good. Bye.{END}"), capture_logs() as logs:
            reply = session.run("Add.")
        events = [entry for entry in logs if entry["event"] == "turn_finished"]
        assert [entry["turn"] for entry in events] == [1, 2]
        assert [entry["finish_reason"] for entry in events] == ["tool_calls", "stop"]
        for name in (
            "prompt_tokens",
            "cached_tokens",
            "prefilled_tokens",
            "output_tokens",
            "reasoning_tokens",
        ):
            assert sum(entry[name] for entry in events) == getattr(reply.usage, name), name
        kinds = [step.kind for step in reply.steps]
        for kind in ("fast", "slow", "retry"):
            assert sum(entry[f"{kind}_tokens"] for entry in events) == kinds.count(kind)
        for entry in events:
            assert entry["session"] == session.id and entry["log_level"] == "info"
            assert entry["seconds"] > 0 and entry["reuse_lost_reason"] is None
            json.dumps(entry)


def test_turns_of_a_session_are_counted_whatever_calls_they_belong_to() -> None:
    engine = chat_engine()
    with engine.session(DENSE, tools=[add]) as session, capture_logs() as logs:
        script = [
            f"One.{END}",
            call_text("add", left=1, right=2) + END,
            f"Two.{END}",
            f"Three.{END}",
        ]
        with says(engine, *script):
            session.send("Hi.")
            session.run("Add.")
            asyncio.run(session.asend("Bye."))
        with session.fork() as child, says(engine, f"Four.{END}"):
            child.send("Who?")
        turns = [(e["session"], e["turn"]) for e in logs if e["event"] == "turn_finished"]
        assert turns == [*((session.id, number) for number in (1, 2, 3, 4)), (child.id, 1)]


def test_slow_steps_are_events_with_their_reasons() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, f"One. Two! Three? Four five six seven.{END}"), capture_logs() as logs:
            reply = session.send("Count.")
        events = [entry for entry in logs if entry["event"] == "slow_step"]
        slow = [step for step in reply.steps if step.kind != "fast"]
        assert 1 < len(slow) < len(reply.steps)
        for name in ("kind", "reason", "position", "token_id", "memory_tokens", "segment_tokens"):
            assert [entry[name] for entry in events] == [getattr(step, name) for step in slow]
        for entry in events:
            assert (entry["session"], entry["log_level"]) == (session.id, "debug")
            json.dumps(entry)
    with engine.session(DENSE) as session:
        with says(engine, f"One. Two.{END}"), capture_logs() as logs:
            session.send("Count.")
        assert [entry["event"] for entry in logs] == ["turn_finished"]


def test_lost_reuse_is_explained() -> None:
    engine = chat_engine("CHANGES_THE_CLOSE")
    letters = [token for letter in "Hello." for token in encode(engine, letter)]
    with engine.session(FULL) as session:
        with says(engine, [*letters, *encode(engine, END)]):
            session.send("Hi.")
        with says(engine, f"Bye.{END}"), capture_logs() as logs:
            session.send("More.")
    (entry,) = [item for item in logs if item["event"] == "turn_finished"]
    assert entry["reuse_lost_reason"] == "template_rewrote_history"
    assert "close_does_not_depend_on_what_follows" in entry["reuse_lost_detail"]
    assert f"token {entry['cached_tokens']}: " in entry["reuse_lost_detail"]


def test_a_context_that_is_nearly_full_warns() -> None:
    engine = chat_engine(context_tokens=96)
    with engine.session(FULL) as session:
        with says(engine, encode(engine, "word " * 96)), capture_logs() as logs:
            reply = session.send("Talk.")
    (entry,) = [item for item in logs if item["event"] == "context_nearly_full"]
    assert entry["log_level"] == "warning"
    assert entry["room_tokens"] == reply.usage.output_tokens == 96 - reply.usage.prompt_tokens
    assert (entry["max_new_tokens"], entry["limit_tokens"]) == (96, 96)


def test_events_go_to_the_standard_logger_where_structlog_is_not_configured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        for level, expected in (
            (logging.WARNING, set[str]()),
            (logging.INFO, {"turn_finished"}),
            (logging.DEBUG, {"turn_finished", "slow_step"}),
        ):
            caplog.clear()
            with caplog.at_level(level, logger="sfi_agent"), says(engine, f"One. Two.{END}"):
                session.send("Count.")
            assert {record.getMessage().split()[0] for record in caplog.records} == expected
            assert {record.name for record in caplog.records} <= {"sfi_agent"}
        assert "output_tokens=" in caplog.text and f"session={session.id!r}" in caplog.text


def test_nothing_is_printed_or_configured_by_default(
    child_python: Callable[..., str], tmp_path: Path
) -> None:
    program = """
        import contextlib, io, json, logging, sys
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            import structlog
            from tests.test_session.conversations import FULL, chat_engine, says
            engine = chat_engine()
            handlers = len(logging.getLogger().handlers)
            with engine.session(FULL) as session, says(engine, "One. Two. Three.<|im_end|>"):
                session.send("Count.")
            with engine.session(FULL) as session:
                session.decode([1, 2, 3], max_new_tokens=3)
        logger = logging.getLogger("sfi_agent")
        print(json.dumps([
            out.getvalue(), err.getvalue(), structlog.is_configured(), logger.handlers,
            logger.level, len(logging.getLogger().handlers) - handlers,
        ]))
    """
    printed = json.loads(child_python(program, ROOT, cwd=tmp_path))
    assert printed == ["", "", False, [], logging.NOTSET, 0]
