"""Conversations that are saved in the middle: messages, calls, results, and what a turn costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import (
    Engine,
    InputError,
    Reply,
    Session,
    SessionConfig,
    StepRecord,
    StoreError,
    Tool,
    ToolCall,
    ToolResult,
)
from sfi_agent.session import user_input
from sfi_agent.session.store import transcript_records
from sfi_agent.session.store.manifest import SavedSpan
from sfi_agent.session.store.trace_columns import columns_of, records_of
from sfi_agent.session.store.transcript_records import text_of
from sfi_agent.session.transcript import TranscriptSpan
from tests.test_guarantees.test_save_load import history_of, kinds, same_bits
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    call_text,
    chat_engine,
    encode,
    policy,
    require_whole,
    says,
)

END = "<|im_end|>"


def find_room(name: str, floor: int = 1) -> str:
    """Finds a room.

    Args:
        name: Whose room.
        floor: Which floor.
    """
    return f"room {10 * floor + 2} of {name}"


def count_words(text: str) -> int:
    """Counts words.

    Args:
        text: Which ones.
    """
    return len(text.split())


TOOLS: list[Callable[..., Any]] = [find_room, count_words]


def load(session: Session, **options: Any) -> Session:
    """The session out of files that are gone when it is here."""
    with TemporaryDirectory() as folder:
        session.save(folder)
        return session.engine.load_session(folder, **options)


def require_same(loaded: Session, session: Session) -> None:
    assert loaded.token_ids == session.token_ids
    assert loaded.messages == session.messages
    assert loaded.trace == session.trace
    assert loaded.id == session.id and loaded.config == session.config
    assert loaded._chat is not None and session._chat is not None
    assert loaded._chat.transcript.spans == session._chat.transcript.spans
    assert loaded._chat.unsent_results == session._chat.unsent_results
    assert same_bits(history_of(loaded), history_of(session))
    assert torch.equal(loaded.next_logits(), session.next_logits())


def require_reuse(reply: Reply, before: int, new_ids: int) -> None:
    usage = reply.usage
    assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens
    assert usage.cached_tokens == before - 1 and usage.prefilled_tokens == new_ids + 1
    assert usage.reuse_lost_reason is None


def same_reply(one: Reply, other: Reply) -> bool:
    return (
        [kinds(step) for step in one.steps] == [kinds(step) for step in other.steps]
        and one.text == other.text
        and one.tool_calls == other.tool_calls
        and one.usage == other.usage
        and one.finish_reason == other.finish_reason
    )


SAMPLED = policy(sampling={"max_new_tokens": 12, "temperature": 0.9, "seed": 3})


@pytest.mark.parametrize("template", ["CHATML", "CHATML_THINKING", "LLAMA", "MISTRAL"])
@pytest.mark.parametrize("config", [SAMPLED, SAMPLED.replace(slow_step="verify")], ids=["o", "v"])
def test_a_chat_goes_on_as_if_it_had_never_stopped(template: str, config: SessionConfig) -> None:
    engine = chat_engine(template)
    with engine.session(config, tools=TOOLS) as session:
        for question in ("Where is Ada?", "And Bob?"):
            session.send(question)
        loaded = load(session, tools=TOOLS)
        session._core.trace[:] = loaded._core.trace  # the times of the steps
        require_same(loaded, session)
        for question in ("Who else?", "Why?"):
            before = len(session.token_ids)
            one, other = session.send(question), loaded.send(question)
            assert same_reply(one, other)
            require_reuse(other, before, one.usage.prompt_tokens - before)
        assert loaded.messages == session.messages
        loaded.close()


def test_calls_that_wait_are_answered_after_loading() -> None:
    engine = chat_engine()
    text = (
        f"Let me see.\n{call_text('find_room', name='Ada')}\n{call_text('count_words', text='a b')}"
    )
    with engine.session(FULL, system="Be kind.", tools=TOOLS) as session:
        with says(engine, f"{text}{END}"):
            calls = session.send("Where is Ada?").tool_calls
        loaded = load(session, tools=TOOLS)
        require_same(loaded, session)
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"result {call.id}"}
            for call in calls
        ]
        replies = []
        for one in (session, loaded):
            with says(engine, f"Room 12.{END}"):
                replies.append(one.send(results))
        assert same_reply(*replies)
        assert loaded.messages == session.messages
        require_whole(loaded)
        loaded.close()


@pytest.mark.parametrize("answered", [True, False])
def test_results_that_were_not_sent_are_not_lost(answered: bool) -> None:
    """The tool ran and the run was cancelled: what it has done is told with the next message."""
    engine = chat_engine()

    def find_it(name: str) -> str:
        """Finds something.

        Args:
            name: What.
        """
        if answered:
            session.cancel()
            return f"found {name}"
        raise AssertionError("it is not run")

    with engine.session(FULL, tools=[find_it]) as session:
        with says(engine, f"{call_text('find_it', name='Ada')}{END}"):
            session.run("Look.") if answered else session.send("Look.")
        loaded = load(session, tools=[find_it])
        require_same(loaded, session)
        assert loaded._chat is not None
        assert bool(loaded._chat.unsent_results) == answered
        for one in (session, loaded):
            with says(engine, f"Fine.{END}"):
                one.send("Well?")
        assert loaded.messages == session.messages
        (content,) = [m["content"] for m in loaded.messages if m["role"] == "tool"]
        assert ("was not run" in content) != answered
        loaded.close()


def test_without_functions_a_session_talks_and_runs_nothing() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"{call_text('find_room', name='Ada')}{END}"):
            (call,) = session.send("Where is Ada?").tool_calls
        loaded = load(session)
        require_same(loaded, session)
        for start in (loaded.run, lambda message: list(loaded.stream(message))):
            with pytest.raises(InputError, match=r"tools=\[\.\.\.\]"):
                start("And Bob?")
            require_same(loaded, session)
        result = {"role": "tool", "tool_call_id": call.id, "content": "room 12"}
        for one in (session, loaded):
            with says(engine, f"{call_text('find_room', name='Bob')}{END}"):
                one.send([result])
            one.decode([], max_new_tokens=2)
        assert loaded.messages == session.messages
        with loaded.fork() as child, pytest.raises(InputError, match="without its tools"):
            child.run("x")
        again = load(loaded, tools=TOOLS)
        with says(engine, f"{call_text('find_room', name='Eve')}{END}", f"Room 12.{END}"):
            assert again.run("And Eve?").text == "Room 12."
        assert again.messages[-2]["content"] == "room 12 of Eve"
        for one in (loaded, again):
            one.close()


def test_a_session_without_tools_runs_what_there_is() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        loaded = load(session)
        with says(engine, f"Yes.{END}"):
            assert loaded.run("Are you there?").text == "Yes."
        loaded.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.8, 0.97])
def test_saved_where_it_was_rewound_to(share: float) -> None:
    """Also inside a prompt and inside an answer with calls."""
    engine = chat_engine()
    with engine.session(SPARSE, system="Be kind.", tools=TOOLS) as session:
        text = f"Let me look.\n{call_text('find_room', name='Ada', floor=3)}{END}"
        with says(engine, text, f"Room 32.{END}"):
            session.run("Where is Ada?")
        session.rewind(session.mark(int(share * len(session.token_ids))))
        loaded = load(session, tools=TOOLS)
        if share:
            require_same(loaded, session)
        replies = []
        for one in (session, loaded):
            with says(engine, f"Hm.{END}"):
                replies.append(one.send("Again?"))
        assert same_reply(*replies)
        assert loaded.messages == session.messages
        require_whole(loaded, exact=False)
        loaded.close()


def test_the_numbers_of_calls_go_on() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"{call_text('find_room', name='Ada')}{END}", f"There.{END}"):
            session.run("Where is Ada?")
        loaded = load(session, tools=TOOLS)
        with says(engine, f"{call_text('find_room', name='Bob')}{END}"):
            assert loaded.send("And Bob?").tool_calls[0].id == "call_1"
        loaded.close()


@pytest.mark.parametrize(
    ("floor", "arguments"),
    [
        ("NaN", {}),
        ("1e999", {"floor": sys.float_info.max, "name": "\N{REPLACEMENT CHARACTER}"}),
    ],
)
def test_what_a_model_may_write_and_json_may_not(floor: str, arguments: dict[str, Any]) -> None:
    """No number, too large a number and half a character, from the model's own text."""
    engine = chat_engine()
    body = f'{{"name": "find_\\ud800room", "arguments": {{"floor": {floor}, "name": "\\udc00"}}}}'
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"<tool_call>\n{body}\n</tool_call>{END}"):
            (call,) = session.send("Where is Ada?").tool_calls
        assert (call.arguments, call.raw_text) == (arguments, body)
        loaded = load(session, tools=TOOLS)
        assert repr(loaded.messages) == repr(session.messages)
        assert loaded._chat is not None and session._chat is not None
        assert repr(loaded._chat.transcript.spans) == repr(session._chat.transcript.spans)
        loaded.close()


