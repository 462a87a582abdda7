"""What is no argument is refused by name before anything runs, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfi_agent import (
    ConfigError,
    Engine,
    InputError,
    Session,
    SessionConfig,
    SfiError,
    ToolDefinitionError,
    UnsupportedModelError,
)
from tests.families import model_of
from tests.test_guarantees.test_bad_input import refuse_to_compute
from tests.test_session.conversations import SPARSE, chat_engine

NEITHER: tuple[Any, ...] = (0, 1, "", "abc", [], {}, {"mode": "dense"}, object(), torch.ones(2))
NO_LISTS: tuple[Any, ...] = ("ab", b"ab", 2, None, torch.tensor(3), object())

says, asks = {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}

REFUSED: tuple[
    tuple[type[SfiError], Callable[[Session, Engine, Any], Any], tuple[Any, ...]], ...
] = (
    (ConfigError, lambda session, engine, given: session.fork(given), NEITHER),
    (ConfigError, lambda session, engine, given: session.fork(given, seed=3), NEITHER),
    (ConfigError, lambda session, engine, given: engine.session(given), NEITHER),
    (ConfigError, lambda session, engine, given: engine.warmup(given), NEITHER),
    (
        ConfigError,
        lambda session, engine, given: session.branch(2, "More.", seeds=[1, given]),
        (-1, 2**63, 1.5, "1", None),
    ),
    (
        InputError,
        lambda session, engine, given: session.branch(2, "More.", seeds=given),
        (*(item for item in NO_LISTS if item is not None), [1], [1, 2, 3]),
    ),
    (
        InputError,
        lambda session, engine, given: engine.decode_batch([session], given),
        (*(item for item in NO_LISTS if item is not None), [], [[1], [2]]),
    ),
    (
        InputError,
        lambda session, engine, given: engine.decode_batch([session], max_new_tokens=given),
        ("a", torch.tensor(3), [1, 2], object()),
    ),
    (InputError, lambda session, engine, given: session.decode([1], stop_ids=given), NO_LISTS),
    (InputError, lambda session, engine, given: session.decode(given), ("", b"", b"ab", {}, None)),
    (
        InputError,
        lambda session, engine, given: session.send([{**says, "tool_calls": given}, asks]),
        (5, "ab", {"id": "a"}, object()),
    ),
    (InputError, lambda session, engine, given: session.attach(given), (None, *NEITHER)),
    (InputError, lambda session, engine, given: engine.park(given), (None, *NEITHER)),
    (
        InputError,
        lambda session, engine, given: engine.session(SPARSE, system=given),
        (0, b"Be brief.", ["Be brief."], {"role": "system"}, "half a character: \ud83d"),
    ),
    (
        InputError,
        lambda session, engine, given: engine.session(SPARSE, overflow=given),
        (None, "drop", torch.ones(2)),
    ),
    (
        ToolDefinitionError,
        lambda session, engine, given: engine.session(SPARSE, tools=given),
        (None, 5, "search", print),
    ),
)


@pytest.mark.parametrize(("error", "use", "values"), REFUSED)
def test_what_is_refused_changes_nothing(
    error: type[SfiError], use: Callable[..., Any], values: tuple[Any, ...]
) -> None:
    engine = chat_engine()
    with engine.session(SPARSE) as session:
        session.send("Hello.")
        before = (session.token_ids, session.messages, session.trace, session.stats)
        for given in values:
            with pytest.MonkeyPatch.context() as patched:
                refuse_to_compute(engine, patched)
                with pytest.raises(error, match="got"):
                    use(session, engine, given)
            assert (session.token_ids, session.messages, session.trace, session.stats) == before
        assert session.decode([], max_new_tokens=1)


@pytest.mark.parametrize("given", [None, "Qwen/Qwen3-0.6B", SessionConfig(), torch.nn.Linear(2, 2)])
def test_an_engine_of_what_is_no_model(given: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        Engine(given)


@pytest.mark.parametrize(
    "keywords",
    [
        {"tokenizer": "Qwen/Qwen3-0.6B"},
        {"tokenizer": 5},
        {"prefill_chunk_tokens": 0},
        {"prefill_chunk_tokens": -1},
        {"prefill_chunk_tokens": 2.5},
        {"prefill_chunk_tokens": "8"},
        {"prefill_chunk_tokens": True},
        {"telemetry": False},
        {"telemetry": "otel"},
        {"parking": 10**9},
        {"parking": {"device_bytes": 10**9}},
    ],
    ids=repr,
)
def test_an_engine_with_parts_of_another_kind(keywords: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got"):
        Engine(model_of("llama"), **keywords)
