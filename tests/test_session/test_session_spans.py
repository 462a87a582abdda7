"""Spans and metrics of turns, runs and tools: the numbers of the replies, and nothing unasked."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

from sfi_agent import (
    MissingExtraError,
    Reply,
    SessionConfig,
    SessionStats,
    Step,
    StepRecord,
    Telemetry,
    TextDelta,
    ToolCall,
    ToolResult,
    TurnEnd,
    Usage,
)
from sfi_agent.observe import span_names as names
from sfi_agent.observe.telemetry import default_telemetry
from sfi_agent.session.telemetry.session_spans import EventSpan, SessionSpans

CONFIG = SessionConfig(sampling={"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3})
STATS = SessionStats(9, 5, 3, 1, 4, 0.5, None, 77, 4096, 512)
CALL = ToolCall("call_0", "find_room", {"name": "Ada"}, "{}")


@dataclass
class Host:
    """A program that listens."""

    content: bool = False
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self) -> None:
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.telemetry = Telemetry(
            content=self.content, tracer_provider=self.tracers, meter_provider=self.meters
        )

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def attributes(self, name: str) -> dict[str, Any]:
        return dict(self.spans[name].attributes or {})

    def points(self, metric: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [
            item
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for item in scope.metrics
            if item.name == metric
        ]
        return [point for item in found for point in item.data.data_points]


def core(name: str = "Org/Model-1B", ids: tuple[int, ...] = ()) -> Any:
    """What spans look at in a session's core."""
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=name))
    return SimpleNamespace(
        id="abc", config=CONFIG, ids=ids, engine=SimpleNamespace(model=model), stats=lambda: STATS
    )


def chat() -> Any:
    schema = {"type": "function", "function": {"name": "find_room", "parameters": {}}}
    messages = [{"role": "system", "content": "Be kind."}]
    return SimpleNamespace(messages=messages, tools=SimpleNamespace(schemas=(schema,)))


def record(kind: Any = "slow", passes: int = 1) -> StepRecord:
    return StepRecord(kind, "observe", "", 5, 1, 0.1, 7, 9, dense_passes=passes)


def turn(spans: SessionSpans, reply: Reply, given: Any = "Where?") -> Iterator[Any]:
    """A turn as a session takes it: a generator that is paused between events."""
    with spans.turn(given) as span:
        for item in reply.steps:
            step = Step(item, 9, "x")
            span.see(step)
            yield step
        yield TextDelta(reply.text)
        span.see(TurnEnd(reply))
        yield TurnEnd(reply)


def run(spans: SessionSpans, *replies: Reply) -> Iterator[Any]:
    """A tool loop over these replies; all but the last ask for a tool."""
    with spans.run(8) as whole:
        for reply in replies:
            for event in turn(spans, reply):
                whole.see(event)
                yield event
            for call in reply.tool_calls:
                with spans.tool(call) as span:
                    result = ToolResult(call.id, call.name, "Room 12")
                    span.see(result)
                yield result


usages = st.builds(
    lambda cached, prefilled, output, reasoning, reason: Usage(
        cached + prefilled, cached, prefilled, output + reasoning, reasoning, reason
    ),
    *[st.integers(0, 10**6)] * 4,
    st.sampled_from([None, "template_rewrote_history"]),
)
replies = st.builds(
    Reply,
    text=st.text(max_size=5),
    usage=usages,
    finish_reason=st.sampled_from(["stop", "length", "cancelled"]),
    steps=st.lists(
        st.builds(record, st.sampled_from(["fast", "slow", "retry"]), st.integers(0, 2)), max_size=5
    ).map(tuple),
)