def test_what_is_no_plain_data_cannot_be_saved(tmp_path: Path) -> None:
    engine = chat_engine()
    function = {"name": "find_room", "arguments": {"name": {1, 2}}}
    call = {"id": "call_0", "type": "function", "function": function}
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"Hm.{END}"):
            session.send("Hello")
        chat: Any = session._chat
        chat.transcript.spans[-1].messages[0]["tool_calls"] = [call]
        with pytest.raises(StoreError, match="plain JSON data"):
            session.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_schemas_are_shown_to_the_model_in_their_own_order() -> None:
    """The template writes keys as they come: sorted ones would be another prompt."""
    engine = chat_engine()
    parameters = {
        "type": "object",
        "properties": {"z": {"type": "string"}, "a": {"type": "string"}},
    }
    tools: list[Any] = [Tool(lambda z, a: "", "zulu", "Does it.", parameters), find_room]
    with engine.session(DENSE, tools=tools) as session:
        with says(engine, f"Hm.{END}"):
            session.send("Hello")
        loaded = load(session)
        assert loaded._chat is not None and session._chat is not None
        assert repr(loaded._chat.tools.schemas) == repr(session._chat.tools.schemas)
        assert loaded._chat.tools.canonical_json == session._chat.tools.canonical_json
        loaded.close()


