"""What a turn cost: usage of turns and runs, reasoning tokens, statistics."""

from __future__ import annotations

import pytest

from sfi_agent import SessionConfig, TurnEnd, Usage
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    call_text,
    chat_engine,
    encode,
    says,
)

END = "<|im_end|>"


def add(left: int, right: int) -> int:
    """Adds two numbers.

    Args:
        left: One number.
        right: The other one.
    """
    return left + right


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_a_run_costs_what_its_turns_cost(config: SessionConfig) -> None:
    engine = chat_engine()
    outputs = [
        call_text("add", left=1, right=2) + END,
        call_text("add", left=3, right=4) + END,
        f"It is 7. Done.{END}",
    ]
    with (
        engine.session(config, tools=[add]) as session,
        engine.session(config, tools=[add]) as streaming,
    ):
        with says(engine, *outputs):
            reply = session.run("Add.")
        with says(engine, *outputs):
            events = list(streaming.stream("Add."))
        turns = [event.reply for event in events if isinstance(event, TurnEnd)]
        assert len(turns) == 3
        total = Usage()
        past = 0
        for turn, output in zip(turns, outputs, strict=True):
            usage = turn.usage
            assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens
            assert usage.cached_tokens == max(0, past - 1)
            assert usage.output_tokens == len(turn.steps) == len(encode(engine, output))
            past = usage.prompt_tokens + usage.output_tokens
            total = total + usage
        assert past == len(session.token_ids) == len(streaming.token_ids)
        assert reply.usage == total
        assert [step.position for step in reply.steps] == [step.position for step in session.trace]
        assert reply.text == turns[-1].text
        # Every id but the last pending one was processed exactly once, stop tokens with the turn
        # after them.
        assert total.prefilled_tokens + total.output_tokens - 2 == len(session.token_ids)


def test_reasoning_tokens_are_counted_and_told_apart() -> None:
    engine = chat_engine("CHATML_THINKING")
    thought, answer = "<think>\nWho is it? Ada.\n</think>", "\n\nAda is here."
    with engine.session(FULL) as session:
        with says(engine, f"{thought}{answer}{END}", f"No thought.{END}"):
            reply, other = session.send("Who?"), session.send("And?")
    assert (reply.reasoning, reply.text) == ("Who is it? Ada.", "Ada is here.")
    assert reply.usage.reasoning_tokens == len(encode(engine, thought))
    assert reply.usage.output_tokens == len(encode(engine, thought + answer + END))
    assert (other.reasoning, other.usage.reasoning_tokens) == ("", 0)


def test_reasoning_that_the_template_begins_is_reasoning() -> None:
    engine = chat_engine("OPENS_THOUGHTS")
    with engine.session(FULL) as session:
        with says(engine, f"Who is it?\n</think>\n\nAda is here.{END}"):
            reply = session.send("Who?")
    assert (reply.reasoning, reply.text) == ("Who is it?", "Ada is here.")
    assert reply.usage.reasoning_tokens == len(encode(engine, "Who is it?\n</think>"))


def test_reasoning_that_is_cut_off_is_all_reasoning() -> None:
    engine = chat_engine("CHATML_THINKING")
    config = FULL.replace(sampling={"max_new_tokens": 5})
    with engine.session(config) as session:
        with says(engine, f"<think>\nOne two three four five.\n</think>{END}"):
            reply = session.send("Who?")
    assert (reply.finish_reason, reply.text, reply.usage.reasoning_tokens) == ("length", "", 5)
    assert reply.reasoning


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_statistics_count_the_trace(config: SessionConfig) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        for _ in range(2):
            with says(engine, f"One. Two! Three? Four five six seven eight nine ten.{END}"):
                session.send("Count.")
        stats, trace = session.stats, session.trace
        kinds = [record.kind for record in trace]
        assert stats.generated_tokens == len(kinds)
        counted = (stats.fast_tokens, stats.slow_tokens, stats.retry_tokens)
        assert counted == tuple(kinds.count(kind) for kind in ("fast", "slow", "retry"))
        assert [record.reason for record in trace].count("prefill") == 2
        assert stats.dense_passes == stats.slow_tokens + stats.retry_tokens - 2
        assert stats.slow_share == stats.dense_passes / stats.generated_tokens
        assert stats.history_tokens == len(session.token_ids) - 1
        assert stats.history_bytes > 0
        if config is DENSE:
            assert (stats.fast_tokens, stats.memory_bytes) == (0, 0)
        else:
            assert 0 < stats.slow_share < 0.5 and stats.memory_bytes > 0
            assert {record.slow_step for record in trace} == {None, "observe"}


def test_a_message_without_effect_on_the_prefix_costs_its_own_length() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, f"Hi.{END}"):
            session.send("Hello.")
        costs = []
        for words in (1, 2, 40):
            with says(engine, f"Hi.{END}"):
                costs.append(session.send("word" + " word" * (words - 1)).usage.prefilled_tokens)
        one, two, forty = costs
        word = len(encode(engine, " word"))
        assert (two - one, forty - one) == (word, 39 * word)


def test_replies_and_sessions_describe_themselves() -> None:
    engine = chat_engine()
    assert repr(engine).startswith("Engine(Qwen2ForCausalLM, 2 layers, float32, device='cpu'")
    session = engine.session(SPARSE, tools=[add])
    assert repr(session) == "Session(new, 0 tokens, mode='slow_fast', selector='per_head')"
    with says(engine, f"Let me.\n{call_text('add', left=1, right=2)}{END}"):
        reply = session.send("Add.")
    usage = reply.usage
    assert repr(reply) == (
        "Reply('Let me.', finish_reason='tool_calls', tool_calls=[add], "
        f"tokens=0 cached + {usage.prompt_tokens} prefilled + {usage.output_tokens} output)"
    )
    count = len(session.token_ids)
    assert repr(session).startswith(f"Session(open, {count} tokens, ")
    assert repr(session.mark(3)) == "Mark(token_count=3)"
    session.close()
    assert repr(session).startswith("Session(closed, 0 tokens, ")
