"""Out of memory and numbers that are not finite come as errors of ours, and sessions go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfi_agent import Engine, NumericsError, OutOfDeviceMemoryError, Session, SessionConfig
from tests.families import tiny_engine

CONFIG = SessionConfig(memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 4})
IDS = [token % 101 for token in range(0, 160, 7)]

CALLS: dict[str, Callable[[Session], Any]] = {
    "decode": lambda session: session.decode([3], max_new_tokens=2),
    "a prefill alone": lambda session: session.decode([3, 4], max_new_tokens=0),
    "next_logits": lambda session: session.next_logits(),
    "decode_batch": lambda session: session.engine.decode_batch([session], [[3]], max_new_tokens=2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_device_without_room_is_an_error_with_parts(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as session, engine.session(CONFIG) as untroubled:
        for each in (session, untroubled):
            each.decode(IDS, max_new_tokens=3)
        before = session.token_ids

        def no_room(*args: Any, **keywords: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "_logits", no_room)
            with pytest.raises(OutOfDeviceMemoryError, match="Tried to allocate") as caught:
                CALLS[call](session)
        parts = caught.value.parts
        assert parts["weights"] == sum(item.nbytes for item in engine.model.parameters())
        assert parts["histories of 1 sequences"] > 0 < parts["memories of 1 sequences"]
        # What was given before is there, and the call can be made again.
        assert session.token_ids[: len(before)] == before
        given = session.token_ids[len(before) :]
        assert session.decode([], max_new_tokens=4) == untroubled.decode(given, max_new_tokens=4)


@pytest.mark.parametrize("place", ["new", "earlier"])
def test_numbers_that_are_not_finite_are_found_where_they_arise(place: str) -> None:
    inner = tiny_engine("llama")
    engine = Engine(inner.model, inner.tokenizer, check_numbers=True)
    with engine.session(CONFIG) as session:
        session.decode(IDS, max_new_tokens=3)
        layer = 1
        if place == "earlier":
            state = session._core._state
            assert state is not None
            piece = next(state.sequence.layers[layer].history.pieces())
            piece.values[:, 2] = float("nan")
            with pytest.raises(NumericsError, match="an earlier token's") as caught:
                session.decode([], max_new_tokens=1)
        else:
            projection = engine.model.get_decoder().layers[layer].self_attn.v_proj
            kept = projection.weight.data.clone()
            projection.weight.data.fill_(float("inf"))
            try:
                with pytest.raises(NumericsError, match="values that are not") as caught:
                    session.decode([], max_new_tokens=1)
            finally:
                projection.weight.data.copy_(kept)
        assert caught.value.layer == layer and isinstance(caught.value, ArithmeticError)
