"""How a batch behaves: who waits for whom, and what an error or a cancellation leaves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from sfi_agent import Boundary, Engine, Session, SessionConfig, StepEvent, TokenEvent
from sfi_agent.engine.requests import BlockStep, DenseStep, RefreshStep, StepOutcome, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import SlowStepKind
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin
from tests.reference import dense_logits
from tests.test_engine.program_cases import POLICY
from tests.test_guarantees.pair import Planned
from tests.test_guarantees.play import close
from tests.test_guarantees.test_batch import ENGINES, PROMPTS, over_engines
from tests.test_session.conversations import SPARSE, chat_engine

over_slow_steps = pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])


class _Acting(FakeDetector):
    """Does something to the one session that knows it, at one position."""

    def __init__(self, act: Any, moment: str, position: int) -> None:
        super().__init__(None)
        self.act, self.moment, self.position = act, moment, position

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        if self.moment == "reset" and self.position:
            self.act()

    def after_step(self, event: StepEvent) -> Boundary | None:
        if self.moment == "step" and event.position == self.position:
            self.act()
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        if self.moment == "token" and event.position == self.position:
            self.act()
        return None


def acted(
    engine: Engine, slow_step: SlowStepKind, act: Any, moment: str, stack: ExitStack
) -> list[Session]:
    """Three open sessions; the detector of the second one acts at its sixth new token."""
    made: list[_Acting] = []

    def factory(config: Any, tokenizer: Any) -> _Acting:
        made.append(_Acting(act, moment, (len(PROMPTS[1]) + 5) * (len(made) == 1)))
        return made[-1]

    plugin = detector_plugin("acting", FakeConfig, factory)
    stack.enter_context(temporary_plugins(acting=plugin))
    config = POLICY.replace(boundaries=[{"name": "acting"}], slow_step=slow_step)
    return [stack.enter_context(engine.session(config)) for _ in PROMPTS]


@over_engines
@over_slow_steps
@pytest.mark.parametrize("moment", ["reset", "step", "token"])
def test_a_plugin_that_raises_ends_all_and_leaves_every_session_consistent(
    moment: str, slow_step: SlowStepKind, steps: str
) -> None:
    def act() -> None:
        raise Planned

    engine = ENGINES[steps]("gemma3")
    with ExitStack() as stack:
        sessions = acted(engine, slow_step, act, moment, stack)
        with pytest.raises(Planned):
            engine.decode_batch(sessions, PROMPTS, max_new_tokens=20)
        left = []
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            ids, core = session.token_ids, session._core._opened()
            assert ids[: len(prompt)] == prompt and len(ids) < len(prompt) + 20
            assert len(session.trace) == len(ids) - len(prompt)
            assert all(ids[record.position] == record.token_id for record in session.trace)
            assert core.sequence.segment_tokens == 0
            assert core.sequence.processed_tokens <= len(ids) - 1
            tokens = {layer.history.tokens for layer in core.sequence.layers}
            assert tokens == {core.sequence.processed_tokens}
            left.append((ids, session.next_logits()))
        assert len(sessions[1].token_ids) > len(PROMPTS[1]) or moment == "reset"
        child = stack.enter_context(sessions[0].fork(SessionConfig(mode="dense")))
        again = engine.decode_batch([sessions[0], sessions[2], child], max_new_tokens=4)
        assert [len(row) for row in again] == [4, 4, 4]
    for ids, logits in left if slow_step != "observe" else []:
        assert close(logits, dense_logits(engine.model, ids)[-1])


@over_engines
@over_slow_steps
def test_one_row_is_cancelled_and_the_others_go_on(slow_step: SlowStepKind, steps: str) -> None:
    sessions: list[Session] = []
    alone = []
    engine = ENGINES[steps]("llama")
    config = POLICY.replace(slow_step=slow_step)
    for prompt in PROMPTS:
        with engine.session(config) as session:
            alone.append(session.decode(prompt, max_new_tokens=20))
    with ExitStack() as stack:
        sessions += acted(engine, slow_step, lambda: sessions[1].cancel(), "token", stack)
        got = engine.decode_batch(sessions, PROMPTS, max_new_tokens=20)
        assert got[0] == alone[0] and got[2] == alone[2]
        assert 1 <= len(got[1]) < 20 and got[1] == alone[1][: len(got[1])]
        assert sessions[1].token_ids == PROMPTS[1] + got[1]
        # A cancellation is over with its call.
        assert len(engine.decode_batch(sessions, max_new_tokens=3)[1]) == 3


class _Watched(Runner):
    """Notes the requests of every tick."""

    def __init__(self, inner: Runner) -> None:
        super().__init__(
            inner.model,
            inner.shape,
            inner.prefill_chunk_tokens,
            execution="eager" if inner.programs is None else "uncaptured",
        )
        self.ticks: list[tuple[list[StepRequest], int]] = []

    def execute(
        self, requests: Sequence[StepRequest], batch: int = 1, waiting: int = 0
    ) -> list[StepOutcome]:
        self.ticks.append((list(requests), len(requests) + waiting))
        return super().execute(requests, batch, waiting)


def watched_batch(
    steps: str, config: SessionConfig, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[StepRequest], int]]:
    """The ticks of a batch whose rows differ by their prompts alone."""
    engine = ENGINES[steps]("llama")
    runner = _Watched(engine.runner)
    monkeypatch.setattr(engine, "runner", runner)
    with ExitStack() as stack:
        rows = [stack.enter_context(engine.session(config)) for _ in range(sessions)]
        prompts = [list(range(row, row + 12)) for row in range(sessions)]
        got = engine.decode_batch(rows, prompts, max_new_tokens=24)
    assert all(len(row) == 24 for row in got)
    return runner.ticks


def slow_singles(requests: Sequence[StepRequest]) -> int:
    return sum(
        isinstance(request, DenseStep) and len(request.ids) == 1 and request.refresh is not None
        for request in requests
    )


@over_engines
@pytest.mark.parametrize("sessions", [1, 2, 4, 5, 9])
def test_slow_steps_of_a_batch_are_staggered(
    sessions: int, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All segments end after six tokens; no more than a quarter of the rows is slow at once."""
    ticks = watched_batch(steps, POLICY, sessions, monkeypatch)
    slow = [slow_singles(requests) for requests, _ in ticks[1:]]
    assert all(count <= -(-live // 4) for count, (_, live) in zip(slow, ticks[1:], strict=True))
    # 24 tokens of segments of six and their slow step: three each, none of them lost.
    assert sum(slow) == 3 * sessions
    # Once out of step nobody waits again, so the whole batch takes little longer than one row.
    assert len(ticks) <= 24 + -(-sessions // -(-sessions // 4))


@over_engines
@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_blocks_of_a_batch_are_gathered(
    slow_step: SlowStepKind, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of blocks is taken with at least half of the rows, or when nobody else can move."""
    ticks = watched_batch(steps, POLICY.replace(slow_step=slow_step), 4, monkeypatch)
    blocks = [
        (
            sum(
                isinstance(request, BlockStep)
                or (isinstance(request, DenseStep) and len(request.ids) > 1)
                for request in requests
            ),
            len([request for request in requests if not isinstance(request, RefreshStep)]),
            live,
        )
        for requests, live in ticks[1:]
    ]
    gathered = [entry for entry in blocks if entry[0]]
    assert gathered and all(
        2 * found >= live or found == others for found, others, live in gathered
    )
    assert max(found for found, _, _ in gathered) == 4


def test_messages_know_what_a_batch_appended_and_generated() -> None:
    """Behind an unfinished answer tokens belong to it; behind new ids they belong to nobody."""
    engine = chat_engine()
    config = SPARSE.replace(sampling={"max_new_tokens": 8})
    news: tuple[list[int], list[int]] = [], [9, 8, 7]
    with ExitStack() as stack:
        alone, together = (
            [stack.enter_context(engine.session(config)) for _ in news] for _ in range(2)
        )
        for session in (*alone, *together):
            session.send("Count to a hundred.")
        before = [session.messages for session in together]
        for session, new in zip(alone, news, strict=True):
            session.decode(new, max_new_tokens=6)
        engine.decode_batch(together, news, max_new_tokens=6)
        for one, other in zip(alone, together, strict=True):
            assert one.token_ids == other.token_ids and one.messages == other.messages
        grown = [session.messages != old for session, old in zip(together, before, strict=True)]
        assert grown == [True, False]
