"""Verify in conversations: only verified tokens are streamed, and all that is told adds up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from sfi_agent import (
    Engine,
    ReasoningDelta,
    Session,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
    ToolStart,
    TurnEnd,
)
from sfi_agent.session.events import Event
from tests.test_session.conversations import call_text, chat_engine, encode, policy, require_whole

END = "<|im_end|>"
THOUGHT = "<think>\nWho is it? Let me see.\n</think>\n\n"
DETECTORS = [{"name": "punctuation"}, {"name": "structure"}]
VERIFY = policy(slow_step="verify", boundaries=DETECTORS, sampling={"max_new_tokens": 200})
DENSE = VERIFY.replace(mode="dense")
OUTPUTS = (
    f"{THOUGHT}I greet. Ünï 👋🏽\n\n"
    f"{call_text('greet', name='Ada')}\n{call_text('greet', name='Bo')}{END}",
    f"{call_text('greet', nobody=1)}{END}",
    f"Done. It took 3.5 s.\n```\nx = 1\n```\nBye!{END}",
)


def greet(name: str) -> str:
    """Greets somebody.

    Args:
        name: Whom.
    """
    return f"Hello {name} <|im_end|>"


class Drafting:
    """Scripts what dense steps choose; fast steps draft it with some mistakes.

    Outputs belong to positions: the first token of an output to the last row of a prefill, the
    others to the rows behind it. Behind an output's end a draft gets nonsense, and so does the
    dense step that judges it.

    Args:
        engine: Its model is scripted while the context is entered.
        outputs: Of each turn, stop token included.
        mistakes: Share of drafts that are wrong, 0 to 1; a wrong one may be a stop token.
    """

    def __init__(self, engine: Engine, outputs: Sequence[str], mistakes: float) -> None:
        self._model: Any = engine.model
        self._outputs = [encode(engine, output) for output in outputs]
        self._given: dict[int, int] = {}
        self._lots = random.Random(7)
        self._mistakes = mistakes
        self._wrong_ids = [*encode(engine, f"{END} no. <think>"), 0]
        self._handle: Any = None
        self.wrong_drafts = 0

    def __enter__(self) -> Drafting:
        self._handle = self._model.register_forward_hook(self._overwrite, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _overwrite(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        positions = kwargs["position_ids"][0].tolist()
        fast, last = kwargs["sfi"].kind == "fast", positions[-1]
        rows = positions[-result.logits.shape[1] :]
        if not fast and len(rows) == 1 and last not in self._given:
            self._begin_output(last)
        logits = torch.full_like(result.logits, -30.0)
        for index, row in enumerate(rows):
            token = self._given.get(row, 0)
            if fast and self._lots.random() < self._mistakes:
                wrong = self._lots.choice(self._wrong_ids)
                self.wrong_drafts += wrong != token
                token = wrong
            logits[0, index, token] = 30.0
        result.logits = logits
        return result

    def _begin_output(self, row: int) -> None:
        if self._outputs:
            output = self._outputs.pop(0)
            self._given.update({row + index: token for index, token in enumerate(output)})


def told(events: Sequence[Event]) -> list[Any]:
    """Everything but when and by which steps: what a person sees."""
    shown: list[Any] = []
    for event in events:
        if isinstance(event, Step):
            shown.append((event.token_id, event.text))
        elif isinstance(event, TurnEnd):
            reply = event.reply
            shown.append((reply.text, reply.tool_calls, reply.reasoning, reply.finish_reason))
            shown.append(reply.usage)
        else:
            shown.append(event)
    return shown


@pytest.mark.parametrize("mistakes", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("template", ["CHATML", "CHATML_THINKING"])
def test_a_tool_loop_is_told_as_in_mode_dense(template: str, mistakes: float) -> None:
    engine = chat_engine(template)
    found = []
    for config in (DENSE, VERIFY):
        with engine.session(config, system="Be kind.", tools=[greet]) as session:
            with Drafting(engine, OUTPUTS, mistakes) as script:
                events = list(session.stream("Greet Ada."))
            found.append((told(events), session.token_ids, session.messages))
            require_whole(session)
            check_turns(session, events)
            if config is VERIFY:
                assert bool(script.wrong_drafts) == bool(mistakes)
                acceptance = session.stats.acceptance
                assert acceptance is not None
                assert (acceptance == 1.0) == (mistakes == 0.0)
    assert found[0] == found[1]
    kinds = {type(event) for event in events}
    assert kinds == {Step, TextDelta, ReasoningDelta, ToolCall, ToolStart, ToolResult, TurnEnd}


def check_turns(session: Session, events: Sequence[Event]) -> None:
    """Steps in order, texts and usages that add up, turn by turn."""
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.record for step in steps] == session.trace
    assert [step.record.token_id for step in steps] == [step.token_id for step in steps]
    turn: list[Event] = []
    for event in events:
        turn.append(event)
        if not isinstance(event, TurnEnd):
            continue
        reply, mine = event.reply, [item for item in turn if isinstance(item, Step)]
        assert tuple(step.record for step in mine) == reply.steps
        first = mine[0].record.position
        assert [s.record.position for s in mine] == list(range(first, first + len(mine)))
        text = "".join(item.text for item in turn if isinstance(item, TextDelta))
        assert text.strip() == reply.text.strip()
        usage = reply.usage
        assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens == first
        assert usage.output_tokens == len(mine)
        turn = []


@pytest.mark.parametrize("mistakes", [0.0, 0.4])
def test_events_come_as_their_tokens_become_final(mistakes: float) -> None:
    """Whatever was told stays: ids only grow, one by one, and the texts join to the reply's."""
    engine = chat_engine()
    seen: list[int] = []
    with engine.session(VERIFY, tools=[greet]) as session:
        with Drafting(engine, OUTPUTS, mistakes):
            for event in session.stream("Greet Ada."):
                assert session.token_ids[: len(seen)] == seen
                if isinstance(event, Step):
                    seen = session.token_ids
                    assert event.record.position == len(seen) - 1
                    assert seen[-1] == event.token_id
        assert session.token_ids[: len(seen)] == seen