@settings(deadline=None)
@given(replies)
def test_a_turn_has_the_numbers_of_its_reply(reply: Reply) -> None:
    host = Host()
    list(turn(SessionSpans(core(), None, host.telemetry), reply))
    found = host.attributes("chat Org/Model-1B")
    usage, kinds = reply.usage, [item.kind for item in reply.steps]
    expected = {
        names.USAGE_INPUT_TOKENS: usage.prompt_tokens,
        names.USAGE_OUTPUT_TOKENS: usage.output_tokens,
        names.USAGE_CACHE_READ_INPUT_TOKENS: usage.cached_tokens,
        names.USAGE_REASONING_OUTPUT_TOKENS: usage.reasoning_tokens,
        names.SFI_PREFILLED_TOKENS: usage.prefilled_tokens,
        names.RESPONSE_FINISH_REASONS: (reply.finish_reason,),
        names.SFI_FAST_TOKENS: kinds.count("fast"),
        names.SFI_SLOW_TOKENS: kinds.count("slow"),
        names.SFI_RETRY_TOKENS: kinds.count("retry"),
        names.OPERATION_NAME: "chat",
        names.PROVIDER_NAME: "sfi_agent",
        names.REQUEST_MODEL: "Org/Model-1B",
        names.CONVERSATION_ID: "abc",
        names.OUTPUT_TYPE: "text",
        names.REQUEST_MAX_TOKENS: CONFIG.sampling.max_new_tokens,
        names.REQUEST_TEMPERATURE: 0.7,
        names.REQUEST_TOP_P: 0.9,
        names.REQUEST_TOP_K: 5,
        names.REQUEST_SEED: 3,
        names.SFI_MODE: CONFIG.mode,
        names.SFI_SELECTOR: CONFIG.selector.name,
        names.SFI_HISTORY_TOKENS: 77,
        names.SFI_HISTORY_BYTES: 4096,
        names.SFI_MEMORY_BYTES: 512,
    }
    if usage.reuse_lost_reason is not None:
        expected[names.SFI_REUSE_LOST_REASON] = usage.reuse_lost_reason
    if kinds:
        passes = sum(item.dense_passes for item in reply.steps)
        expected[names.SFI_SLOW_SHARE] = passes / len(kinds)
        first = found.pop(names.RESPONSE_TIME_TO_FIRST_CHUNK)
        assert 0 <= first < 60
    assert found == expected
    tokens = {
        point.attributes[names.TOKEN_TYPE]: (point.sum, point.count)
        for point in host.points(names.METRIC_TOKEN_USAGE)
    }
    assert tokens == {"input": (usage.prompt_tokens, 1), "output": (usage.output_tokens, 1)}
    assert len(host.points(names.METRIC_TIME_TO_FIRST_CHUNK)) == bool(kinds)
    (duration,) = host.points(names.METRIC_DURATION)
    assert duration.attributes == {
        names.OPERATION_NAME: "chat",
        names.PROVIDER_NAME: "sfi_agent",
        names.REQUEST_MODEL: "Org/Model-1B",
    }


@settings(deadline=None)
@given(st.lists(replies, min_size=1, max_size=3))
def test_a_run_holds_turns_and_tools_and_their_sum(given_replies: list[Reply]) -> None:
    host = Host()
    *earlier, last = given_replies
    asking = [
        Reply(item.text, (CALL,), usage=item.usage, finish_reason="tool_calls") for item in earlier
    ]
    list(run(SessionSpans(core(), None, host.telemetry), *asking, last))
    done = host.exporter.get_finished_spans()
    kinds = [span.name.split()[0] for span in done]
    assert kinds == [*["chat", "execute_tool"] * len(earlier), "chat", "invoke_agent"]
    whole = host.attributes("invoke_agent")
    total = sum((item.usage for item in given_replies), Usage())
    assert whole[names.USAGE_INPUT_TOKENS] == total.prompt_tokens
    assert whole[names.USAGE_OUTPUT_TOKENS] == total.output_tokens
    assert whole[names.RESPONSE_FINISH_REASONS] == (last.finish_reason,)
    assert (whole[names.SFI_TURNS], whole[names.SFI_MAX_TURNS]) == (len(given_replies), 8)
    parent = done[-1].context
    assert all(span.parent == parent for span in done[:-1]) and done[-1].parent is None
    for span in done:
        if span.name == "execute_tool find_room":
            attributes = dict(span.attributes or {})
            assert attributes[names.TOOL_CALL_ID] == "call_0"
            assert (attributes[names.TOOL_NAME], attributes[names.TOOL_TYPE]) == (
                *("find_room", "function"),
            )


