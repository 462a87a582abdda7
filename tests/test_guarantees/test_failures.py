"""Guarantee 8, the other half: after an error a session still works and equals a recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import (
    Boundary,
    Engine,
    Evidence,
    PluginError,
    Selection,
    Session,
    SessionConfig,
    StepEvent,
    TokenEvent,
)
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin, selector_plugin
from tests.families import tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import LAYOUT_NAMES, for_each, prompts, sparse_policies

Answer = Callable[[Tensor, Tensor], Any]
"""A selection made wrong: gets correct positions and counts."""

BROKEN_SELECTIONS: dict[str, Answer] = {
    "nothing": lambda positions, counts: None,
    "a tuple": lambda positions, counts: (positions, counts),
    "lists": lambda positions, counts: Selection([[3]], [[1]]),  # type: ignore[arg-type]
    "no counts": lambda positions, counts: Selection(positions, None),  # type: ignore[arg-type]
    "int32": lambda positions, counts: Selection(positions.int(), counts),
    "float counts": lambda positions, counts: Selection(positions, counts.float()),
    "other device": lambda positions, counts: Selection(positions.to("meta"), counts),
    "no batch axis": lambda positions, counts: Selection(positions[0], counts[0]),
    "one head": lambda positions, counts: Selection(positions[:, :1], counts[:, :1]),
    "counts per place": lambda positions, counts: Selection(positions, positions),
    "over the budget": lambda positions, counts: Selection(
        torch.cat([positions, positions[..., -1:] + 1], -1), counts + 1
    ),
    "in the sink": lambda positions, counts: Selection(positions - 3, counts),
    "in the recent tokens": lambda positions, counts: Selection(positions + 1000, counts),
    "negative": lambda positions, counts: Selection(positions * 0 - 1, counts),
    "descending": lambda positions, counts: Selection(positions.flip(-1), counts),
    "twice": lambda positions, counts: Selection(positions[..., :1] + 0 * positions, counts),
    "negative counts": lambda positions, counts: Selection(positions, counts * 0 - 1),
    "counts beyond the places": lambda positions, counts: Selection(positions, counts + 1),
    "one wrong head of many": lambda positions, counts: Selection(
        torch.cat([positions[:, :-1], positions[:, -1:] - 3], 1), counts
    ),
}


class _BrokenSelector:
    """Answers correctly `good` times (once per layer and refresh), then as it was told."""

    needs: frozenset[str] = frozenset()

    def __init__(self, answer: Answer, good: int) -> None:
        self.answer = answer
        self.good = good

    def select(self, evidence: Evidence, budget: int) -> Selection:
        heads = evidence.logits.shape[:2]
        positions = evidence.candidate_start + torch.arange(budget)
        positions = positions.expand(*heads, budget).contiguous()
        counts = torch.full(heads, budget)
        self.good -= 1
        if self.good >= 0:
            return Selection(positions, counts)
        answered: Selection = self.answer(positions, counts)
        return answered


@pytest.mark.parametrize("good", [0, 1, 5], ids=["first layer", "second layer", "second refresh"])
@pytest.mark.parametrize("kind", BROKEN_SELECTIONS)
def test_a_selector_that_breaks_its_contract(kind: str, good: int) -> None:
    selector = _BrokenSelector(BROKEN_SELECTIONS[kind], good)
    config = {
        "boundaries": [{"name": "interval", "every_tokens": 3}],
        "selector": {"name": "broken"},
        "memory": {"sink_tokens": 2, "selected_tokens": 5, "recent_tokens": 3},
        "refresh": {"min_segment_tokens": 1, "max_segment_tokens": 3},
    }
    engine = tiny_engine("llama")
    plugin = selector_plugin("broken", FakeConfig, lambda config: selector)
    with temporary_plugins(broken=plugin):
        with engine.session(SessionConfig(**config)) as session:  # type: ignore[arg-type]
            with pytest.raises(PluginError, match="_BrokenSelector.*got .*allowed: ") as caught:
                session.decode(list(range(30)), max_new_tokens=20)
            assert caught.value.plugin
            goes_on(engine, session)


class _BrokenDetector(FakeDetector):
    """Reports something wrong at the n-th event of a kind."""

    def __init__(self, reported: Any, moment: str) -> None:
        super().__init__(None)
        self.reported = reported
        self.moment = moment
        self.events = 0

    def _report(self, moment: str) -> Any:
        self.events += moment == self.moment
        return self.reported if moment == self.moment and self.events == 4 else None

    def after_step(self, event: StepEvent) -> Boundary | None:
        reported: Boundary | None = self._report("after_step")
        return reported

    def after_token(self, event: TokenEvent) -> Boundary | None:
        reported: Boundary | None = self._report("after_token")
        return reported


@pytest.mark.parametrize(
    ("reported", "moment"),
    [
        (Boundary("too late", when="now"), "after_token"),
        (Boundary("odd", when="sometimes"), "after_token"),  # type: ignore[arg-type]
        (Boundary("odd", when="sometimes"), "after_step"),  # type: ignore[arg-type]
        (Boundary(None), "after_step"),  # type: ignore[arg-type]
        (True, "after_step"),
        ("sentence", "after_token"),
    ],
    ids=repr,
)
def test_a_detector_that_breaks_its_contract(reported: Any, moment: str) -> None:
    engine = tiny_engine("llama")
    detector = _BrokenDetector(reported, moment)
    plugin = detector_plugin("broken", FakeConfig, lambda config, tokenizer: detector)
    with temporary_plugins(broken=plugin):
        with engine.session(SessionConfig(boundaries=[{"name": "broken"}])) as session:
            with pytest.raises(PluginError, match="'broken'.*allowed") as caught:
                session.decode(list(range(30)), max_new_tokens=20)
            assert caught.value.plugin == "broken"
            goes_on(engine, session)


def goes_on(engine: Engine, session: Session) -> None:
    """The ids are kept with the last one pending, and the session decodes dense in a fork."""
    ids = session.token_ids
    assert ids[:30] == list(range(30))
    assert session.stats.history_tokens == len(ids) - 1
    assert session.trace == session.trace[: len(ids) - 30]
    with session.fork(SessionConfig(mode="dense")) as child:
        child.decode([], max_new_tokens=2)
        assert child.token_ids[: len(ids)] == ids
    session.rewind(session.mark(30))
    session_logits = session.next_logits()
    session.close()
    assert close(session_logits, dense_logits(engine.model, range(30))[-1])


class _Planned(Exception):
    """Raised inside the model by the tests."""


class _RaisesOnce:
    """Wraps an attention layer's forward: raises in its n-th call, before or after the work."""

    def __init__(self, forward: Callable[..., Any], call: int, *, after: bool) -> None:
        self.forward = forward
        self.calls_left = call
        self.after = after

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left == 0 and not self.after:
            raise _Planned
        result = self.forward(*arguments, **keywords)
        if self.calls_left == 0:
            raise _Planned
        return result


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_a_step_interrupted_in_any_layer_leaves_a_session_that_goes_on(family: str) -> None:
    """Ids and history agree, and at full budget what follows equals a dense recompute."""

    @for_each(
        family,
        6,
        config=sparse_policies(full_budget=True),
        prompt=prompts,
        layer=st.integers(0, 1),
        call=st.integers(1, 9),
        after=st.booleans(),
    )
    def check(config: SessionConfig, prompt: list[int], layer: int, call: int, after: bool) -> None:
        engine = tiny_engine(family, 16)
        attention = engine.model.model.layers[layer].self_attn
        with engine.session(config) as session, pytest.MonkeyPatch.context() as patched:
            broken = _RaisesOnce(attention.forward, call, after=after)
            patched.setattr(attention, "forward", broken)
            with pytest.raises(_Planned):
                session.decode(prompt, max_new_tokens=20)
            before = session.token_ids
            assert before[: len(prompt)] == prompt
            assert session.stats.history_tokens < len(before)
            session.decode([], max_new_tokens=3)
            assert session.token_ids[: len(before)] == before
            ids, logits = session.token_ids, session.next_logits()
        assert close(logits, dense_logits(engine.model, ids)[-1])