@pytest.mark.parametrize("limit", range(1, 30, 4))
def test_limits_in_the_middle_of_a_segment(limit: int) -> None:
    engine = chat_engine()
    found = []
    for config in (DENSE, VERIFY):
        limited = config.replace(sampling={"max_new_tokens": limit})
        with engine.session(limited) as session:
            with Drafting(engine, OUTPUTS[2:], 0.3):
                reply = session.send("Go on.")
            found.append((reply.text, reply.usage, reply.finish_reason, session.token_ids))
            require_whole(session)
    assert found[0] == found[1]
    assert found[0][2] == "length"


@pytest.mark.parametrize("kept", range(1, 25, 5))
@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_in_the_middle_of_a_segment(
    how: Literal["close", "cancel"], kept: int
) -> None:
    """What was told is part of the conversation, and nothing else of the segment."""
    engine = chat_engine()
    with engine.session(VERIFY, tools=[greet]) as session:
        with Drafting(engine, OUTPUTS, 0.3):
            stream: Any = session.stream("Greet Ada.")
            events: list[Event] = []
            for event in stream:
                events.append(event)
                if sum(isinstance(item, Step) for item in events) == kept:
                    if how == "close":
                        stream.close()
                        break
                    session.cancel()
        steps = [event.token_id for event in events if isinstance(event, Step)]
        assert session.token_ids[-len(steps) :] == steps == [r.token_id for r in session.trace]
        if how == "cancel":
            assert isinstance(events[-1], TurnEnd)
            assert events[-1].reply.finish_reason == "cancelled"
            assert len(steps) == kept
        require_whole(session)
        with Drafting(engine, OUTPUTS[2:], 0.3):
            reply = session.send("Go on.")
        assert reply.finish_reason == "stop"
        require_whole(session)


def test_stop_tokens_of_wrong_drafts_end_no_turn() -> None:
    """Every draft is a stop token, and the answer comes out whole."""
    engine = chat_engine()
    with engine.session(VERIFY) as session:
        with Drafting(engine, OUTPUTS[2:], 1.0) as script:
            script._wrong_ids = encode(engine, END)
            reply = session.send("Go on.")
        assert reply.finish_reason == "stop"
        assert session.token_ids[-reply.usage.output_tokens :] == encode(engine, OUTPUTS[2])
        assert any(record.reason == "stop_id" for record in session.trace)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "seed": 5}], ids=["greedy", "warm"])
@pytest.mark.parametrize("template", ["CHATML", "LLAMA"])
def test_unscripted_conversations_equal_those_of_mode_dense(
    template: str, sampling: dict[str, Any]
) -> None:
    engine = chat_engine(template, "gemma3")
    found = []
    for config in (DENSE, VERIFY):
        limited = config.replace(sampling={**sampling, "max_new_tokens": 16})
        with engine.session(limited) as session:
            replies = [session.send(text) for text in ("Hello.", "Well?")]
            mark = session.mark()
            session.send("Never mind.")
            session.rewind(mark)
            with session.fork(seed=77) as child:
                replies.append(child.send("Again."))
            replies.append(session.send("Again."))
            found.append(
                (
                    session.token_ids,
                    session.messages,
                    [(r.text, r.usage.output_tokens, r.usage.prompt_tokens) for r in replies],
                )
            )
    assert found[0] == found[1]


def test_run_and_send_agree_with_stream() -> None:
    engine = chat_engine()
    ids = []
    for action in ("run", "stream"):
        with engine.session(VERIFY, tools=[greet]) as session:
            with Drafting(engine, OUTPUTS, 0.3):
                result: Any = getattr(session, action)("Greet Ada.")
                if action == "stream":
                    result = [item for item in result if isinstance(item, TurnEnd)][-1].reply
            assert result.finish_reason == "stop"
            ids.append(session.token_ids)
    assert ids[0] == ids[1]