def test_the_parent_is_the_callers_span_whatever_thread_does_the_work() -> None:
    host = Host()
    tracer = host.tracers.get_tracer("program")
    seen: list[Any] = []
    with tracer.start_as_current_span("request") as request:
        spans = SessionSpans(core(), None, host.telemetry)

        def work() -> None:
            for _ in run(spans, Reply("", (CALL,), finish_reason="tool_calls"), Reply("Yes.")):
                # Nobody who reads the events finds himself inside a span of ours.
                seen.append(trace.get_current_span())
            with spans.tool(CALL):
                tracer.start_span("database").end()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert set(seen) == {trace.INVALID_SPAN}
    found = host.spans
    assert found["invoke_agent"].parent == request.get_span_context()
    last_tool = host.exporter.get_finished_spans()[-2]
    assert last_tool.parent == request.get_span_context()
    assert found["database"].parent == last_tool.context
    assert {span.context.trace_id for span in found.values() if span.context} == {
        request.get_span_context().trace_id
    }


def test_a_reader_that_stops_is_no_error_and_its_own_spans_stay_current() -> None:
    host = Host()
    tracer = host.tracers.get_tracer("program")
    events = turn(SessionSpans(core(), None, host.telemetry), Reply("", steps=(record(),) * 3))
    with tracer.start_as_current_span("reader") as reader:
        next(events)
        assert trace.get_current_span() is reader
        events.close()  # type: ignore[attr-defined]
        assert trace.get_current_span() is reader
    span = host.spans["chat Org/Model-1B"]
    assert span.status.is_unset
    assert (span.attributes or {})[names.RESPONSE_FINISH_REASONS] == ("cancelled",)


def test_a_driver_that_closes_a_turn_because_of_an_error_says_so() -> None:
    host = Host()
    spans = SessionSpans(core(), None, host.telemetry)
    events = run(spans, Reply("", steps=(record(),) * 3))
    next(events)
    spans.note_failure(GeneratorExit())
    assert spans.failure is None
    spans.note_failure(MemoryError("a secret"))
    events.close()  # type: ignore[attr-defined]
    for span in host.spans.values():
        attributes = dict(span.attributes or {})
        assert attributes[names.ERROR_TYPE] == "MemoryError"
        assert names.RESPONSE_FINISH_REASONS not in attributes and not span.status.is_unset


def test_errors_are_told_by_their_kind_and_not_by_their_words() -> None:
    host = Host()
    spans = SessionSpans(core(), None, host.telemetry)
    with pytest.raises(MissingExtraError), spans.run(3), spans.turn("My secret."):
        raise MissingExtraError("tell a secret", extra="otel")
    with spans.tool(CALL) as span:
        span.see(ToolResult("call_0", "find_room", "a secret", is_error=True))
    with spans.tool(ToolCall("call_1", "other", {}, "")) as span:
        span.failed(TimeoutError("a secret"))
    kinds = {name: (span.attributes or {})[names.ERROR_TYPE] for name, span in host.spans.items()}
    assert kinds == {
        "invoke_agent": "sfi_agent.MissingExtraError",
        "chat Org/Model-1B": "sfi_agent.MissingExtraError",
        "execute_tool find_room": "tool_error",
        "execute_tool other": "TimeoutError",
    }
    assert not any(span.status.is_ok or span.status.is_unset for span in host.spans.values())
    assert "secret" not in "".join(span.to_json() for span in host.spans.values())
    assert {point.attributes[names.ERROR_TYPE] for point in host.points(names.METRIC_DURATION)} == {
        *kinds.values()
    }


@pytest.mark.parametrize("content", [False, True])
def test_what_was_said_is_there_only_where_it_is_asked_for(content: bool) -> None:
    host = Host(content)
    spans = SessionSpans(core(), chat(), host.telemetry)
    reply = Reply("Here \ud800.", (CALL,), "Hm.", finish_reason="tool_calls")
    list(turn(spans, reply, "Where is Ada?"))
    with spans.tool(CALL) as span:
        span.see(ToolResult("call_0", "find_room", "Room 12"))
    said = host.attributes("chat Org/Model-1B") | host.attributes("execute_tool find_room")
    keys = {
        names.SYSTEM_INSTRUCTIONS,
        names.INPUT_MESSAGES,
        names.OUTPUT_MESSAGES,
        names.TOOL_DEFINITIONS,
        names.TOOL_CALL_ARGUMENTS,
        names.TOOL_CALL_RESULT,
    }
    assert said.keys() & keys == (keys if content else set())
    if not content:
        assert "Ada" not in str(said) and "Room 12" not in str(said)
        return
    assert json.loads(said[names.INPUT_MESSAGES]) == [
        {"role": "user", "parts": [{"type": "text", "content": "Where is Ada?"}]}
    ]
    (answer,) = json.loads(said[names.OUTPUT_MESSAGES])
    assert [part["type"] for part in answer["parts"]] == ["reasoning", "text", "tool_call"]
    assert (answer["parts"][1]["content"], answer["finish_reason"]) == ("Here ?.", "tool_calls")
    assert json.loads(said[names.TOOL_CALL_ARGUMENTS]) == {"name": "Ada"}
    assert json.loads(said[names.TOOL_DEFINITIONS])[0]["name"] == "find_room"
    assert json.loads(said[names.SYSTEM_INSTRUCTIONS])[0]["content"] == "Be kind."
    assert said[names.TOOL_CALL_RESULT] == "Room 12"


