"""What sessions switch on in the model is switched off when the last of them is gone."""

from __future__ import annotations

import gc
import weakref

import pytest

from sfi_agent import Engine, ModelInUseError, SessionStateError
from tests.test_session.conversations import FULL, call_text, chat_engine, require_whole, says

END = "<|im_end|>"


def attention_of(engine: Engine) -> str:
    return str(engine.model.config._attn_implementation)


def forward(engine: Engine) -> None:
    import torch

    engine.model(torch.tensor([[1, 2, 3]]), use_cache=False)


def test_a_new_session_changes_nothing_until_it_is_used() -> None:
    engine = chat_engine()
    before = attention_of(engine)
    session = engine.session(FULL, system="Be kind.")
    assert (session.status, attention_of(engine)) == ("new", before)
    assert session.messages == [{"role": "system", "content": "Be kind."}]
    assert (session.token_ids, session.trace, session.stats.generated_tokens) == ([], [], 0)
    forward(engine)
    with session:
        assert (session.status, attention_of(engine) == before) == ("open", False)
        with pytest.raises(ModelInUseError):
            forward(engine)
    assert (session.status, attention_of(engine)) == ("closed", before)
    forward(engine)
    session.close()
    never_opened = engine.session(FULL)
    never_opened.close()
    with pytest.raises(SessionStateError):
        never_opened.send("Hi.")
    assert attention_of(engine) == before


def test_the_last_session_gives_the_model_back() -> None:
    engine = chat_engine()
    other_engine = Engine(engine.model, engine.tokenizer)
    before = attention_of(engine)
    first, second = engine.session(FULL), other_engine.session(FULL)
    first.decode([1, 2], max_new_tokens=2)
    second.decode([1, 2], max_new_tokens=2)
    child = first.fork()
    first.close()
    second.close()
    assert attention_of(engine) != before
    child.decode([], max_new_tokens=2)
    child.close()
    assert attention_of(engine) == before


def test_a_forgotten_session_is_closed_by_the_garbage_collector() -> None:
    engine = chat_engine()
    before = attention_of(engine)

    def note(text: str) -> str:
        """Takes a note.

        Args:
            text: What.
        """
        return text

    session = engine.session(FULL, tools=[note])
    with says(engine, call_text("note", text="x") + END, f"Done. Bye.{END}"):
        session.run("Note x.")
    layer = weakref.ref(session._core._opened().sequence.layers[0].history)
    forgotten = weakref.ref(session)
    assert attention_of(engine) != before
    del session
    gc.collect()
    assert forgotten() is None and layer() is None
    assert attention_of(engine) == before
    forward(engine)


def test_a_forgotten_stream_does_not_keep_its_session() -> None:
    engine = chat_engine()
    before = attention_of(engine)
    session = engine.session(FULL)
    with says(engine, f"One two three.{END}"):
        stream = session.stream("Count.")
        next(stream)
        forgotten = weakref.ref(session)
        del session, stream
        gc.collect()
    assert forgotten() is None
    assert attention_of(engine) == before


def test_an_error_in_the_with_block_gives_the_model_back() -> None:
    engine = chat_engine()
    before = attention_of(engine)
    with pytest.raises(ZeroDivisionError), engine.session(FULL) as session:
        session.decode([1, 2, 3], max_new_tokens=2)
        raise ZeroDivisionError
    assert (session.status, attention_of(engine)) == ("closed", before)


def test_a_session_needs_no_with_block() -> None:
    engine = chat_engine()
    session = engine.session(FULL)
    with says(engine, f"Hi.{END}"):
        assert session.send("Hello.").text == "Hi."
    require_whole(session)
    session.close()