def test_raw_ids_with_a_chat_template() -> None:
    engine = chat_engine()
    with engine.session(SPARSE) as session:
        session.decode(encode(engine, "Ada went home. She was"), max_new_tokens=6)
        loaded = load(session)
        require_same(loaded, session)
        assert loaded.decode([], max_new_tokens=6) == session.decode([], max_new_tokens=6)
        for one in (session, loaded):
            with pytest.raises(InputError, match="ids without messages"):
                one.send("Hello")
        loaded.close()


def test_an_engine_without_a_tokenizer() -> None:
    engine = Engine(chat_engine().model)
    with engine.session(SPARSE.replace(boundaries=[{"name": "interval"}])) as session:
        session.decode([1, 2, 3], max_new_tokens=6)
        loaded = load(session)
        assert loaded.messages == []
        assert loaded.decode([], max_new_tokens=6) == session.decode([], max_new_tokens=6)
        loaded.close()


def test_a_save_during_a_stream_is_refused(tmp_path: Path) -> None:
    from sfi_agent import SessionBusy

    engine = chat_engine()
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"One two three.{END}"):
            for _ in session.stream("Count."):
                with pytest.raises(SessionBusy):
                    session.save(tmp_path)
        session.save(tmp_path)


# ---------------------------------------------------------------- records


def test_messages_have_the_keys_that_sessions_know() -> None:
    assert transcript_records._TEXT_KEYS | {"tool_calls"} == user_input._KEYS
    assert transcript_records._ROLES == user_input._ROLES


def test_nothing_of_a_span_is_left_out() -> None:
    """A field that spans get has to be saved too."""
    assert set(SavedSpan.model_fields) == {field.name for field in fields(TranscriptSpan)}


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.one_of(
        st.builds(
            ToolCall,
            st.text(),
            st.text(),
            st.dictionaries(st.text(), json_values, max_size=3),
            st.text(),
            st.one_of(st.none(), st.text()),
        ),
        st.builds(ToolResult, st.text(), st.text(), st.text(), st.booleans()),
    )
)
@settings(max_examples=60, deadline=None, database=None)
def test_calls_and_results_come_back(record: Any) -> None:
    text = text_of(record)
    assert text.isascii()
    assert repr(transcript_records._record(type(record), text)) == repr(record)


counts = st.integers(0, 2**53)


@given(
    st.lists(
        st.builds(
            StepRecord,
            st.sampled_from(["fast", "slow", "retry"]),
            st.sampled_from([None, "observe", "rectify", "verify"]),
            st.text(max_size=5),
            counts,
            counts,
            st.floats(0, 1e9),
            st.just(0),
            st.integers(0, 2**31 - 1),
            counts,
            counts,
            counts,
        ),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, database=None)
def test_a_trace_comes_back(records: list[StepRecord], random: Any) -> None:
    names = [field.name for field in fields(StepRecord)]
    ids, trace = [], []
    for record in records:
        ids += [random.randrange(100) for _ in range(random.randrange(3))]
        values = {name: getattr(record, name) for name in names}
        trace.append(StepRecord(**{**values, "position": len(ids)}))
        ids.append(record.token_id)
    saved = columns_of(trace)
    assert set(saved.columns) == {name for name in names if name != "token_id"}
    assert records_of(saved, ids) == trace
