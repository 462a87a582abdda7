"""One assistant turn as events, and the loop of turns and tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.observe.log import log_event
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.chat import Chat, TurnPlan
from sfi_agent.session.events import Event, Step, TurnEnd
from sfi_agent.session.output_reader import OutputReader
from sfi_agent.session.reply import FinishReason, Reply, Usage
from sfi_agent.session.text_stream import TextStream
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.transcript import Transcript
from sfi_agent.session.user_input import UserInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TurnRunner"]


class TurnRunner:
    """Decodes assistant turns of one chat.

    Args:
        core: Ids and history.
        chat: Messages and tools.
        tokenizer: Turns ids into text.
        cancelled: Asked between steps and tools; true ends the turn.

    Attributes:
        smallest_kept_tokens: How far back the ids of an earlier turn were given up; None before
            the first turn.
    """

    def __init__(
        self,
        core: TokenCore,
        chat: Chat,
        tokenizer: PreTrainedTokenizerBase,
        cancelled: Callable[[], bool],
    ) -> None:
        self._core = core
        self._chat = chat
        self._tokenizer = tokenizer
        self._cancelled = cancelled
        self._turns = 0
        self.smallest_kept_tokens: int | None = None

    def turn(self, given: UserInput) -> Iterator[Event]:
        """One assistant turn; runs no tool. The last event is `TurnEnd`.

        Raises:
            InputError: The messages are unusable; nothing has changed.
            ContextOverflowError: They do not fit the model's context; nothing has changed.
            TemplateError: The template cannot render them; nothing has changed.
        """
        plan, past = self._chat.plan(given), self._chat.transcript.copy()
        past_trace = tuple(self._core.trace)
        started = time.perf_counter()
        limits = self._begin(plan)
        prompt_tokens, cached = len(self._core.ids), self._core.processed_tokens
        reader, stream = self._chat.reader(plan), TextStream(self._tokenizer)
        records: list[StepRecord] = []
        finished = False
        try:
            for record in self._core.steps(limits):
                records.append(record)
                text = stream.push(record.token_id)
                yield Step(record, record.token_id, text)
                yield from reader.feed(record.token_id, text)
            yield from reader.feed_text(stream.finish())
            yield from reader.finish()
            finished = True
        finally:
            # Also when the caller stops listening or a step raises: what was generated stays.
            if not finished:
                reader.feed_text(stream.finish())
                reader.finish()
            if records:
                self._chat.end([record.token_id for record in records], reader.parsed)
                self._note_cut(plan.kept_tokens)
            else:
                self._take_back(plan, past, past_trace)
        usage = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
            prefilled_tokens=prompt_tokens - cached,
            output_tokens=len(records),
            reasoning_tokens=reader.parsed.reasoning_tokens,
            reuse_lost_reason=plan.reuse_lost_reason,
        )
        reply = _reply(reader, usage, self._finish_reason(records, reader), records)
        self._log(reply, plan, time.perf_counter() - started)
        yield TurnEnd(reply)

    def loop(self, given: UserInput, max_turns: int) -> Iterator[Event]:
        """Turns and tools in alternation until the model answers without a call.

        Every turn ends with a `TurnEnd`; when the turn limit is reached with calls left, the last
        one's finish reason is "max_turns" and the calls are not run.
        """
        for turn in range(1, max_turns + 1):
            reply: Reply | None = None
            for event in self.turn(given):
                if isinstance(event, TurnEnd):
                    reply = event.reply
                else:
                    yield event
            assert reply is not None
            if reply.finish_reason == "tool_calls" and turn == max_turns:
                reply = replace(reply, finish_reason="max_turns")
            yield TurnEnd(reply)
            if reply.finish_reason != "tool_calls":
                return
            results = []
            for call in reply.tool_calls:
                if self._cancelled():
                    return
                result = self._chat.tools.run(call)
                self._chat.note_result(result)
                results.append(result)
                yield result
            if self._cancelled():
                return
            given = self._chat.result_messages(results)

    def _begin(self, plan: TurnPlan) -> DecodeLimits:
        """Put the plan's ids into the sequence and say how far the model may go."""
        wanted = self._core.config.sampling.max_new_tokens
        limit = self._core.engine.shape.context_limit_tokens
        room = max(1, min(wanted, limit - plan.kept_tokens - len(plan.new_ids)))
        self._core.append(plan.new_ids, 1, plan.kept_tokens)
        self._chat.begin(plan)
        self._turns += 1
        if room < wanted:
            log_event(
                "warning",
                "context_nearly_full",
                session=self._core.id,
                max_new_tokens=wanted,
                room_tokens=room,
                limit_tokens=limit,
            )
        return DecodeLimits(room, self._chat.stop_ids, cancelled=self._cancelled)

    def _take_back(
        self, plan: TurnPlan, past: Transcript, past_trace: Sequence[StepRecord]
    ) -> None:
        """Failed or cancelled in the prefill: as if the message had not been sent.

        Ids that the turn had given up come back, to be processed again by the next one.
        """
        core = self._core
        # Cut, not forgotten: the prefill has processed what was pending before.
        core.cut(plan.kept_tokens)
        given_up = past.token_ids[plan.kept_tokens :]
        if given_up:
            core.append(given_up, 0)
            core.trace.extend(past_trace[len(core.trace) :])
        self._chat.transcript = past

    def _note_cut(self, kept_tokens: int) -> None:
        earlier = self.smallest_kept_tokens
        self.smallest_kept_tokens = kept_tokens if earlier is None else min(earlier, kept_tokens)

    def _finish_reason(self, records: list[StepRecord], reader: OutputReader) -> FinishReason:
        if not records or records[-1].token_id not in self._chat.stop_ids:
            return "cancelled" if self._cancelled() else "length"
        return "tool_calls" if reader.parsed.calls else "stop"

    def _log(self, reply: Reply, plan: TurnPlan, seconds: float) -> None:
        usage, kinds = reply.usage, [record.kind for record in reply.steps]
        log_event(
            "info",
            "turn_finished",
            session=self._core.id,
            turn=self._turns,
            finish_reason=reply.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            prefilled_tokens=usage.prefilled_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            reuse_lost_reason=usage.reuse_lost_reason,
            reuse_lost_detail=plan.detail or None,
            fast_tokens=kinds.count("fast"),
            slow_tokens=kinds.count("slow"),
            retry_tokens=kinds.count("retry"),
            seconds=round(seconds, 6),
        )


def _reply(
    reader: OutputReader, usage: Usage, reason: FinishReason, records: list[StepRecord]
) -> Reply:
    parsed = reader.parsed
    return Reply(parsed.text, parsed.calls, parsed.reasoning, usage, reason, tuple(records))
