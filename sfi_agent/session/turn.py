"""One assistant turn as moves, and the loop of turns and tools."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sfi_agent.engine.decoder import DecodeMoves
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.requests import StepOutcome, StepRequest
from sfi_agent.observe.log import log_event
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.cancellation import Cancellation
from sfi_agent.session.chat import Chat, TurnPlan
from sfi_agent.session.events import Step, ToolCall, TurnEnd
from sfi_agent.session.output.output_reader import OutputReader
from sfi_agent.session.output.text_stream import TextStream
from sfi_agent.session.overflow import Overflow, OverflowPolicy, ask_hook, checked_messages
from sfi_agent.session.ownership import Lease
from sfi_agent.session.past_moment import PastMoment
from sfi_agent.session.reply import Reply, Usage
from sfi_agent.session.telemetry.session_spans import EventSpan, SessionSpans
from sfi_agent.session.templates.volatile_prompt import warn_of_clocks
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.tool_use.tool_round import ToolRound
from sfi_agent.session.turn_moves import Errand, TurnMoves
from sfi_agent.session.turn_plan import warn_of_joined_calls
from sfi_agent.session.turn_report import log_reply, reply_of
from sfi_agent.session.user_input import UserInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sfi_agent.session.session import Session

__all__ = ["BegunTurn", "TurnRunner"]


@dataclass(frozen=True, slots=True)
class BegunTurn:
    """A turn whose ids are in the sequence already.

    Attributes:
        plan: What they are.
        prefilled_tokens: How many of them were processed for this turn; the others of a group of
            branches count them as cached.
    """

    plan: TurnPlan
    prefilled_tokens: int = 0


@dataclass(slots=True)
class TurnRunner:
    """Takes assistant turns of one chat, as moves that somebody drives (see `turn_moves.py`).

    Attributes:
        session: For those who are asked about an overflow.
        core: Ids and history.
        chat: Messages and tools.
        tokenizer: Turns ids into text.
        cancellation: Asked between steps and tools; ends the turn.
        lease: The right to work on the session; rests while tools run.
        overflow: What happens when a turn does not fit.
        spans: Of the call that the turns belong to.
        smallest_kept_tokens: How far back the ids of an earlier turn were given up; None before
            the first turn.
    """

    session: Session
    core: TokenCore
    chat: Chat
    tokenizer: PreTrainedTokenizerBase
    cancellation: Cancellation
    lease: Lease
    overflow: OverflowPolicy
    spans: SessionSpans
    smallest_kept_tokens: int | None = None

    def single(self, given: UserInput, begun: BegunTurn | None = None) -> TurnMoves[None]:
        """One assistant turn; runs no tool (`begun`: see `turn`)."""
        yield TurnEnd((yield from self.turn(given, begun)))

    def loop(self, given: UserInput, max_turns: int) -> TurnMoves[None]:
        """Turns and tools in alternation until the model answers without a call.

        Every turn ends with a `TurnEnd`; when the turn limit is reached with calls left, the last
        one's finish reason is "max_turns" and the calls are not run. Cancelled while tools run, it
        ends with an empty turn.
        """
        with self.spans.run(max_turns) as span:
            for turn in range(1, max_turns + 1):
                reply = yield from self.turn(given)
                if reply.finish_reason == "tool_calls" and turn == max_turns:
                    reply = replace(reply, finish_reason="max_turns")
                span.see(TurnEnd(reply))
                yield TurnEnd(reply)
                if reply.finish_reason != "tool_calls":
                    return
                given = yield from self._tool_results(reply.tool_calls)
                if (by := self.cancellation.by) is not None:
                    reply = Reply("", finish_reason="cancelled", cancelled_by=by)
                    span.see(TurnEnd(reply))
                    yield TurnEnd(reply)
                    return

    def turn(self, given: UserInput, begun: BegunTurn | None = None) -> TurnMoves[Reply]:
        """One assistant turn, whose reply is for the caller to tell.

        Args:
            given: The messages.
            begun: What has been done of the turn already.

        Raises:
            InputError: The messages are unusable; nothing has changed.
            ContextOverflowError: They do not fit the model's context; nothing has changed.
            TemplateError: The template cannot render them; nothing has changed.
        """
        with self.spans.turn(given) as span:
            reply = yield from self._turn(given, begun, span)
            span.see(TurnEnd(reply))
            return reply

    def _turn(self, given: UserInput, begun: BegunTurn | None, span: EventSpan) -> TurnMoves[Reply]:
        started = time.perf_counter()
        plan: TurnPlan = begun.plan if begun else (yield Errand(partial(self._plan, given)))
        past = PastMoment.of(self.core, self.chat)
        limits = self._begin(plan, append=begun is None)
        prompt_tokens, cached = len(self.core.ids), self.core.processed_tokens
        cached -= begun.prefilled_tokens if begun else 0
        reader, records = self.chat.reader(plan), list[StepRecord]()
        try:
            yield from self._answer(limits, reader, records, span)
        finally:
            # Also when the caller stops listening or a step raises: what was generated stays.
            if records:
                self.chat.end([record.token_id for record in records], reader.parsed)
                self._note_cut(plan.kept_tokens)
            else:
                past.restore(self.core, self.chat, plan.kept_tokens)
        usage = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
            prefilled_tokens=prompt_tokens - cached,
            output_tokens=len(records),
            reasoning_tokens=reader.parsed.reasoning_tokens,
            reuse_lost_reason=plan.reuse_lost_reason,
        )
        reply = reply_of(reader.parsed, usage, records, self.chat.stop_ids, self.cancellation.by)
        seconds = time.perf_counter() - started
        log_reply(self.core.id, self.session._turns, reply, plan.detail, seconds)
        self.session._last_reply = reply
        return reply

    def _answer(
        self,
        limits: DecodeLimits,
        reader: OutputReader,
        records: list[StepRecord],
        span: EventSpan,
    ) -> TurnMoves[None]:
        """Decode; reader and records know of every kept token, however it ends."""
        stream = TextStream(self.tokenizer)
        outcome: StepOutcome | None = None
        finished = False
        try:
            with closing(self.core.moves(limits, records)) as moves:
                while (move := _next(moves, outcome)) is not None:
                    outcome = None
                    if isinstance(move, StepRecord):
                        text = stream.push(move.token_id)
                        events = reader.feed(move.token_id, text)
                        step = Step(move, move.token_id, text)
                        span.see(step)
                        yield step
                        yield from events
                    else:
                        outcome = yield move
            yield from reader.feed_text(stream.finish())
            yield from reader.finish()
            finished = True
        finally:
            if not finished:
                reader.feed_text(stream.finish())
                reader.finish()

    def _tool_results(self, calls: Sequence[ToolCall]) -> TurnMoves[list[dict[str, Any]]]:
        """Have calls run; their results as messages, in the order of the calls."""
        work = ToolRound(calls, self.chat.note_result)
        # The next turn's plan ends the rest: waiting for those who look is no work for here.
        self.lease.rest()
        try:
            yield work
        finally:
            work.close()
        return self.chat.result_messages(work.results)

    def _plan(self, given: UserInput) -> TurnPlan:
        """What the messages do to the ids, shortened where they do not fit and a hook says how."""
        self.lease.resume()
        plan = self.chat.plan(given)
        limit = self.core.engine.shape.context_limit_tokens
        # An answer that could fill the whole context would never have the room it may take.
        room = min(self.core.config.sampling.max_new_tokens, limit // 2)
        needed = plan.kept_tokens + len(plan.new_ids) + room
        if isinstance(self.overflow, str) or needed <= limit:
            return plan
        whole = (*self.chat.transcript.messages, *plan.messages)
        overflow = Overflow(
            needed,
            limit,
            deepcopy(whole),
            self.session,
            lambda kept: self.chat.tokens_of(kept) + room,
        )
        self.lease.rest()
        try:
            answer = ask_hook(self.overflow, overflow)
        finally:
            self.lease.resume()
        messages = checked_messages(answer, whole)
        return plan if messages == whole else self.chat.plan_anew(messages)

    def _begin(self, plan: TurnPlan, *, append: bool) -> DecodeLimits:
        """Put the plan's ids into the sequence and say how far the model may go."""
        wanted = self.core.config.sampling.max_new_tokens
        limit = self.core.engine.shape.context_limit_tokens
        room = max(1, min(wanted, limit - plan.kept_tokens - len(plan.new_ids)))
        if append:
            self.core.append(plan.new_ids, 1, plan.kept_tokens)
        self.chat.begin(plan)
        warn_of_clocks(self.core.id, plan.clocks)
        warn_of_joined_calls(self.core.id, plan)
        self.session._turns += 1
        if room < wanted:
            log_event(
                "warning",
                "context_nearly_full",
                session=self.core.id,
                max_new_tokens=wanted,
                room_tokens=room,
                limit_tokens=limit,
            )
        return DecodeLimits(room, self.chat.stop_ids, cancelled=self.cancellation.is_set)

    def _note_cut(self, kept_tokens: int) -> None:
        earlier = self.smallest_kept_tokens
        self.smallest_kept_tokens = kept_tokens if earlier is None else min(earlier, kept_tokens)


def _next(moves: DecodeMoves, outcome: StepOutcome | None) -> StepRequest | StepRecord | None:
    """The next move of a decoding; None when it is over."""
    try:
        return moves.send(outcome)
    except StopIteration:
        return None
