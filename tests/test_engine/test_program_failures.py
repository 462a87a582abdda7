"""Programs whose plugins raise, or that cannot be made: sessions are as after eager steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from sfi_agent import Boundary, Engine, Evidence, Selection, Session, SessionConfig, StepEvent
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.programs import support
from sfi_agent.engine.programs.cohort import geometry_of
from sfi_agent.engine.programs.program import Program
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin, selector_plugin
from tests.reference import dense_logits
from tests.test_engine.program_cases import (
    POLICY,
    agree,
    counted_requests,
    eager_engine,
    fresh_program_engine,
    program_engine,
    program_policies,
    tell,
)
from tests.test_guarantees.adversaries import adversaries
from tests.test_guarantees.pair import Planned
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import SELECTORS, for_each, prompts

NEW_TOKENS = 9
PROMPT = list(range(20, 50))


class _Raises:
    """Raises once, at its n-th question; answers like `same_always` before and after."""

    needs: frozenset[str] = frozenset()

    def __init__(self, call: int) -> None:
        self.left = call

    def answer(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Planned

    def select(self, evidence: Evidence, budget: int) -> Selection:
        # Captured steps ask for several layers at once, as rows of the batch.
        for _ in evidence.logits:
            self.answer()
        heads = evidence.logits.shape[:2]
        oldest = evidence.candidate_start + torch.arange(budget)
        return Selection(oldest.expand(*heads, budget).contiguous(), torch.full(heads, budget))


class _RaisingDetector(FakeDetector):
    def __init__(self, call: int, moment: str) -> None:
        super().__init__(None)
        self.raises = _Raises(call)
        self.moment = moment

    def after_step(self, event: StepEvent) -> Boundary | None:
        if self.moment == "step":
            self.raises.answer()
        return None

    def after_token(self, event: Any) -> Boundary | None:
        if self.moment == "token":
            self.raises.answer()
        return None


@contextmanager
def raising_plugins(moment: str, call: int, selector: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts of a policy with a plugin that raises, anew for every session.

    Plugins that were put in place before cannot be named inside.
    """
    detectors = [{"name": "interval", "every_tokens": 3}]
    if moment == "select":
        plugin = selector_plugin("raising", FakeConfig, lambda config: _Raises(call))
        parts = {"selector": {"name": "raising"}, "boundaries": detectors}
    else:
        plugin = detector_plugin(
            "raising", FakeConfig, lambda config, tokenizer: _RaisingDetector(call, moment)
        )
        parts = {"selector": selector, "boundaries": [*detectors, {"name": "raising"}]}
    with temporary_plugins(raising=plugin):
        yield parts


@pytest.mark.parametrize("moment", ["select", "step", "token"])
@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_a_plugin_that_raises_leaves_what_eager_steps_leave(moment: str, slow_step: str) -> None:
    """And dense processing of the ids, where the policy promises that."""
    raised = []

    def check(
        config: SessionConfig, prompt: list[int], call: int, selector: dict[str, Any]
    ) -> None:
        with raising_plugins(moment, call, selector) as parts:
            config = config.replace(mode="slow_fast", **parts)
            left: list[tuple[list[int], Any]] = []

            def act(session: Session) -> None:
                for turn, tokens in ((prompt, 30), ([], NEW_TOKENS)):
                    try:
                        session.decode(turn, max_new_tokens=tokens)
                    except Planned:
                        raised.append(call)
                left.append((session.token_ids, session.next_logits()))

            expected = tell(eager_engine("llama"), config, act, logits=True)
            got = tell(program_engine("llama"), config, act, logits=False)
            agree(expected, got, config)
            ids, logits = left[1]
            if slow_step != "observe":
                assert close(logits, dense_logits(eager_engine("llama").model, ids)[-1])

    with adversaries(), counted_requests() as counts:
        for_each(
            moment + slow_step,
            8,
            config=program_policies(slow_step),
            prompt=prompts,
            call=st.integers(1, 20),
            selector=st.sampled_from(SELECTORS),
        )(check)
    assert len(raised) >= 4 and len(raised) % 2 == 0, raised
    assert counts.total() > 30, counts


