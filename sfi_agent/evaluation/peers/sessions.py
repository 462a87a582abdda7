"""Plays planned cases with sessions: one persistent history per policy, over all turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.evaluation.peers.exchange import ArmRun, PeerTurn, PlannedCase
from sfi_agent.evaluation.shared_prefill import shared_prefill_tokens

if TYPE_CHECKING:
    from sfi_agent.observe.trace import StepRecord
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["play_sessions", "read_tokens"]


def play_sessions(
    engine: Engine,
    policies: Mapping[str, SessionConfig],
    cases: Sequence[PlannedCase],
    progress: Callable[[str], None] | None = None,
) -> Iterator[ArmRun]:
    """Every policy on every case; a case's first prompt is prefilled once, then forked.

    Args:
        engine: The model.
        policies: By name.
        cases: What `CaseRenderer` made with this engine.
        progress: Called with a line for every finished policy and case.
    """
    for case in cases:
        prompt = _first_prefill(case)
        shared = max(1, shared_prefill_tokens(len(prompt), policies.values()))
        with engine.session(SessionConfig(mode="dense")) as base:
            base.decode(prompt[:shared], max_new_tokens=0)
            for name, config in policies.items():
                with base.fork(config) as session:
                    turns = tuple(_play(session, case, prompt[shared:]))
                if progress is not None:
                    progress(f"played {name} {case.name}")
                yield ArmRun(name, case.name, turns)


def _first_prefill(case: PlannedCase) -> list[int]:
    """What is prefilled densely at the start; the question is part of it in one protocol."""
    if case.protocol == "sparse_question":
        return list(case.context_ids)
    return [*case.context_ids, *case.turns[0].ids]


def _play(session: Session, case: PlannedCase, first: list[int]) -> Iterator[PeerTurn]:
    known = 0
    for index, turn in enumerate(case.turns):
        start = time.perf_counter()
        processed = session.stats.history_tokens if index else 0
        ids, given = _prompt(session, case, index, first)
        prompt_tokens = len(session.token_ids) + len(ids) + len(given)
        output = session.decode(
            ids,
            given_ids=given,
            max_new_tokens=turn.max_new_tokens,
            stop_ids=set(case.stop_ids),
        )
        steps = session.trace[-len(output) :]
        fed, new = prompt_tokens - processed, prompt_tokens - known
        yield PeerTurn(
            output_ids=tuple(output),
            prompt_tokens=prompt_tokens,
            new_prompt_tokens=new,
            fed_tokens=fed,
            fed_again_tokens=fed - new,
            read_tokens=read_tokens(session, steps),
            kept_tokens=session.stats.history_tokens,
            seconds=time.perf_counter() - start,
            decode_seconds=sum(step.seconds for step in steps if step.reason != "prefill"),
            dense_passes=sum(step.dense_passes for step in steps),
            drafted_tokens=sum(step.drafted_tokens for step in steps),
            accepted_tokens=sum(step.accepted_tokens for step in steps),
        )
        # The last token of an answer is pending: nobody has processed it yet.
        known = prompt_tokens + len(output) - 1


def _prompt(
    session: Session, case: PlannedCase, index: int, first: list[int]
) -> tuple[list[int], list[int]]:
    """The ids of a turn that are prefilled, and those that are decoded as given.

    With the question under the policy, later questions are too, as they come upon an evicted
    cache. Mode dense sees the same either way, and a prefill is quicker than steps.
    """
    sparse_question = case.protocol == "sparse_question"
    if index == 0:
        prefilled, question = first, list(case.turns[0].ids) if sparse_question else []
    else:
        ended = session.token_ids[-1] in case.stop_ids
        prefilled, question = [], [*(() if ended else case.closing_ids), *case.turns[index].ids]
    if sparse_question and session.config.mode == "slow_fast":
        return prefilled, question
    return prefilled + question, []


def read_tokens(session: Session, steps: Sequence[StepRecord]) -> float:
    """Tokens that these steps attended to: summed over steps, averaged over layers and KV heads.

    Fast steps whose token did not stand are counted: those that a retry replaced, and drafts that
    verification rejected. Layers with a sliding window read that much at most.

    Args:
        session: Whose steps they are.
        steps: Of one decoding, in order.
    """
    dense_layers = set(session.config.memory.dense_layers)
    windows = session.engine.shape.windows
    total = 0.0
    for step in steps:
        rejected = step.drafted_tokens - step.accepted_tokens
        fast_runs = (step.kind != "slow") + rejected
        for layer, window in enumerate(windows):
            history = step.position if window is None else min(window, step.position)
            reads_all = layer in dense_layers or window is not None
            total += step.dense_passes * history
            total += fast_runs * (history if reads_all else step.memory_tokens)
    return total / len(windows)
