"""Spans of real sessions, in every way to call one. Move to tests/test_session/ once wired."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from sfi_agent import Engine, InputError, Reply, Session, Tool, TurnEnd
from sfi_agent.observe import span_names as names
from sfi_agent.session.reply import sum_replies
from tests.test_session.conversations import FULL, call_text, chat_engine, says
from tests.test_session.test_session_spans import Host

END = "<|im_end|>"


@contextmanager
def listening(host: Host) -> Iterator[Engine]:
    """The shared engine, telling this host."""
    engine = chat_engine()
    before = engine.telemetry
    engine.telemetry = host.telemetry
    try:
        yield engine
    finally:
        engine.telemetry = before


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def ask(session: Session, way: str) -> Reply:
    """One tool loop, asked for in one of the four ways."""
    if way == "run":
        return session.run("Where?")
    if way == "arun":
        return asyncio.run(session.arun("Where?"))

    async def collected() -> list[Any]:
        return [event async for event in session.astream("Where?")]

    events = list(session.stream("Where?")) if way == "stream" else asyncio.run(collected())
    return sum_replies(event.reply for event in events if isinstance(event, TurnEnd))


@pytest.mark.parametrize("way", ["run", "arun", "stream", "astream"])
def test_a_loop_is_one_tree_below_the_callers_span(way: str) -> None:
    inside: list[int] = []

    def find_room(name: str) -> str:
        """Finds a room.

        Args:
            name: Whose.
        """
        inside.append(trace.get_current_span().get_span_context().span_id)
        return "Room 12"

    async def wait(name: str) -> str:
        """Waits.

        Args:
            name: For whom.
        """
        inside.append(trace.get_current_span().get_span_context().span_id)
        await asyncio.sleep(100)
        return "never"

    host = Host(content=True)
    calls = f"{call_text('find_room', name='Ada')}\n{call_text('wait', name='Bo')}{END}"
    tools: list[Any] = [find_room, Tool(wait, timeout_seconds=0.05)]
    with listening(host) as engine:
        with engine.session(FULL, system="Be kind.", tools=tools) as session:
            tracer = host.tracers.get_tracer("program")
            with says(engine, calls, f"Room 12.{END}"):
                with tracer.start_as_current_span("request") as request:
                    reply = ask(session, way)
    done = [span for span in host.exporter.get_finished_spans() if span.name != "request"]
    assert sorted(span.name.split()[0] for span in done) == [
        *["chat"] * 2,
        *["execute_tool"] * 2,
        "invoke_agent",
    ]
    agent = done[-1]
    assert agent.parent == request.get_span_context()
    assert all(span.parent == agent.context for span in done[:-1])
    whole = attributes(agent)
    assert whole[names.CONVERSATION_ID] == session.id
    assert whole[names.USAGE_INPUT_TOKENS] == reply.usage.prompt_tokens
    assert whole[names.USAGE_CACHE_READ_INPUT_TOKENS] == reply.usage.cached_tokens
    assert whole[names.USAGE_OUTPUT_TOKENS] == reply.usage.output_tokens
    first, second = [attributes(span) for span in done if span.name.startswith("chat")]
    assert first[names.USAGE_OUTPUT_TOKENS] + second[names.USAGE_OUTPUT_TOKENS] == (
        reply.usage.output_tokens
    )
    assert [turn[names.RESPONSE_FINISH_REASONS] for turn in (first, second)] == [
        ("tool_calls",),
        ("stop",),
    ]
    assert names.SYSTEM_INSTRUCTIONS in first and names.SYSTEM_INSTRUCTIONS not in second
    of_tools = {span.name: span for span in done if span.name.startswith("execute_tool")}
    assert set(inside) == {span.context.span_id for span in of_tools.values() if span.context}
    assert names.ERROR_TYPE not in attributes(of_tools["execute_tool find_room"])
    assert "CancelledError" in attributes(of_tools["execute_tool wait"])[names.ERROR_TYPE]


def test_turns_that_fail_and_readers_that_stop() -> None:
    host = Host()
    with listening(host) as engine, engine.session(FULL) as session:
        with says(engine, f"Hi.{END}"):
            reply = session.send("Hello.")
        with pytest.raises(InputError):
            session.send([])
        with pytest.raises(InputError):
            asyncio.run(session.asend([]))
        with says(engine, f"One two three.{END}"):
            events = session.stream("Count.")
            next(events)
            events.close()  # type: ignore[attr-defined]
    done = host.exporter.get_finished_spans()
    sent, refused, refused_too, stopped, run = map(attributes, done)
    assert sent[names.USAGE_INPUT_TOKENS] == reply.usage.prompt_tokens
    assert refused[names.ERROR_TYPE] == refused_too[names.ERROR_TYPE] == "sfi_agent.InputError"
    assert stopped[names.RESPONSE_FINISH_REASONS] == ("cancelled",)
    assert done[3].status.is_unset and names.ERROR_TYPE not in run
