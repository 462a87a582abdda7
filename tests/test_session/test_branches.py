"""Branches are what forks with these seeds would have said, and the session stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfi_agent import (
    ContextOverflowError,
    Engine,
    InputError,
    NothingPendingError,
    SessionBusy,
    SessionConfig,
    TemplateError,
)
from tests.families import model_of
from tests.test_guarantees.policies import few
from tests.test_guarantees.test_bad_input import refuse_to_compute
from tests.test_session.conversations import chat_engine, policy, require_whole

SLOW_STEPS = ("observe", "rectify", "verify")
modes = st.one_of(
    st.just({"mode": "dense"}),
    st.builds(lambda kind: {"slow_step": kind}, st.sampled_from(SLOW_STEPS)),
)
messages = st.text("abc de.\n", min_size=1, max_size=120)


def sampled(choice: dict[str, Any], seed: int = 0, temperature: float = 1.0) -> SessionConfig:
    sampling = {"temperature": temperature, "seed": seed, "max_new_tokens": 12}
    return policy(**choice, sampling=sampling)


@few(12)
@given(choice=modes, first=messages, second=messages, seed=st.integers(0, 2**63 - 1))
def test_a_branch_says_what_a_fork_would_have_said(
    choice: dict[str, Any], first: str, second: str, seed: int
) -> None:
    engine = chat_engine()
    with engine.session(sampled(choice, seed), system="Be brief.") as session:
        session.send(first)
        ids, messages = session.token_ids, session.messages
        branches = session.branch(3, second)
        assert session.token_ids == ids and session.messages == messages
        for index, branch in enumerate(branches):
            expected_seed = (seed + index) % 2**63
            assert branch.config.sampling.seed == expected_seed
            with session.fork(seed=expected_seed) as fork:
                reply = fork.send(second)
                assert branch.last_reply is not None
                assert branch.token_ids == fork.token_ids and branch.messages == fork.messages
                assert branch.last_reply.text == reply.text
                assert branch.last_reply.finish_reason == reply.finish_reason
                assert [(r.kind, r.reason) for r in branch.trace] == [
                    (r.kind, r.reason) for r in fork.trace
                ]
                usage = branch.last_reply.usage
                assert usage.prompt_tokens == reply.usage.prompt_tokens
                if index == 0:
                    assert usage == reply.usage
                else:
                    assert usage.prefilled_tokens <= reply.usage.prefilled_tokens
        # Chosen ones are sessions like any other, their own ancestors closed or not.
        picked, *others = branches
        for branch in others:
            branch.close()
        next_reply = picked.send("And then?")
        assert next_reply.usage.cached_tokens > len(ids)
        picked.close()


def test_the_message_is_processed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, counted = chat_engine(), []
    with engine.session(sampled({})) as session:
        session.send("Hello.")
        logits = engine.runner._logits

        def counting(context: Any, sequences: Any, tokens: Any, rows: int) -> Any:
            counted.append(tokens.shape[1])
            return logits(context, sequences, tokens, rows)

        monkeypatch.setattr(engine.runner, "_logits", counting)
        branches = session.branch(4, "word " * 100)
        prompt = branches[0].last_reply.usage.prefilled_tokens  # type: ignore[union-attr]
        rows = session.config.refresh.prefill_evidence_queries
        assert prompt > 100
        # The shared part once, and of every branch what its evidence is made of.
        assert sum(size for size in counted if size > 1) <= prompt + 4 * rows
        replies = [branch.last_reply for branch in branches]
        kept = sum(reply.usage.prefilled_tokens for reply in replies if reply is not None)
        assert kept == prompt + 3 * rows
        for branch in branches:
            branch.close()


def test_without_a_message_branches_go_on_from_the_pending_token() -> None:
    engine = chat_engine()
    with engine.session(sampled({}, seed=5)) as session:
        session.send("Hello.")
        if session.token_ids[-1] in session._chat.stop_ids:  # type: ignore[union-attr]
            session.rewind(session.mark(len(session.token_ids) - 1))
        branches = session.branch(2, seeds=[5, 9])
        stops = session._chat.stop_ids  # type: ignore[union-attr]
        for branch, seed in zip(branches, (5, 9), strict=True):
            with session.fork(seed=seed) as fork:
                fork.decode([], stop_ids=stops)
                assert branch.token_ids == fork.token_ids
                assert branch.messages == fork.messages
            branch.close()


def test_raw_sessions_branch_too() -> None:
    engine = Engine(model_of("llama"))
    config = sampled({}).replace(boundaries=[{"name": "never"}])
    with engine.session(config) as session:
        with pytest.raises(NothingPendingError):
            session.branch(2)
        session.decode(list(range(30)), max_new_tokens=2)
        branches = session.branch(3)
        assert len({tuple(branch.token_ids) for branch in branches}) > 1
        assert torch.equal(session.next_logits(), session.next_logits())
        with pytest.raises(TemplateError):
            session.branch(2, "Hello.")
        for branch in branches:
            branch.close()


@pytest.mark.parametrize("message", ["More. " * 40, None], ids=["message", "pending"])
@pytest.mark.parametrize("passes", [1, 3, 9])
def test_cancelling_the_session_cancels_its_branches(
    message: str | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, counted = chat_engine(prefill_chunk_tokens=8), []
    with engine.session(sampled({}, seed=4).replace(sampling={"max_new_tokens": 200})) as session:
        session.send("Hello.")
        forward = engine.model.forward

        def cancelling(*given: Any, **keywords: Any) -> Any:
            counted.append(0)
            if len(counted) == passes:
                session.cancel()
            return forward(*given, **keywords)

        monkeypatch.setattr(engine.model, "forward", cancelling)
        branches = session.branch(2, message)
        assert len(counted) < 30
        monkeypatch.undo()
        for branch in branches:
            if message is not None:
                assert branch.last_reply is not None
                assert branch.last_reply.finish_reason == "cancelled"
            require_whole(branch, exact=False)
            branch.close()
        assert session.send("Well?").finish_reason != "cancelled"


def test_what_cannot_branch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = chat_engine(context_tokens=256)
    with engine.session(sampled({})) as session:
        session.send("Hello.")
        ids, users = session.token_ids, len(engine.parking._cores)
        for n, seeds in ((0, None), (-1, None), (2.5, None), (True, None), (2, [1]), (2, "ab")):
            with pytest.raises(InputError):
                session.branch(n, "More.", seeds=seeds)  # type: ignore[arg-type]
        with pytest.raises(ContextOverflowError):
            session.branch(2, "word " * 600)
        with monkeypatch.context() as patched:
            refuse_to_compute(engine, patched)
            with pytest.raises(ValueError, match="seed"):
                session.branch(2, "More.", seeds=[1, -1])
        with session._owner.held_for("send"), pytest.raises(SessionBusy):
            session.branch(2, "More.")
        assert session.token_ids == ids
        # Nothing that was begun is left open.
        assert len(engine.parking._cores) == users
