"""A session beside plain data that says what it must be, and the checks of the one by the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Session, SessionConfig, StepRecord
from sfi_agent.engine.instruments import Instruments
from sfi_agent.session.marks import Mark
from tests.reference import Refresh, VisibilityRules
from tests.test_guarantees.play import close, rules_of
from tests.test_soak.plants import CONTEXT_TOKENS, Plant
from tests.test_soak.policies import follows_dense, predicts_tokens
from tests.test_soak.replay import FastRow, drawn_as_expected, expected_logits, new_fast_rows
from tests.test_soak.speech import Call
from tests.test_soak.voice import call_tags, inside_call

__all__ = [
    "NOTHING",
    "Moment",
    "OpenCall",
    "SetMark",
    "Watched",
    "common_tokens",
    "generated_from",
    "open_calls",
]

NOTHING = range(0)
_NOT_RUN = "not run"


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def generated_from(trace: Sequence[StepRecord], total: int) -> int:
    """Where the run of generated ids begins that ends at `total`."""
    start = total
    for record in reversed(trace):
        if record.position < start:
            if record.position != start - 1:
                break
            start -= 1
    return start


def open_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of the last message that nothing has answered."""
    return list(messages[-1].get("tool_calls", ())) if messages else []


@dataclass(frozen=True)
class OpenCall:
    """A call that waits for an answer.

    Attributes:
        call: What the model wrote.
        ran: Whether its function was run.
    """

    call: Call
    ran: bool

    def may_be_told(self, content: str) -> bool:
        """Whether the next message may tell the model so: what ran is told as it went."""
        if self.ran:
            return self.call.answered_by(content)
        return _NOT_RUN in content or not self.call.runs


@dataclass(frozen=True, eq=False)
class Moment:
    """What could be seen of a session at one time.

    Attributes:
        ids: All ids.
        messages: The conversation.
        trace: All records.
        processed_tokens: Length of the history.
        calls: What is known of calls that wait for an answer, by id.
        renders_again: Whether the next message may make the session render all again, and give up
            ids.
        complete: Whether no prompt is cut inside.
    """

    ids: list[int]
    messages: list[dict[str, Any]]
    trace: list[StepRecord]
    processed_tokens: int
    calls: dict[str, OpenCall]
    renders_again: bool
    complete: bool


@dataclass(eq=False)
class SetMark:
    """A mark, and what a rewind to it must bring back.

    Attributes:
        mark: Of the session.
        tokens: Ids before it.
        moment: When it was set, where it stands at the end of all ids; None inside.
        valid: Whether it still points at what it was set on.
    """

    mark: Mark
    tokens: int
    moment: Moment | None
    valid: bool = True


