"""A step that several sessions share fails: the session whose row it was ends, the others go on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from sfi_agent import Engine, OutOfDeviceMemoryError, Session
from sfi_agent.engine import eager
from sfi_agent.engine.programs import block_steps, executor
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    Drawing,
    FastStep,
    RefreshOrder,
    RefreshStep,
    StepRequest,
)
from sfi_agent.engine.sampling import Sampler
from sfi_agent.session.asynchronous.shared_steps import may_share
from tests.test_session.async_cases import run_async, state_of, timeless
from tests.test_session.conversations import policy, require_whole
from tests.test_session.test_async_company import KINDS, company_engine, messages
from tests.test_session.test_chat_interruptions import StepFailed, fail

pytestmark = pytest.mark.timeout(120)

ENGINES = pytest.mark.parametrize("steps", ["eager", "programs"])
Choose = Callable[[str], bool]
"""Whether to fail in a place: "pass", "refresh" or "draw"."""


class Trouble:
    """Lets steps raise while they are executed.

    Args:
        engine: Whose steps.
        chooses: Asked wherever something could go wrong.
        error: What is raised then.

    Attributes:
        present: The requests that are being executed.
    """

    def __init__(self, engine: Engine, error: Callable[[], Any] = fail) -> None:
        self.present: list[StepRequest] = []
        self.chooses: Choose = lambda place: False
        self._engine, self._error = engine, error

    @contextmanager
    def made(self) -> Iterator[None]:
        """Within this block."""
        runner: Any = self._engine.runner
        execute = runner.execute

        def noting(requests: Sequence[StepRequest], *more: Any) -> Any:
            self.present[:] = requests
            try:
                return execute(requests, *more)
            finally:
                self.present.clear()

        layers = self._engine.model.get_decoder().layers
        hook = layers[len(layers) // 2].register_forward_pre_hook(lambda *_: self._at("pass"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "execute", noting)
            for module in (eager, executor, block_steps):
                for place, names in _PLACES.items():
                    for name in names:
                        if hasattr(module, name):
                            patch.setattr(module, name, self._around(getattr(module, name), place))
            try:
                yield
            finally:
                hook.remove()

    def _at(self, place: str) -> None:
        if self.present and self.chooses(place):
            self._error()

    def _around(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """The same function, which may fail before or after it has done its work."""

        def wrapped(*given: Any, **named: Any) -> Any:
            self._at(place)
            result = function(*given, **named)
            self._at(place)
            return result

        return wrapped


_PLACES = {
    "refresh": ("refresh_memory", "refresh_rows"),
    "draw": ("draw_each", "draw_rows", "choices_of"),
}


VERIFIES = {"slow_step": "verify"}
FULL_MEMORY = {"memory": {"selected_tokens": 2048}}
ALL_VERIFY = [VERIFIES, VERIFIES, {**VERIFIES, **FULL_MEMORY}, {**VERIFIES, **FULL_MEMORY}]
"""With all drafts rejected, and with all accepted."""


@contextmanager
def some_sessions(
    engine: Engine, rng: random.Random, kinds: Sequence[dict[str, Any]]
) -> Iterator[tuple[list[Session], list[Session], list[str]]]:
    """Sessions that talk long enough to meet, others with the same policies, and a message for
    each pair."""
    sampling = {"max_new_tokens": 24, "temperature": rng.choice([0.0, 0.9])}
    configs = [policy(**kind, sampling=sampling) for kind in kinds]
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for config in configs]
        alone = [stack.enter_context(engine.session(config)) for config in configs]
        yield sessions, alone, messages(rng, len(configs))


async def all_say(sessions: Sequence[Session], texts: Sequence[str]) -> list[Any]:
    talks = (session.asend(text) for session, text in zip(sessions, texts, strict=True))
    return list(await asyncio.gather(*talks, return_exceptions=True))


def shared_failures(logs: Sequence[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "shared_step_failed"]


def refreshes(request: StepRequest) -> bool:
    """Whether a refresh belongs to a step."""
    asked = isinstance(request, DenseStep) and request.refresh is not None
    return asked or isinstance(request, RefreshStep)


@ENGINES
@pytest.mark.parametrize("place", ["pass", "refresh", "draw"])
def test_the_session_whose_row_it_is_ends_alone(place: str, steps: str) -> None:
    seed = random.randrange(2**31)
    rng, engine = random.Random(seed), company_engine(steps)
    trouble, guilty_from = Trouble(engine), rng.randrange(1, 8)
    met: list[bool] = []

    def guilty_is_here(asked: str) -> bool:
        own = [item for item in trouble.present if item.sequence is guilty._core.sequence]
        if asked != place or not own or (place == "refresh" and not refreshes(own[0])):
            return False
        if len(trouble.present) > 1 and len(guilty.trace) >= guilty_from:
            met.append(True)
        return bool(met)

    with some_sessions(engine, rng, rng.sample(KINDS, 3)) as (sessions, alone, texts):
        guilty, trouble.chooses = sessions[0], guilty_is_here
        with trouble.made(), capture_logs() as logs:
            error, *replies = run_async(all_say(sessions, texts))
        expected = [session.send(text) for session, text in zip(alone, texts, strict=True)]
        assert isinstance(error, StepFailed) == bool(met), (seed, error)
        others = zip(replies, expected[1:], strict=True)
        same = [timeless(reply) == timeless(other) for reply, other in others]
        # In very rare cases the rounding of matrix products decides between two tokens.
        assert same.count(False) <= 1, (seed, same)
        for entry in shared_failures(logs):
            assert entry["sessions"] > 1 and "StepFailed" in entry["reason"]
        for session in sessions:
            require_whole(session, exact=False)
        assert guilty.token_ids == alone[0].token_ids[: len(guilty.token_ids)], seed
        before = len(guilty.token_ids)
        assert guilty.decode([], max_new_tokens=3) == guilty.token_ids[before:]
        require_whole(guilty, exact=False)


@ENGINES
@pytest.mark.parametrize("kinds", [KINDS, ALL_VERIFY], ids=["all kinds", "verify"])
def test_what_only_goes_wrong_in_company_ends_nobody(
    kinds: list[dict[str, Any]], steps: str
) -> None:
    """Such as a device whose memory takes one row and not several: wherever it happens, every
    session goes on as if it had been alone."""
    seed = random.randrange(2**31)
    rng, engine = random.Random(seed), company_engine(steps)
    places: list[str] = []

    def no_room() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trouble = Trouble(engine, no_room)

    def in_company(place: str) -> bool:
        chosen = len(trouble.present) > 1 and rng.random() < 0.2
        if chosen:
            places.append(place)
        return chosen

    trouble.chooses = in_company
    with some_sessions(engine, rng, rng.sample(kinds, 4)) as (sessions, alone, texts):
        with trouble.made(), capture_logs() as logs:
            replies = run_async(all_say(sessions, texts))
        expected = [session.send(text) for session, text in zip(alone, texts, strict=True)]
        pairs = zip(sessions, alone, replies, expected, strict=True)
        same = [
            state_of(one) == state_of(other) and timeless(got) == timeless(wanted)
            for one, other, got, wanted in pairs
        ]
        assert same.count(False) <= 1, (seed, same, replies)
        assert len(shared_failures(logs)) == len(places)
        for entry in shared_failures(logs):
            assert OutOfDeviceMemoryError.__name__ in entry["reason"]
        for session in sessions:
            require_whole(session, exact=False)


def test_steps_that_cannot_be_repeated_are_taken_alone() -> None:
    engine = company_engine("eager")
    with engine.session(policy()) as session:
        session.decode([1, 2, 3], max_new_tokens=0)
        sequence, drawing = session._core._opened().sequence, Drawing(Sampler(), 3)
        order = RefreshOrder(session._core._decoder.steps.selector, 4)
        shown = RefreshOrder(order.selector, 4, with_selections=True)
        alone: list[StepRequest] = [
            FastStep(sequence, 1, drawing, on_fast_attention=print),
            BlockStep(sequence, [1], drawing, continues=True),
            RefreshStep(sequence, 0, 1, shown),
        ]
        together: list[StepRequest] = [
            FastStep(sequence, 1, drawing),
            DenseStep(sequence, [1], drawing),
            BlockStep(sequence, [1], drawing),
            RefreshStep(sequence, 0, 1, order),
        ]
        assert not any(map(may_share, alone)) and all(map(may_share, together))
