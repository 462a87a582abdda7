"""Several continuations of one session, taken together.

A message is rendered and processed once, in a fork that nobody sees; every branch is a fork of
that one, so that all of them read one history, and their turns share the model's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from sfi_agent.engine.batch import BatchDecoding
from sfi_agent.engine.decoder import DecodeMoves
from sfi_agent.engine.requests import BlockStep, DenseStep, FastStep, RefreshStep
from sfi_agent.session.arguments import at_least, one_each
from sfi_agent.session.batch import decode_batch
from sfi_agent.session.requests import TurnRequest
from sfi_agent.session.turn import BegunTurn
from sfi_agent.session.turn_moves import Errand, TurnMoves

if TYPE_CHECKING:
    from sfi_agent.session.session import Session
    from sfi_agent.session.user_input import UserInput

__all__ = ["branch_seeds", "grow_branches"]

SessionType = TypeVar("SessionType", bound="Session")

_SEEDS = 2**63


def branch_seeds(count: int, seeds: Sequence[int] | None, first: int) -> list[int]:
    """One seed per branch: those given, or the session's own and the ones behind it.

    Raises:
        InputError: `count` is no number of branches, or there are more or fewer seeds.
    """
    at_least("n", count, 1)
    if seeds is None:
        return [(first + index) % _SEEDS for index in range(count)]
    return one_each("seeds to branch", seeds, count, "branches")


def grow_branches(
    session: SessionType, seeds: Sequence[int], message: UserInput | None
) -> list[SessionType]:
    """See `Session.branch`."""
    branches: list[SessionType] = []
    configs = [session.config.replace(sampling={"seed": seed}) for seed in seeds]
    stem = session.fork()

    def cancel_all() -> None:
        for one in (stem, *branches):
            one.cancel()

    try:
        with session._cancelled.telling(cancel_all):
            begun = None if message is None else _begin(stem, message)
            branches.extend(map(stem.fork, configs))
            if stem._cancelled.is_set():
                cancel_all()
            if begun is None or message is None:
                chat = session._chat
                stops = chat.stop_ids if chat is not None else frozenset[int]()
                decode_batch(session.engine, branches, None, None, stops)
            else:
                _take_turns(branches, message, begun)
    except BaseException:
        for branch in branches:
            branch.close()
        raise
    finally:
        stem.close()
    return branches


def _begin(stem: Session, message: UserInput) -> BegunTurn:
    """Put the message's ids into a fork, and process what its own forks can share."""
    core, chat = stem._core, stem._chat_for("branch")
    plan = chat.plan(message)
    core.append(plan.new_ids, 1, plan.kept_tokens)
    before = core.processed_tokens
    core.prefill_ahead(stem._cancelled.is_set)
    return BegunTurn(plan, core.processed_tokens - before)


def _take_turns(branches: Sequence[Session], message: UserInput, begun: BegunTurn) -> None:
    """One turn of each branch, in the same steps where that pays."""
    request = TurnRequest.single("branch", message, None)
    with ExitStack() as held:
        decodings = []
        for branch in branches:
            lease = held.enter_context(branch._owner.held_for("branch"))
            turn = branch._moves(request, branch._spans(), lease, begun)
            decodings.append(held.enter_context(closing(_as_decoding(turn))))
            begun = replace(begun, prefilled_tokens=0)
        BatchDecoding(decodings, branches[0].engine.runner.execute).run()


def _as_decoding(turn: TurnMoves[None]) -> DecodeMoves:
    """The steps of a turn; its errands are run on the way, and nobody listens to its events."""
    answer: Any = None
    with closing(turn):
        while True:
            try:
                move = turn.send(answer)
            except StopIteration:
                return
            answer = None
            if isinstance(move, (DenseStep, FastStep, BlockStep, RefreshStep)):
                answer = yield move
            elif isinstance(move, Errand):
                answer = move.work()