@dataclass(eq=False)
class Watched:
    """See the module text.

    Attributes:
        session: The session.
        plant: What it runs on.
        tools: Whether it has tools.
        talks: Whether messages are sent to it, and not only ids.
        shortens: Whether it drops old turns where a message does not fit.
        fast_rows: Positions whose keys and values fast steps left behind.
        marks: In the order they were set.
        calls: See `Moment`.
        backlog: Whether more than the policy's own tail may be left to process.
        lost: Whether its saved history could not be used, and the next turn has to say so.
        odd_from: Where the first ids stand that the template would not write for their messages,
            such as an answer cut short; None where there are none.
        raw_from: Where the first ids stand that no message brought; None where there are none.
        places: By saving place, which save the session knows there.
        logits: The next logits when they were last looked at; None without ids.
        given_up_to: How many ids the call under way kept of those it found; None if all, or if
            that is seen from the ids.
        refreshes: Of the call under way.
    """

    session: Session
    plant: Plant
    tools: bool
    talks: bool
    shortens: bool = False
    fast_rows: dict[int, FastRow] = field(default_factory=dict)
    marks: list[SetMark] = field(default_factory=list)
    calls: dict[str, OpenCall] = field(default_factory=dict)
    backlog: bool = False
    lost: bool = False
    odd_from: int | None = None
    raw_from: int | None = None
    places: dict[int, int] = field(default_factory=dict)
    logits: Tensor | None = None
    given_up_to: int | None = None
    refreshes: list[Refresh] = field(default_factory=list)
    _seen: Moment | None = None

    def __post_init__(self) -> None:
        log = self.refreshes
        self.session.attach(
            Instruments(on_refresh=lambda tokens, chosen: log.append(Refresh(tokens, chosen)))
        )
        self._seen = self.moment()

    @property
    def config(self) -> SessionConfig:
        return self.session.config

    @property
    def rules(self) -> VisibilityRules:
        return rules_of(self.plant.engine, self.config)

    @property
    def tokens(self) -> int:
        return len(self.session.token_ids)

    @property
    def seen(self) -> Moment:
        """The session after the last operation on it."""
        assert self._seen is not None
        return self._seen

    @property
    def holds_raw_ids(self) -> bool:
        """Whether ids that no message brought are in the way of messages."""
        return any(span.kind == "raw" for span in self._spans)

    @property
    def _spans(self) -> Sequence[Any]:
        assert self.session._chat is not None
        return self.session._chat.transcript.spans

    def moment(self) -> Moment:
        session, spans = self.session, self._spans
        drops = self.config.history.reasoning == "template" or self.shortens
        drops = drops or not self.plant.setting.appends
        return Moment(
            session.token_ids,
            session.messages,
            session.trace,
            session.stats.history_tokens,
            dict(self.calls),
            drops or (bool(spans) and spans[-1].kind != "output"),
            not spans or spans[-1].complete,
        )

    def settle(self, drawn: range = NOTHING) -> None:
        """An operation is over: compare everything with what it must be.

        Args:
            drawn: Positions of tokens that nobody scripted.
        """
        before, now = self.seen, self.moment()
        self._note_rows(before, now)
        self._note_cut(before, now)
        self._check_counts(now)
        self._check_chat(now)
        self.logits = self.session.next_logits() if now.ids else None
        if self.logits is not None:
            expected = expected_logits(self.plant.twin, now.ids, self.fast_rows, self.rules)
            assert close(self.logits, expected[-1]), "the next logits are not those of the ids"
            if predicts_tokens(self.config):
                drawn_as_expected(now.ids, drawn, expected, self.config)
        assert len(self.session.token_ids) == len(now.ids), "a look at the logits changed the ids"
        # A conversation that was shortened may have been as long as can be before.
        self.plant.memory.note(self.session, CONTEXT_TOKENS if self.shortens else 0)
        self._seen = now

    def check_untouched(self) -> None:
        """What happened to other sessions changed no bit of this one."""
        before, now = self.seen, self.moment()
        assert before.ids == now.ids and before.trace == now.trace
        assert before.messages == now.messages
        assert before.processed_tokens == now.processed_tokens
        if self.logits is not None:
            assert torch.equal(self.session.next_logits(), self.logits)

    def set_mark(self, tokens: int) -> SetMark:
        """Set a mark and remember what a rewind to it must bring back."""
        at_end = tokens == self.tokens
        mark = self.session.mark(None if at_end else tokens)
        assert mark.token_count == tokens
        moment = self.moment()
        self.marks.append(SetMark(mark, tokens, moment if at_end and moment.complete else None))
        return self.marks[-1]

    def branch(self, session: Session) -> Watched:
        """The same past in another session."""
        child = Watched(
            session,
            self.plant,
            self.tools,
            self.talks,
            self.shortens,
            fast_rows=dict(self.fast_rows),
            calls=dict(self.calls),
            # A tail that rectify left is a backlog to any other policy.
            backlog=self.backlog or self.tokens > self.seen.processed_tokens + 1,
            lost=self.lost,
            odd_from=self.odd_from,
            raw_from=self.raw_from,
            places=dict(self.places),
        )
        before, now = self.seen, child.seen
        assert (before.ids, before.messages, before.trace) == (now.ids, now.messages, now.trace)
        return child

    def _note_rows(self, before: Moment, now: Moment) -> None:
        """Which rows fast steps processed, from what the trace has in addition."""
        kept = 0
        for one, other in zip(before.trace, now.trace, strict=False):
            if one != other:
                break
            kept += 1
        records, refreshes = now.trace[kept:], list(self.refreshes)
        self.refreshes.clear()
        # Rows that were cut off and processed again, by a prefill, are dense now.
        limit = min(common_tokens(before.ids, now.ids), now.processed_tokens)
        if records:
            limit = min(limit, records[0].position - 1)
        # And so are those of an answer that was given up, though the same ids may have come again.
        # Of an answer that stays, the last record goes where its stop token gives way.
        chosen = {record.position for record in now.trace}
        self.fast_rows = {
            row: fast
            for row, fast in self.fast_rows.items()
            if row < limit and not chosen.isdisjoint((row, row + 1))
        }
        if not follows_dense(self.config):
            self.fast_rows |= new_fast_rows(
                self.rules, records, refreshes, now.processed_tokens, partial(self._exact, now)
            )

    def _exact(self, now: Moment, position: int) -> bool:
        """Whether the token of a position belonged to a call that had to be exact."""
        if self.config.tools.decode_calls != "exact":
            return False
        start = generated_from(now.trace, position)
        return inside_call(now.ids[start:position], call_tags(self.session))

    def _note_cut(self, before: Moment, now: Moment) -> None:
        """Marks behind ids that were given up are no longer valid."""
        kept = common_tokens(before.ids, now.ids)
        if self.given_up_to is not None:
            # The same ids may have come again behind those that were kept.
            kept, self.given_up_to = min(kept, self.given_up_to), None
        for item in self.marks:
            item.valid = item.valid and item.tokens <= kept
        if self.odd_from is not None and len(now.ids) <= self.odd_from:
            self.odd_from = None
        if self.raw_from is not None and len(now.ids) <= self.raw_from:
            self.raw_from = None

    def _check_counts(self, now: Moment) -> None:
        """Ids, trace, history and numbers agree with each other."""
        ids, stats = now.ids, self.session.stats
        positions = [record.position for record in now.trace]
        assert positions == sorted(set(positions))
        assert all(ids[record.position] == record.token_id for record in now.trace)
        kinds = [record.kind for record in now.trace]
        assert (stats.generated_tokens, stats.fast_tokens) == (len(kinds), kinds.count("fast"))
        if not ids:
            assert now.processed_tokens == 0
            return
        left = len(ids) - now.processed_tokens
        assert left >= 1
        if not self.backlog:
            tail = self.config.refresh.max_segment_tokens
            rectifies = self.config.mode == "slow_fast" and self.config.slow_step == "rectify"
            assert left <= (tail + 1 if rectifies else 1), f"{left} ids are not processed"

    def _check_chat(self, now: Moment) -> None:
        """Spans cover the ids, and every call is answered before anybody else speaks."""
        chat = self.session._chat
        assert chat is not None
        assert list(chat.transcript.token_ids) == now.ids
        edges = [0, *(span.end for span in self._spans)]
        assert edges[:-1] == [span.start for span in self._spans]
        assert self.raw_from is None or self.holds_raw_ids
        waiting: list[str] = []
        for message in now.messages:
            if message["role"] == "tool":
                assert waiting.pop(0) == message["tool_call_id"]
                continue
            assert not waiting, f"{message['role']} speaks while calls wait"
            waiting = [call["id"] for call in message.get("tool_calls", ())]
