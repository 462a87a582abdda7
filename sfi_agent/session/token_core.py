"""The token level of a session: ids, history and trace. It knows nothing of messages and tools."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

from sfi_agent.config import SessionConfig
from sfi_agent.engine.decoder import DecodeMoves
from sfi_agent.engine.decoding_state import DecodeLimits, DecodingState
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.parked_buffers import Place
from sfi_agent.engine.requests import StepOutcome
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.engine.token_watch import TokenWatch
from sfi_agent.errors import NothingPendingError, SessionStateError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.ownership import Ownership
from sfi_agent.session.policy_parts import empty_sequence, make_decoder
from sfi_agent.session.settled_history import settled_tokens
from sfi_agent.session.stats import SessionStats
from sfi_agent.session.store.lineage import Lineage
from sfi_agent.session.token_checks import check_pending, check_room, checked_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sfi_agent.session.engine import Engine

__all__ = ["TokenCore"]


class TokenCore:
    """Ids, history and policy of one session.

    Opening switches the model's attention to ours, closing (or losing the last reference) gives
    it back.

    Args:
        engine: Model, tokenizer and runner.
        config: The policy.

    Attributes:
        lineage: Where the session was saved or loaded, and how much of that still holds.
        make_watch: Makes the watch of a decoding from the trace; None where nobody watches.
        owner: Who works on the session.
        parked: Where the history is while the session is parked (see `ParkingLot`); None otherwise.
        last_used: When work on the session last began, in seconds of the monotonic clock.
    """

    def __init__(self, engine: Engine, config: SessionConfig) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.engine = engine
        self.config = config
        self.trace: list[StepRecord] = []
        self.status: Literal["new", "open", "closed"] = "new"
        self.lineage = Lineage()
        self.owner = Ownership()
        self.parked: Place | None = None
        self.last_used = 0.0
        self.make_watch: Callable[[Sequence[StepRecord]], TokenWatch] | None = None
        self._decoder = make_decoder(engine, config)
        self._state: DecodingState | None = None
        self._release: weakref.finalize[[PreTrainedModel], TokenCore] | None = None

    @property
    def ids(self) -> list[int]:
        return self._state.ids if self._state is not None else []

    @property
    def sequence(self) -> SequenceState | None:
        """Keys and values, wherever they are; None unless the session is open."""
        return self._state.sequence if self._state is not None else None

    @property
    def runner(self) -> Runner:
        """Executes what the decodings ask for."""
        return self._decoder.runner

    @property
    def processed_tokens(self) -> int:
        return self._state.sequence.processed_tokens if self._state is not None else 0

    def open(self) -> None:
        """Make the session usable; opening twice is fine.

        Raises:
            SessionStateError: It was closed.
        """
        if self.status == "closed":
            raise SessionStateError(
                explain(
                    "used a session that is closed",
                    remedy="its history was freed by close() or the end of its with block; "
                    "open a new one with engine.session(...)",
                )
            )
        if self.status == "new":
            model = self.engine.model
            AttentionSwitch.of(model).acquire(model)
            self._release = weakref.finalize(self, _release, model)
            # At interpreter exit there is nobody left to give the model back to.
            self._release.atexit = False
            self._state = DecodingState([], empty_sequence(self.engine, self.config))
            self.status = "open"
            self.engine.parking.register(self)

    def close(self) -> None:
        """Free the history and give the model's attention back; closing twice is fine."""
        self._state = None
        self.status = "closed"
        if self._release is not None:
            self._release()

    def append(
        self, ids: Sequence[int], room_tokens: int, kept_tokens: int | None = None
    ) -> list[int]:
        """Put ids behind the present ones, to be processed by the next decoding.

        Args:
            ids: Raw token ids, possibly none.
            room_tokens: Tokens that must still fit behind them.
            kept_tokens: How many of the present ids stay; None keeps all. The history of the
                others is forgotten.

        Returns:
            The new ids as plain integers.

        Raises:
            InputError: An id is not an integer of the vocabulary.
            NothingPendingError: Nothing would be there to process.
            ContextOverflowError: The model's context would not hold them.
        """
        state = self._opened()
        kept = len(state.ids) if kept_tokens is None else kept_tokens
        checked = self.check(ids, room_tokens, kept)
        self.engine.parking.begin(self)
        if kept < len(state.ids):
            self.forget(kept)
        state.ids.extend(checked)
        return checked

    def check(
        self, ids: Sequence[int], room_tokens: int, kept_tokens: int | None = None
    ) -> list[int]:
        """What `append` would refuse, without changing anything; the ids as plain integers."""
        kept = len(self._opened().ids) if kept_tokens is None else kept_tokens
        checked = checked_ids(ids, self.engine.shape.vocabulary_size)
        if not checked:
            check_pending(kept, self.processed_tokens)
        check_room(kept, len(checked), room_tokens, self.engine.shape.context_limit_tokens)
        return checked

    def forget(self, kept_tokens: int) -> None:
        """Keep the first ids with all of their history, and their records."""
        self._opened().keep(kept_tokens)
        self.lineage.note_cut(kept_tokens)
        while self.trace and self.trace[-1].position >= kept_tokens:
            self.trace.pop()

    def steps(self, limits: DecodeLimits) -> Iterator[StepRecord]:
        """Decode until a limit; every record is in the trace when it is yielded."""
        for record in self._decoder.decode(self._opened(), self._watched(limits)):
            self._note(record)
            yield record

    def moves(self, limits: DecodeLimits, records: list[StepRecord]) -> DecodeMoves:
        """The same decoding for a batch: see `Decoder.moves`; `records` is filled on the way."""
        moves = self._decoder.moves(self._opened(), self._watched(limits))
        outcome: StepOutcome | None = None
        try:
            while True:
                move = moves.send(outcome)
                if isinstance(move, StepRecord):
                    self._note(move)
                    records.append(move)
                outcome = yield move
        except StopIteration:
            return
        finally:
            moves.close()

    def _watched(self, limits: DecodeLimits) -> DecodeLimits:
        if self.make_watch is None:
            return limits
        return replace(limits, watch=self.make_watch(self.trace))

    def _note(self, record: StepRecord) -> None:
        self.trace.append(record)
        if record.kind != "fast" and self.config.mode == "slow_fast":
            log_event("debug", "slow_step", session=self.id, **asdict(record))

    def attach(self, instruments: Instruments) -> None:
        """See `Instruments`."""
        self._decoder.attach(instruments)

    def checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids that are to be decoded as given, as plain integers.

        Raises:
            InputError: An id is not an integer of the vocabulary.
        """
        return tuple(checked_ids(ids, self.engine.shape.vocabulary_size))

    def prefill(self) -> None:
        """Process all ids but the last, which stays pending."""
        self._process(self._opened().unprocessed[:-1])

    def prefill_ahead(self, cancelled: Callable[[], bool]) -> None:
        """Process what forks would otherwise process each for themselves, and leave their decodings
        what they need to begin as if nothing had been: the tokens whose queries are evidence.

        Args:
            cancelled: Asked between chunks; true ends it.
        """
        state, rows = self._opened(), self.config.refresh.prefill_evidence_queries
        ahead = len(state.unprocessed) - (rows if self.config.mode == "slow_fast" else 1)
        if ahead > 0:
            before = self.processed_tokens
            self._process(state.unprocessed[:ahead], cancelled)
            state.processed_ahead = self.processed_tokens - before

    def next_logits(self) -> Tensor:
        """What the next token would be drawn from: float32 `[vocabulary]` on the CPU.

        Raises:
            NothingPendingError: No unprocessed id is there to draw behind.
        """
        state = self._opened()
        if not state.unprocessed:
            raise NothingPendingError(
                explain("asked for next logits", got="no pending token", remedy="decode ids first")
            )
        return self._decoder.next_logits(state).cpu()

    def history_at(self, tokens: int) -> int:
        """How much history the session has, had it ended behind its first `tokens` ids."""
        if tokens == len(self.ids):
            return self.processed_tokens
        rectifies = self.config.slow_step == "rectify"
        return settled_tokens(self.trace, tokens) if rectifies else max(0, tokens - 1)

    def cut(self, tokens: int, history_tokens: int) -> None:
        """Keep the first `tokens` ids with their records, and no more history than that of
        `history_tokens` of them; the last id is pending."""
        state = self._opened()
        self.forget(tokens)
        kept = min(state.sequence.processed_tokens, history_tokens, max(0, tokens - 1))
        state.sequence.cut(kept)
        self.lineage.note_cut(kept)

    def fork(self, config: SessionConfig) -> TokenCore:
        """An open core over the same ids; the history is shared, not copied."""
        state = self._opened()
        child = TokenCore(self.engine, config)
        with child.owner.held_for("fork"):  # Nobody parks it before it is whole.
            child.open()
            assert child._state is not None
            child._state.ids.extend(state.ids)
            child._state.prompt_start = state.prompt_start
            child._state.processed_ahead = state.processed_ahead
            state.sequence.share_history_with(child._state.sequence)
        child.trace = list(self.trace)
        child.lineage = self.lineage.copy()
        return child

    def stats(self) -> SessionStats:
        """See `SessionStats`."""
        sequence = self._state.sequence if self._state is not None else None
        return SessionStats.of(
            self.trace,
            history_tokens=self.processed_tokens,
            history_bytes=sequence.history_bytes if sequence else 0,
            memory_bytes=sequence.memory_bytes if sequence else 0,
        )

    def renew_sequence(self) -> None:
        """Put the history into a fresh state, without memories and unknown to captured steps."""
        state = self._opened()
        fresh = empty_sequence(self.engine, self.config)
        state.sequence.move_history_to(fresh)
        state.sequence = fresh

    def _process(self, ids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> None:
        state, size = self._opened(), self.runner.prefill_chunk_tokens
        for start in range(0, len(ids), size):
            if cancelled():
                return
            # Chunk by chunk: other sessions take their steps in between.
            self.runner.process(state.sequence, ids[start : start + size])

    def state(self) -> DecodingState:
        """Ids, keys and values as they are between decodings, for those who save and load."""
        return self._opened()

    def _opened(self) -> DecodingState:
        self.open()
        assert self._state is not None
        if self.parked is not None:
            self.engine.parking.begin(self)
        return self._state


def _release(model: PreTrainedModel) -> None:
    AttentionSwitch.of(model).release(model)