def test_what_programs_cannot_execute_is_eager_and_said_once() -> None:
    def drift(session: Session) -> None:
        session.decode(PROMPT, max_new_tokens=NEW_TOKENS)
        session.decode([5], max_new_tokens=NEW_TOKENS)

    def watch(session: Session) -> None:
        session.attach(Instruments(on_fast_attention=lambda attention: None))
        drift(session)

    def long(session: Session) -> None:
        session.decode(PROMPT, max_new_tokens=320)

    def tails(session: Session) -> None:
        session.decode(PROMPT, max_new_tokens=NEW_TOKENS)
        with ExitStack() as stack:
            for _ in range(8):
                session = stack.enter_context(session.fork())
                session.decode([5], max_new_tokens=NEW_TOKENS)

    rectify = POLICY.replace(slow_step="rectify", boundaries=[{"name": "never"}])
    cases = {
        "a detector that needs attention_drift": (
            POLICY.replace(boundaries=[{"name": "drift", "minimum_mass": 0.3}]),
            drift,
        ),
        "an instrument that watches attention": (POLICY, watch),
        "several evidence queries": (rectify.replace(refresh={"evidence_queries": 2}), drift),
        "a block of more than 128 tokens": (
            rectify.replace(refresh={"max_segment_tokens": 140}),
            long,
        ),
        "a history of more than 8 extents": (POLICY, tails),
    }
    for reason, (config, act) in cases.items():
        expected = tell(eager_engine("llama"), config, act, logits=True)
        with capture_logs() as logs:
            got = tell(fresh_program_engine("llama"), config, act, logits=False)
        assert agree(expected, got, config), reason
        said = [entry["reason"] for entry in logs if entry["event"] == "eager_step"]
        assert said == [reason]


def test_a_chooser_that_programs_do_not_know_is_asked_by_eager_steps() -> None:
    class Second:
        def choose(self, logits: Tensor, position: int) -> Tensor:
            return logits.topk(2).indices[1]

    def act(session: Session) -> None:
        decoder: Any = session._core._decoder
        decoder._draft_chooser = decoder._chooser = Second()
        session.decode(PROMPT, max_new_tokens=NEW_TOKENS)

    expected = tell(eager_engine("llama"), POLICY, act, logits=False)
    with capture_logs() as logs, counted_requests() as counts:
        got = tell(fresh_program_engine("llama"), POLICY, act, logits=False)
    assert [entry["reason"] for entry in logs if entry["event"] == "eager_step"] == [
        "a chooser of its own"
    ]
    assert expected.records == got.records and not counts


def test_layers_of_different_head_sizes_have_no_geometry() -> None:
    sequence = SequenceState((None, None), None, frozenset())
    for layer, size in zip(sequence.layers, (8, 16), strict=True):
        layer.history.append(torch.zeros(2, 3, size), torch.zeros(2, 3, size))
    assert geometry_of(sequence) is None


def capturing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the engine believe that its programs can be captured; the CPU runs them as they are."""
    monkeypatch.setattr(support, "kernel_problem", lambda *sizes: None)
    programs: Any = engine.runner.programs
    programs._capture = True
    programs._steps = programs._make()
    return programs


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("allowed", range(5))
def test_programs_that_cannot_be_captured_are_replaced_by_eager_steps(
    slow_step: Literal["observe", "rectify", "verify"],
    allowed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first few can; the next one is noticed wherever it is first needed, and nothing is
    processed twice."""
    left = allowed

    def capture(program: Program, pool: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("no room for graphs")
        program.start({})

    monkeypatch.setattr(Program, "capture", capture)
    config = POLICY.replace(
        slow_step=slow_step, boundaries=[{"name": "interval", "every_tokens": 4}]
    )
    prompts = [PROMPT, PROMPT[:20], PROMPT[5:]]
    other = config.replace(selector={"name": "window"})

    def together(engine: Engine) -> list[list[int]]:
        with ExitStack() as stack:
            policies = (config, other, config)
            sessions = [stack.enter_context(engine.session(policy)) for policy in policies]
            engine.decode_batch(sessions, prompts, max_new_tokens=25)
            with sessions[0].fork() as child:
                child.decode([], max_new_tokens=NEW_TOKENS)
                return [session.token_ids for session in (*sessions, child)]

    engine = fresh_program_engine("llama")
    programs = capturing(engine, monkeypatch)
    with capture_logs() as logs:
        got = together(engine)
    warned = [entry for entry in logs if entry["event"] == "programs_unavailable"]
    assert len(warned) == 1
    assert warned[0]["log_level"] == "warning" and "no room for graphs" in warned[0]["reason"]
    assert programs.problem == "ValueError: no room for graphs" and not programs.captures
    assert got == together(eager_engine("llama"))


def test_a_model_that_cannot_be_compiled_is_captured_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = []

    def capture(program: Program, pool: Any) -> None:
        captured.append(program)
        program.start({})

    def backend(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler")

    monkeypatch.setattr(Program, "capture", capture)
    engine = fresh_program_engine("llama")
    programs = capturing(engine, monkeypatch)
    programs.compile_with(backend)
    assert not programs.compiles, "nothing has been made yet"

    def act(session: Session) -> None:
        session.decode(PROMPT, max_new_tokens=NEW_TOKENS)

    with capture_logs() as logs:
        got = tell(engine, POLICY, act, logits=False)
    assert [e["compiled"] for e in logs if e["event"] == "programs_unavailable"] == [True]
    assert programs.captures and not programs.compiles and len(captured) > 1
    assert agree(tell(eager_engine("llama"), POLICY, act, logits=True), got, POLICY)