@pytest.mark.parametrize("answers", [0, 1, 2, 4])
def test_cancelling_between_chunks_and_tokens_loses_nothing(answers: int) -> None:
    """A prefill of four chunks, asked before each of them whether to stop."""
    engine = tiny_engine("llama", 16)
    config = SessionConfig(boundaries=[{"name": "never"}])
    prompt = list(range(64))
    with engine.session(config) as session:
        asked = iter([False] * answers)
        session._cancelled.is_set = lambda: next(asked, True)  # type: ignore[method-assign]
        generated = session.decode(prompt, max_new_tokens=8)
        assert len(generated) == (answers == 4)
        assert session.token_ids == prompt + generated
        assert session.stats.history_tokens == 16 * answers
        del session._cancelled.is_set
        session.decode([], max_new_tokens=2)
        ids, logits = session.token_ids, session.next_logits()
    assert close(logits, dense_logits(engine.model, ids)[-1])


def test_cancel_from_another_place_ends_at_the_next_token() -> None:
    engine = tiny_engine("llama")
    detector = FakeDetector(None)
    plugin = detector_plugin("canceller", FakeConfig, lambda config, tokenizer: detector)
    with temporary_plugins(canceller=plugin):
        with engine.session(SessionConfig(boundaries=[{"name": "canceller"}])) as session:

            def after_token(event: TokenEvent) -> None:
                if event.position == 6:
                    session.cancel()

            detector.after_token = after_token  # type: ignore[method-assign]
            generated = session.decode([1, 2, 3], max_new_tokens=50)
            assert len(session.token_ids) == 8 == 3 + len(generated)
            assert len(session.decode([], max_new_tokens=4)) == 4
