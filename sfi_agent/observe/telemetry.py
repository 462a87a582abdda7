"""Spans and metrics through the OpenTelemetry API, where a program has it and listens.

Nothing is configured here and nothing is exported: the program's own providers do that. Without the
`otel` extra, or without providers, spans are objects that do nothing.

A span that lasts while a generator is paused must not be the current one of whoever reads the
generator. So parents are passed explicitly: `Telemetry.caller()` is asked in the caller's thread,
and the work may then happen in any other. Only `current=True` makes a span the current one, for
work that yields nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sfi_agent.errors import MissingExtraError
from sfi_agent.observe import span_names as names

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.context import Context
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from typing_extensions import Self

__all__ = ["Attributes", "OperationSpan", "Telemetry", "default_telemetry", "error_type"]

Attributes: TypeAlias = Mapping[str, str | bool | int | float | Sequence[str] | None]
"""Attributes of a span; those that are None are left out."""

_TOKEN_BOUNDARIES = [4.0**power for power in range(14)]
_SECOND_BOUNDARIES = [0.01 * 2.0**power for power in range(14)]
_SCOPE = "sfi_agent"


class Telemetry:
    """How the sessions of an engine tell OpenTelemetry what they do.

    Args:
        content: Whether spans hold what was said: prompts, answers, arguments and results of
            tools. Off, they hold names, numbers and reasons.
        tracer_provider: What makes spans; None takes the one the program has set globally, if any.
        meter_provider: What takes metrics; None takes the one the program has set globally.

    Attributes:
        content: As given.
        recorders: The tracer and the instruments.

    Raises:
        MissingExtraError: The extra `otel` is not installed.
    """

    def __init__(
        self,
        *,
        content: bool = False,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        try:
            import opentelemetry.trace  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("Use Telemetry", extra="otel") from error
        self.content = content
        self.recorders = _Recorders(tracer_provider, meter_provider)

    def caller(self) -> Context:
        """The caller's place among spans: the parent of what is done for it."""
        from opentelemetry import context

        return context.get_current()

    def span(
        self,
        operation: str,
        subject: str,
        parent: Context,
        attributes: Attributes,
        *,
        current: bool = False,
    ) -> OperationSpan:
        """A span that begins when it is entered.

        Args:
            operation: One of `CHAT`, `EXECUTE_TOOL` and `INVOKE_AGENT` of `span_names`.
            subject: What the operation is on: a model, a tool; "" for nothing.
            parent: From `caller()`, or the `context` of another span.
            attributes: What is known before.
            current: Whether it is the thread's current span while it lasts.
        """
        return OperationSpan(self, operation, subject, parent, attributes, current)


class OperationSpan:
    """One operation: a span, and the metrics of its end.

    An exception that leaves it is its error, by kind and without its message, which may quote what
    was said. A generator that nobody reads on is no error.

    Attributes:
        context: Parent for spans inside this one.
        recording: Whether anybody will see the attributes.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        operation: str,
        subject: str,
        parent: Context,
        attributes: Attributes,
        current: bool,
    ) -> None:
        self._recorders = telemetry.recorders
        self._name = f"{operation} {subject}" if subject else operation
        self._attributes = _given({names.OPERATION_NAME: operation, **attributes})
        self._parent, self._makes_current = parent, current
        self._span: Span | None = None
        self._token: Any = None
        self._started = 0.0
        self._error_type: str | None = None
        self._tokens: tuple[int, int] | None = None
        self._first_chunk_seconds: float | None = None
        self.context = parent
        self.recording = False

    def __enter__(self) -> Self:
        from opentelemetry import context, trace

        span = self._recorders.tracer.start_span(
            self._name,
            self._parent,
            kind=trace.SpanKind.INTERNAL,
            attributes=self._attributes,
        )
        self._span, self.recording = span, span.is_recording()
        self.context = trace.set_span_in_context(span, self._parent)
        if self._makes_current:
            self._token = context.attach(self.context)
        self._started = time.perf_counter()
        return self

    def set(self, attributes: Attributes) -> None:
        """Add attributes; those that are None are left out."""
        if self._span is not None:
            self._span.set_attributes(_given(attributes))

    def first_chunk(self) -> None:
        """The first piece of output is there; later calls change nothing."""
        if self._first_chunk_seconds is None:
            self._first_chunk_seconds = time.perf_counter() - self._started
            self.set({names.RESPONSE_TIME_TO_FIRST_CHUNK: self._first_chunk_seconds})

    def count_tokens(self, input_tokens: int, output_tokens: int) -> None:
        """For the metric of token usage; the attributes are set apart from it."""
        self._tokens = (input_tokens, output_tokens)

    def fail(self, error_type: str) -> None:
        """Mark the operation as failed, by a kind of error."""
        from opentelemetry.trace import StatusCode

        self._error_type = error_type
        self.set({names.ERROR_TYPE: error_type})
        if self._span is not None:
            self._span.set_status(StatusCode.ERROR)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from opentelemetry import context

        seconds = time.perf_counter() - self._started
        if kind is not None and not issubclass(kind, GeneratorExit):
            self.fail(error_type(kind))
        if self._token is not None:
            context.detach(self._token)
        if self._span is not None:
            self._span.end()
        self._measure(seconds)

    def _measure(self, seconds: float) -> None:
        kept = (names.OPERATION_NAME, names.PROVIDER_NAME, names.REQUEST_MODEL)
        about = {key: self._attributes[key] for key in kept if key in self._attributes}
        recorders = self._recorders
        if self._tokens is not None:
            for token_type, count in zip(("input", "output"), self._tokens, strict=True):
                recorders.tokens.record(count, {**about, names.TOKEN_TYPE: token_type})
        if self._first_chunk_seconds is not None:
            recorders.first_chunk.record(self._first_chunk_seconds, about)
        failed = {} if self._error_type is None else {names.ERROR_TYPE: self._error_type}
        recorders.duration.record(seconds, {**about, **failed})


class _Recorders:
    """The tracer and the instruments; made once, they follow providers that are set later."""

    def __init__(
        self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
    ) -> None:
        from opentelemetry import metrics, trace

        self.tracer: Tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self.tokens: Histogram = meter.create_histogram(
            names.METRIC_TOKEN_USAGE,
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKEN_BOUNDARIES,
        )
        self.duration: Histogram = meter.create_histogram(
            names.METRIC_DURATION,
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_SECOND_BOUNDARIES,
        )
        self.first_chunk: Histogram = meter.create_histogram(
            names.METRIC_TIME_TO_FIRST_CHUNK,
            unit="s",
            description="Time until the first piece of output.",
            explicit_bucket_boundaries_advisory=_SECOND_BOUNDARIES,
        )


@functools.cache
def default_telemetry() -> Telemetry | None:
    """What engines use that were given nothing: no content, the program's own providers.

    Returns:
        None where OpenTelemetry is not installed.
    """
    try:
        return Telemetry()
    except MissingExtraError:
        return None


def _given(attributes: Attributes) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def error_type(kind: type[BaseException]) -> str:
    """The full name of an exception; of a public one of ours, the public name."""
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"
