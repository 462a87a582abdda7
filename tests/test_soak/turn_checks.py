"""What must be true of a session after it was talked to, from plain data about what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sfi_agent import ContextOverflowError, Reply
from tests.test_soak.plants import CONTEXT_TOKENS
from tests.test_soak.speech import Said, unscripted
from tests.test_soak.talk import Disturbance, Outcome, StepFailed
from tests.test_soak.watched import (
    OpenCall,
    Watched,
    common_tokens,
    generated_from,
    open_calls,
)

__all__ = ["Talk", "check_talk", "check_template_text"]

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Talk:
    """What was asked of a session, and what its model was to say.

    Attributes:
        question: Text of the user.
        turns: The model's.
        max_turns: 0 for `send`, which runs no tools.
        disturbance: On the way.
    """

    question: str
    turns: Sequence[Said]
    max_turns: int
    disturbance: Disturbance

    def expected(self, limit_tokens: int) -> tuple[int, str]:
        """How many turns the model gets, and how the last one ends; "" where that is open.

        Args:
            limit_tokens: Of one turn.
        """
        for number, said in enumerate(self.turns, 1):
            if not said.scripted:
                return number, ""
            if len(said.ids) > limit_tokens:
                return number, "length"
            if not said.calls:
                return number, "stop"
            if self.max_turns == 0:
                return number, "tool_calls"
            if number == self.max_turns:
                return number, "max_turns"
            if said.ends:
                return number, said.ends
        raise AssertionError("a talk ends with an answer")

    def turn(self, number: int) -> Said:
        """The n-th turn, from 1; the model speaks for itself behind the last one."""
        return self.turns[number - 1] if number <= len(self.turns) else unscripted()


def check_talk(watched: Watched, talk: Talk, outcome: Outcome) -> None:
    """Compare ids, messages, replies and the number of tool runs with what they must be."""
    session, before = watched.session, watched.seen
    ids, messages = session.token_ids, session.messages
    added = messages[_past(watched, messages, ids) :]
    committed = sum(message["role"] == "assistant" for message in added)
    taken_back = _check_how_it_ended(watched, talk, outcome, committed)
    # Some messages cannot be appended by themselves, such as an empty one: all is rendered again
    # then, and a template that rewrites its past gives it up.
    rewrites = before.renders_again or watched.plant.setting.template != "CHATML"
    watched.backlog = taken_back and rewrites
    if committed == 0:
        assert (ids, messages, session.trace) == (before.ids, before.messages, before.trace)
        watched.backlog = watched.backlog or before.processed_tokens < len(before.ids) - 1
        watched.settle()
        return
    start = generated_from(session.trace, len(ids))
    last = talk.turn(committed)
    whole = len(ids) - start == len(last.ids)
    _check_ids(watched, ids, outcome, talk)
    _check_messages(watched, talk, added, committed)
    _note_open_calls(watched, talk, committed, outcome.runs, last if whole else unscripted())
    watched.lost = False
    watched.given_up_to = _given_up_to(before.processed_tokens, outcome)
    faithful = all(talk.turn(number).faithful for number in range(1, committed + 1)) and whole
    if watched.odd_from is not None and len(ids) <= watched.odd_from:
        # A hook has dropped it.
        watched.odd_from = None
    if watched.odd_from is None and not faithful:
        watched.odd_from = min(common_tokens(before.ids, ids), start)
    watched.settle(range(0) if last.scripted or taken_back else range(start, len(ids)))
    if watched.odd_from is None and watched.plant.setting.template == "CHATML":
        check_template_text(watched)


def check_template_text(watched: Watched) -> None:
    """The ids are the text that the template makes of the messages."""
    session, tokenizer = watched.session, cast("Any", watched.plant.engine.tokenizer)
    assert session._chat is not None
    schemas = session._chat.tools.schemas or None
    expected = tokenizer.apply_chat_template(session.messages, tools=schemas, tokenize=False)
    assert tokenizer.decode(session.token_ids) + "\n" == expected


def _past(watched: Watched, messages: Messages, ids: list[int]) -> int:
    """How many messages of the past are still there. All of them are, unchanged, but for what a
    policy or a hook is there to drop."""
    before = watched.seen
    expected, now = before.messages, messages
    if before.renders_again:
        # Where the template drops earlier thoughts, a conversation that is rendered again has none.
        expected, now = without_thoughts(expected), without_thoughts(now)
    if expected and common_tokens(before.ids, ids) < len(before.ids):
        # A stop token gave way, and the answer in front of it was read again. Bytes that are no
        # character are shown in front of the one and not in front of the other.
        expected, now = without_odd_bytes(expected), without_odd_bytes(now)
    if now[: len(expected)] == expected:
        return len(expected)
    total = len(before.ids)
    if common_tokens(before.ids, ids) == generated_from(before.trace, total) == total - 1:
        # An answer of one token that gave way is no message any more.
        assert now[: len(expected) - 1] == expected[:-1]
        return len(expected) - 1
    assert watched.shortens, f"{now[: len(expected)][-1:]} instead of {expected[-1:]}"
    system = int(expected[0]["role"] == "system")
    assert now[:system] == expected[:system]
    tails = [expected[start:] for start in range(system + 1, len(expected) + 1)]
    lengths = [len(tail) for tail in tails if now[system : system + len(tail)] == tail]
    return system + lengths[0]


def without_thoughts(messages: Messages) -> Messages:
    return [
        {key: value for key, value in message.items() if key != "reasoning_content"}
        for message in messages
    ]


def without_odd_bytes(messages: Messages) -> Messages:
    def shown(value: Any) -> Any:
        return value.replace("\ufffd", "") if isinstance(value, str) else value

    return [{key: shown(value) for key, value in message.items()} for message in messages]


def _check_how_it_ended(watched: Watched, talk: Talk, outcome: Outcome, committed: int) -> bool:
    """The error or the finish reason; whether the last turn left nothing behind."""
    error, disturbance = outcome.error, talk.disturbance
    turns, reason = talk.expected(watched.config.sampling.max_new_tokens)
    reply = outcome.closing or outcome.total or (outcome.ends[-1][0] if outcome.ends else None)
    crowded = len(watched.session.token_ids) == CONTEXT_TOKENS
    if isinstance(error, ContextOverflowError):
        assert error.needed_tokens > error.limit_tokens == CONTEXT_TOKENS
        return True
    assert not isinstance(error, StepFailed) or disturbance.kind == "fail_pass"
    if isinstance(error, KeyboardInterrupt):
        assert reason == "interrupted" and committed == turns
        return False
    left = disturbance.kind in ("leave", "cancel_task")
    assert error is not None or reply is not None or left
    if error is not None or reply is None or left:
        return not outcome.ends or _last_output(outcome) == 0
    if disturbance.harmless and reason and not crowded:
        assert (reply.finish_reason, committed) == (reason, turns), f"{committed} turns, {reply}"
    elif not disturbance.harmless:
        assert reply.finish_reason in ("cancelled", "length", "stop", "tool_calls", "max_turns")
    assert (reply.cancelled_by is None) == (reply.finish_reason != "cancelled")
    return _last_output(outcome) == 0


def _last_output(outcome: Outcome) -> int:
    if outcome.ends:
        return outcome.ends[-1][0].usage.output_tokens
    return len(outcome.total.steps) if outcome.total is not None else 0


def _check_ids(watched: Watched, ids: list[int], outcome: Outcome, talk: Talk) -> None:
    """The past is kept, what the model said stands there verbatim, and the numbers add up."""
    before, kept = watched.seen, common_tokens(watched.seen.ids, ids)
    replies = [reply for reply, _ in outcome.ends]
    if not replies and outcome.total is not None:
        replies = [outcome.total]
    reasons = [reply.usage.reuse_lost_reason for reply in replies]
    reason = next((item for item in reasons if item is not None), None)
    if kept < len(before.ids):
        gives_way = kept == len(before.ids) - 1
        gives_way = gives_way and (before.renders_again or before.ids[-1] == _odd_id(watched))
        assert gives_way or reason is not None or not replies, (
            f"{len(before.ids)} ids were cut to {kept} without a reason"
        )
    else:
        # Later turns of the same call may give up what the first ones brought.
        expected = "model_changed" if watched.lost and before.ids else None
        known = bool(outcome.ends) or (bool(reasons) and not before.renders_again)
        assert not known or reasons[0] == expected, f"{reasons}, but all ids were kept"
    past, processed = before.ids, before.processed_tokens
    for (reply, at_end), said in zip(outcome.ends, talk.turns, strict=False):
        usage = reply.usage
        if usage.output_tokens == 0:
            continue
        prompt = usage.prompt_tokens
        assert prompt + usage.output_tokens == len(at_end)
        # What rectify has left to process is not known but at the beginning.
        cached = min(processed, common_tokens(past, at_end), prompt - 1)
        known = past is before.ids or not _tail(watched)
        assert usage.cached_tokens == cached or not known, f"{usage}, {cached} expected"
        assert [record.position for record in reply.steps] == list(range(prompt, len(at_end)))
        assert [record.token_id for record in reply.steps] == at_end[prompt:]
        _check_output(at_end[prompt:], said, watched, reply, talk.disturbance)
        past, processed = at_end, len(at_end) - 1
    if outcome.total is not None:
        usage = outcome.total.usage
        assert usage.output_tokens == len(outcome.total.steps)
        assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens
    for text, (reply, _) in zip(outcome.texts, outcome.ends, strict=False):
        assert text == reply.text


def _given_up_to(processed_tokens: int, outcome: Outcome) -> int | None:
    """How many ids were kept, where a reply tells that processed ones were given up."""
    usages = [reply.usage for reply, _ in outcome.ends]
    cached = [usage.cached_tokens for usage in usages if usage.reuse_lost_reason is not None]
    return min((tokens for tokens in cached if tokens < processed_tokens), default=None)


def _odd_id(watched: Watched) -> int:
    return watched.plant.encode(watched.plant.odd_end)[0]


def _tail(watched: Watched) -> bool:
    return watched.config.mode == "slow_fast" and watched.config.slow_step == "rectify"


def _check_output(
    output: list[int], said: Said, watched: Watched, reply: Reply, disturbance: Disturbance
) -> None:
    if not said.scripted:
        return
    assert output == list(said.ids[: len(output)])
    limit = min(len(said.ids), watched.config.sampling.max_new_tokens)
    crowded = len(watched.session.token_ids) == CONTEXT_TOKENS
    assert len(output) == limit or not disturbance.harmless or crowded
    if len(output) == len(said.ids):
        assert reply.text == said.content


def _check_messages(watched: Watched, talk: Talk, added: Messages, committed: int) -> None:
    """Answers to what was open, the question, and the model's turns with results in between."""
    rest = iter(added)
    message = next(rest)
    for call in open_calls(watched.seen.messages) if message["role"] == "tool" else ():
        assert (message["role"], message["tool_call_id"]) == ("tool", call["id"])
        known = watched.seen.calls.get(call["id"])
        assert known is None or known.may_be_told(message["content"]), message["content"]
        message = next(rest)
    assert message == {"role": "user", "content": talk.question}
    assert added[0]["role"] == "tool" or not open_calls(watched.seen.messages) or watched.shortens
    for number in range(1, committed + 1):
        said, message = talk.turn(number), next(rest)
        assert message["role"] == "assistant"
        assert not said.scripted or said.content.startswith(message["content"].rstrip()), message
        if number == committed or not said.scripted:
            break
        assert message["content"] == said.content
        for expected, call in zip(said.calls, message["tool_calls"], strict=True):
            answer = next(rest)
            assert (answer["role"], answer["tool_call_id"]) == ("tool", call["id"])
            assert expected.answered_by(answer["content"]), answer["content"]
    # A model that speaks for itself may call tools that were not foreseen.
    open_ended = not talk.turn(committed).scripted
    assert next(rest, None) is None or open_ended


def _note_open_calls(watched: Watched, talk: Talk, committed: int, runs: int, last: Said) -> None:
    """Which calls of the last turn wait for an answer, and which functions ran for them.

    Args:
        last: The last turn, if it was written to its end.
    """
    calls = open_calls(watched.session.messages)
    earlier = [call for said in talk.turns[: committed - 1] for call in said.calls]
    left = runs - sum(call.runs for call in earlier)
    assert left >= 0, "a tool did not run"
    watched.calls = {}
    for known, call in zip(last.calls, calls, strict=bool(last.calls)):
        ran = known.runs and left > 0
        left -= ran
        watched.calls[call["id"]] = OpenCall(known, ran)
    assert left == 0, "a tool ran more than once, or for a call that was cut off"