def test_messages_of_every_kind_can_be_shown_also_unusable_ones() -> None:
    host = Host(content=True)
    spans = SessionSpans(core(ids=(1, 2)), chat(), host.telemetry)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[Any] = [
        {"role": "tool", "tool_call_id": "c", "content": "12"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ]
    for given_messages in (messages, messages[0], 5, [5], [{"role": {1: 2}, "tool_calls": 7}]):
        with spans.turn(given_messages):  # type: ignore[arg-type]
            pass
    shown = [
        json.loads((span.attributes or {})[names.INPUT_MESSAGES])  # type: ignore[arg-type]
        for span in host.exporter.get_finished_spans()
    ]
    assert [part["type"] for message in shown[0] for part in message["parts"]] == [
        *["tool_call_response", "tool_call", "text"]
    ]
    assert shown[1] == shown[0][:1] and isinstance(shown[2], str)
    # The first turn has been before: what was told first is not told again.
    keys = {key for span in host.exporter.get_finished_spans() for key in span.attributes or {}}
    assert not keys & {names.SYSTEM_INSTRUCTIONS, names.TOOL_DEFINITIONS}


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("Org/Model-1B", "Org/Model-1B"),
        ("/somewhere/secret/model-7", "model-7"),
        ("./models/small", "small"),
        ("", "SimpleNamespace"),
    ],
)
def test_a_folder_is_no_name_of_a_model(given_name: str, shown: str) -> None:
    host = Host()
    list(turn(SessionSpans(core(given_name), None, host.telemetry), Reply("")))
    assert list(host.spans) == [f"chat {shown}"]


def test_nobody_listens() -> None:
    spans = SessionSpans(core(), None, None)
    events = list(run(spans, Reply("", (CALL,), finish_reason="tool_calls"), Reply("Yes.")))
    assert len(events) == 5
    assert {type(item) for item in (spans.run(1), spans.turn(""), spans.tool(CALL))} == {EventSpan}
    # With the API and without a provider nothing is recorded, hence nothing is looked at.
    quiet = SessionSpans(core(), None, default_telemetry())
    quiet._core.stats = None  # type: ignore[assignment]
    assert len(list(run(quiet, Reply("", (CALL,), finish_reason="tool_calls"), Reply("")))) == 5
    assert default_telemetry() is default_telemetry()


def test_without_the_extra_engines_are_silent_and_an_explicit_wish_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    default_telemetry.cache_clear()
    try:
        assert default_telemetry() is None
        with pytest.raises(MissingExtraError, match=r"pip install 'sfi-agent\[otel\]'"):
            Telemetry(content=True)
    finally:
        default_telemetry.cache_clear()


def test_the_names_are_those_of_the_conventions() -> None:
    known = {
        value
        for module in (gen_ai_attributes, gen_ai_metrics)
        for key, value in vars(module).items()
        if key.startswith("GEN_AI_") and isinstance(value, str)
    }
    ours = {
        value
        for key, value in vars(names).items()
        if key.isupper() and str(value).startswith("gen_ai.")
    }
    assert len(ours) > 25 and ours <= known


def test_making_spans_costs_no_global_state(child_python: Callable[..., str]) -> None:
    program = """
        import sys
        from sfi_agent import Telemetry
        assert "opentelemetry" not in sys.modules
        from opentelemetry import metrics, trace
        before = trace.get_tracer_provider(), metrics.get_meter_provider()
        Telemetry(content=True)
        print(before == (trace.get_tracer_provider(), metrics.get_meter_provider()))
        print("torch" in sys.modules)
    """
    assert child_python(program).split() == ["True", "False"]
