"""Calls that are held to their schemas: models without any training write them well every time."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import strategies as st

from sfi_agent import (
    ConfigError,
    Engine,
    MissingExtraError,
    Session,
    SessionConfig,
    Tool,
    ToolCall,
    ToolDefinitionError,
    ToolResult,
    TurnEnd,
)
from sfi_agent.session.grammar import call_decoding
from tests.families import tiny_engine
from tests.test_guarantees.policies import for_each
from tests.test_session.call_cases import (
    HELD_FORMATS,
    OPENINGS,
    Nudge,
    argument_schemas,
    call_engine,
    calls_of,
    recording_tool,
    short_policy,
)
from tests.test_session.published_chats import named, published_engine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "maxLength": 12},
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        "deep": {"type": "boolean"},
    },
    "required": ["query", "limit"],
}
PROMPT = "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"


def search_tool() -> Tool:
    return recording_tool("search", SCHEMA)[0]


def encode(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return list(engine.tokenizer.encode(text, add_special_tokens=False))


def require_valid(calls: Sequence[ToolCall], schemas: dict[str, dict[str, Any]]) -> None:
    assert calls
    for call in calls:
        assert call.error is None
        jsonschema.validate(dict(call.arguments), schemas[call.name])


@pytest.mark.parametrize("name", HELD_FORMATS)
def test_random_weights_write_valid_calls(name: str) -> None:
    """In every format, whatever the schemas; the ids stay as they were written."""
    engine, cut = call_engine(name), []

    def check(schemas: list[dict[str, Any]], seed: int) -> None:
        given = {f"tool_{index}": schema for index, schema in enumerate(schemas)}
        tools = [recording_tool(tool, schema)[0] for tool, schema in given.items()]
        config = short_policy(sampling={"seed": seed})
        with engine.session(config, tools=tools) as session:
            with Nudge(engine, OPENINGS[name]):
                reply = session.send("Go.")
            ids = session.token_ids
            cut.append(reply.finish_reason == "length")
            if not cut[-1]:
                require_valid(reply.tool_calls, given)
                assert calls_of(session, len(ids) - reply.usage.output_tokens) == reply.tool_calls
            assert [step.token_id for step in reply.steps] == ids[-len(reply.steps) :]

    for_each(
        name,
        2,
        schemas=st.lists(argument_schemas, min_size=1, max_size=3),
        seed=st.integers(0, 2**32),
    )(check)
    assert not all(cut)


@pytest.mark.parametrize("name", named(["gemma4_v5", "lfm2_v2", "lfm2_2_5_v2"]))
def test_calls_of_published_templates_are_held_in_notations_of_their_own(name: str) -> None:
    engine = published_engine(name)
    opening = "<|tool_call>" if name.startswith("gemma") else "<|tool_call_start|>"
    config = short_policy(sampling={"temperature": 0.0, "max_new_tokens": 300})
    with engine.session(config, tools=[search_tool()]) as session, Nudge(engine, opening):
        reply = session.send("Go.")
    require_valid(reply.tool_calls, {"search": SCHEMA})


def test_a_tool_loop_of_random_weights_runs_and_its_ids_stay_verbatim() -> None:
    engine = call_engine("CHATML")
    tool, received = recording_tool("search", SCHEMA)
    with engine.session(short_policy(sampling={"seed": 3}), tools=[tool]) as session:
        kept: list[list[int]] = []
        with Nudge(engine, "<tool_call>"):
            events = list(session.stream("Go.", max_turns=4))
        for event in events:
            if isinstance(event, TurnEnd):
                kept.append([step.token_id for step in event.reply.steps])
        calls = [event for event in events if isinstance(event, ToolCall)]
        results = [event for event in events if isinstance(event, ToolResult)]
        ids = session.token_ids
    require_valid(calls, {"search": SCHEMA})
    # The last turn's calls are not run.
    assert len(calls) == 4 and len(results) == 3 and not any(item.is_error for item in results)
    assert received == [dict(call.arguments) for call in calls[:3]]
    text = engine.tokenizer.decode(ids)  # type: ignore[union-attr]
    assert all(call.raw_text in text for call in calls)
    place = 0
    for turn in kept:
        place = next(i for i in range(place, len(ids)) if ids[i : i + len(turn)] == turn)


@pytest.mark.parametrize("name", ["CHATML", "response template", "LLAMA", "qwen_xml"])
@pytest.mark.parametrize("slow_step", ["observe", "verify"])
def test_held_and_exact_equals_held_and_dense(slow_step: Any, name: str) -> None:
    """Over memories that hold nothing, in two turns and what a tool said between them."""
    engine, found = call_engine(name), []
    sampling = {"temperature": 0.0} if name in ("LLAMA", "response template") else {"seed": 8}
    empty = {"sink_tokens": 0, "selected_tokens": 0, "recent_tokens": 1}
    sparse = short_policy(
        slow_step=slow_step,
        selector={"name": "window"},
        memory=empty,
        sampling={**sampling, "max_new_tokens": 90},
    )
    for config in (sparse.replace(mode="dense"), sparse):
        with engine.session(config, tools=[search_tool()]) as session:
            with Nudge(engine, OPENINGS[name]):
                session.run("Go.", max_turns=2)
            found.append(session.token_ids)
            rejected = sum(r.drafted_tokens - r.accepted_tokens for r in session.trace)
    assert found[0] == found[1]
    assert rejected > 5


@contextmanager
def _likes(engine: Engine, token_id: int) -> Iterator[None]:
    """The model chooses this token more often than it would."""

    def push(module: Any, args: Any, result: Any) -> Any:
        result.logits = result.logits.index_add(
            -1, torch.tensor([token_id]), torch.full((*result.logits.shape[:-1], 1), 7.0)
        )
        return result

    handle = engine.model.register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", ["dense", "slow_fast"])
@pytest.mark.parametrize("name", ["CHATML_THINKING", "MISTRAL"])
def test_text_outside_calls_is_as_without_the_constraint(name: str, mode: Any) -> None:
    """Up to the opening of the first call, which the model chooses or does not choose itself."""
    engine, opened = call_engine(name), 0
    assert engine.tokenizer is not None
    opening: Any = engine.tokenizer.convert_tokens_to_ids(OPENINGS[name])
    for seed in range(3):
        found = []
        for held in (False, True):
            config = short_policy(
                mode=mode,
                sampling={"seed": seed, "temperature": 1.4},
                tools={"constrain_calls": held},
            )
            with engine.session(config, tools=[search_tool()]) as session, _likes(engine, opening):
                found.append(session.decode(encode(engine, PROMPT), max_new_tokens=50))
        free = found[0].index(opening) + 1 if opening in found[0] else len(found[0])
        assert found[0][:free] == found[1][:free]
        opened += found[0] != found[1]
    assert opened


# ---------------------------------------------------------------- in pieces, forks and rewinds


def _begun(engine: Engine, name: str, **overrides: Any) -> tuple[Session, int]:
    """A session in the middle of a call, and where the answer begins."""
    session = engine.session(short_policy(**overrides), tools=[search_tool()])
    prompt = encode(engine, PROMPT)
    with Nudge(engine, ""):
        session.decode(prompt, given_ids=encode(engine, OPENINGS[name]), max_new_tokens=3)
    return session, len(prompt)


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("name", ["CHATML", "LLAMA", "glm", "braces", "Python"])
def test_a_call_goes_on_over_decodings_forks_and_rewinds(name: str, slow_step: Any) -> None:
    engine = call_engine(name)
    assert engine.tokenizer is not None
    whole, start = _begun(engine, name, slow_step=slow_step)
    with whole, Nudge(engine, ""):
        mark = whole.mark()
        stop_ids = whole._chat.stop_ids  # type: ignore[union-attr]
        once = whole.decode([], max_new_tokens=200, stop_ids=stop_ids)
        require_valid(calls_of(whole, start), {"search": SCHEMA})
        with whole.fork() as child:
            child.rewind(child.mark(mark.token_count))
            forked = child.decode([], max_new_tokens=200, stop_ids=stop_ids)
            require_valid(calls_of(child, start), {"search": SCHEMA})
        whole.rewind(mark)
        pieces: list[int] = []
        for size in (1, 4, 2, 1, 7, 200):
            if not pieces or pieces[-1] not in stop_ids:
                pieces += whole.decode([], max_new_tokens=size, stop_ids=stop_ids)
        require_valid(calls_of(whole, start), {"search": SCHEMA})
    # Every token of a call is the one that dense decoding chooses, wherever one begins.
    assert once == forked == pieces


def test_given_tokens_that_are_no_call_are_left_alone() -> None:
    engine = call_engine("CHATML")
    with engine.session(short_policy(), tools=[search_tool()]) as session:
        given = encode(engine, "<tool_call>no JSON at all")
        free = session.decode(encode(engine, PROMPT), given_ids=given, max_new_tokens=40)
    with engine.session(
        short_policy(tools={"constrain_calls": False}), tools=[search_tool()]
    ) as session:
        assert free == session.decode(encode(engine, PROMPT), given_ids=given, max_new_tokens=40)


@pytest.mark.parametrize("name", ["CHATML", "MISTRAL"])
def test_programs_and_batches_hold_calls_too(name: str) -> None:
    found = []
    for programs in (False, True):
        engine = call_engine(name, programs=programs)
        configs = [short_policy(sampling={"seed": seed, "max_new_tokens": 40}) for seed in range(3)]
        configs.append(short_policy(mode="dense", sampling={"temperature": 0.0}))
        sessions = [engine.session(config, tools=[search_tool()]) for config in configs]
        prompt = [*encode(engine, PROMPT), *encode(engine, "Well.")]
        for session in sessions:
            session.decode(prompt, given_ids=encode(engine, OPENINGS[name]), max_new_tokens=1)
        found.append(engine.decode_batch(sessions, max_new_tokens=40))
        for session in sessions:
            for call in calls_of(session, len(prompt))[:1]:
                assert call.name == "search" or not call.name
            session.close()
    assert found[0] == found[1]


# ---------------------------------------------------------------- the matcher


@pytest.mark.parametrize("name", ["CHATML", "braces", "Python"])
def test_a_matcher_that_was_rolled_back_equals_one_that_never_went_there(name: str) -> None:
    engine, lots = call_engine(name), random.Random(4)
    with engine.session(short_policy(), tools=[search_tool()]) as session:
        watch: Any = session._core.make_watch and session._core.make_watch([])
        held: Any = watch._held_calls
    grammar = next(iter(held._grammars.values()))
    for _ in range(20):
        matcher = grammar.matcher()
        taken: list[int] = []
        for _ in range(40):
            if taken and lots.random() < 0.3:
                back = lots.randint(1, len(taken))
                matcher.rollback(back)
                del taken[-back:]
            if lots.random() < 0.1:
                matcher = matcher.fork()
            allowed = matcher.allowed().nonzero().flatten().tolist()
            token = lots.choice(allowed)
            assert matcher.advance(token)
            taken.append(token)
            assert matcher.steps == len(taken)
        fresh = grammar.matcher()
        assert all(fresh.advance(token) for token in taken)
        assert torch.equal(fresh.allowed(), matcher.allowed())
        refused = (~matcher.allowed()).nonzero().flatten().tolist()
        before = matcher.steps
        assert sum(matcher.advance(token) for token in lots.sample(refused, 20)) <= 20
        matcher.rollback(matcher.steps - before)
        assert torch.equal(fresh.allowed(), matcher.allowed())


# ---------------------------------------------------------------- what cannot be held


def test_without_tools_there_is_nothing_to_hold() -> None:
    with pytest.raises(ConfigError, match="without tools"):
        call_engine("CHATML").session(short_policy())
    with pytest.raises(ConfigError, match="without tools"):
        tiny_engine("llama").session(short_policy())
    with call_engine("CHATML").session() as session, pytest.raises(ConfigError):
        session.fork(short_policy())


def test_a_format_without_a_grammar_is_refused() -> None:
    from tests import chat_templates
    from tests.tiny_tokenizers import chatml_tokenizer

    source = chat_templates.CHATML + "{#to=self<|message|>#}"
    engine = Engine(call_engine("CHATML").model, chatml_tokenizer(source))
    with engine.session(SessionConfig(), tools=[search_tool()]):
        pass
    with pytest.raises(ConfigError, match="call format is not known"):
        engine.session(short_policy(), tools=[search_tool()])


def test_a_tokenizer_that_writes_no_json_is_refused() -> None:
    from tests import chat_templates
    from tests.families import word_tokenizer

    tokenizer = copy.copy(word_tokenizer())  # The shared one stays without a template.
    tokenizer.chat_template = chat_templates.CHATML
    engine = Engine(tiny_engine("llama").model, tokenizer)
    with pytest.raises(ConfigError, match="constrain_calls"):
        engine.session(short_policy(), tools=[search_tool()])


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr(call_decoding, "_held_calls", {})
    with pytest.raises(MissingExtraError, match=r"pip install 'sfi-agent\[grammar\]'"):
        call_engine("CHATML").session(short_policy(), tools=[search_tool()])


@pytest.mark.parametrize("broken", [{"type": "strin"}, {"enum": []}])
def test_a_schema_that_no_grammar_holds_is_refused(broken: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": broken}}
    with pytest.raises(ToolDefinitionError, match="'odd'.*JSON schema"):
        call_engine("CHATML").session(
            short_policy(), tools=[search_tool(), recording_tool("odd", schema)[0]]
        )


def test_keywords_that_are_not_held_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    schema = {
        "type": "object",
        "properties": {"contains": {"type": "array", "items": {}, "uniqueItems": True}},
    }
    with call_engine("CHATML").session(short_policy(), tools=[recording_tool("odd", schema)[0]]):
        pass
    (record,) = [item for item in caplog.records if "schema_partly_held" in item.message]
    assert "uniqueItems" in record.message and "'contains'" not in record.message
