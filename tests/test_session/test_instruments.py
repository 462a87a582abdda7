"""Instruments see every token, refresh and fast step once, and change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sfi_agent import Selection, Session, SessionBusy, SessionConfig, SessionStateError
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.instruments import FastAttention, Instruments
from sfi_agent.engine.sampling import Sampler
from tests.families import FULL_ATTENTION, VOCABULARY, tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import close

PROMPT = [(7 * index * index + 3) % VOCABULARY for index in range(40)]
OBSERVE = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 5}, {"name": "entropy", "threshold_nats": 3}],
    memory={"sink_tokens": 1, "selected_tokens": 16, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)
CONFIGS = {
    "dense": OBSERVE.replace(mode="dense"),
    "observe": OBSERVE,
    "rectify": OBSERVE.replace(slow_step="rectify"),
    "verify": OBSERVE.replace(slow_step="verify"),
}
POLICIES = pytest.mark.parametrize("name", CONFIGS)
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 8}


class Notes:
    """Everything that instruments were told."""

    def __init__(self) -> None:
        self.logits: list[tuple[int, Tensor]] = []
        self.refreshes: list[tuple[int, list[Selection | None]]] = []
        self.fast: list[tuple[int, int]] = []
        self.instruments = Instruments(
            on_logits=lambda position, logits: self.logits.append((position, logits.clone())),
            on_refresh=lambda tokens, chosen: self.refreshes.append((tokens, chosen)),
            on_fast_attention=lambda seen: self.fast.append((seen.position, seen.layer)),
        )


@POLICIES
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
def test_every_kept_token_is_told_once_with_what_it_was_chosen_from(
    name: str, sampling: dict[str, Any]
) -> None:
    config = CONFIGS[name].replace(sampling=sampling)
    engine, notes = tiny_engine("gemma3"), Notes()
    sampler = Sampler(**config.sampling.model_dump(exclude={"max_new_tokens"}))
    with engine.session(config) as session:
        session.attach(notes.instruments)
        for ids, new_tokens in ((PROMPT, 20), ([], 1), ([5, 6], 9)):
            session.decode(ids, max_new_tokens=new_tokens)
        trace, ids = session.trace, session.token_ids
    assert [position for position, _ in notes.logits] == [record.position for record in trace]
    for position, logits in notes.logits:
        assert logits.shape == (VOCABULARY,) and logits.dtype == torch.float32
        assert int(sampler.choose(logits, position)) == ids[position]
    if name in ("dense", "verify"):
        expected = dense_logits(engine.model, ids)
        assert all(close(logits, expected[position - 1]) for position, logits in notes.logits)


def test_logits_are_told_before_the_token_is() -> None:
    """Under verify too, where many are known at once."""
    for config in CONFIGS.values():
        notes = Notes()
        with tiny_engine("gemma3").session(config) as session:
            session.attach(notes.instruments)
            core = session._core
            core.append(PROMPT, 12)
            for told, record in enumerate(core.steps(DecodeLimits(12)), 1):
                assert len(notes.logits) == told
                assert notes.logits[-1][0] == record.position


@POLICIES
def test_looking_on_changes_nothing(name: str) -> None:
    """Not a bit: instruments get what is there and compute nothing on the way."""
    found = []
    for attached in (False, True):
        config = CONFIGS[name].replace(sampling=SAMPLED)
        with tiny_engine("qwen3").session(config) as session:
            if attached:
                session.attach(Notes().instruments)
            session.decode(PROMPT, max_new_tokens=15)
            session.decode([5], max_new_tokens=8)
            trace = [replace(record, seconds=0.0) for record in session.trace]
            found.append((session.token_ids, trace, session.next_logits()))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


@POLICIES
def test_refreshes_are_told_with_every_layer(name: str) -> None:
    notes = Notes()
    with tiny_engine("gemma3").session(CONFIGS[name]) as session:
        session.attach(notes.instruments)
        session.decode(PROMPT, max_new_tokens=20)
        slow = [record.position for record in session.trace if record.kind != "fast"]
    if name == "dense":
        assert notes.refreshes == []
        return
    assert [tokens for tokens, _ in notes.refreshes] == slow
    for tokens, selections in notes.refreshes:
        assert [selection is not None for selection in selections] == [False, True] * 2
        for selection in selections:
            if selection is not None:
                chosen = selection.positions[selection.positions >= 0]
                assert 1 <= int(chosen.min()) and int(chosen.max()) < tokens - 4


@POLICIES
def test_sparse_layers_of_fast_steps_are_told(name: str) -> None:
    notes = Notes()
    config = CONFIGS[name].replace(memory={"dense_layers": [0, 2]})
    with tiny_engine("qwen3").session(config) as session:
        session.attach(notes.instruments)
        session.decode(PROMPT, max_new_tokens=20)
        fast = [record.position - 1 for record in session.trace if record.kind == "fast"]
    positions = [position for position, layer in notes.fast if layer == 1]
    assert notes.fast == [(position, layer) for position in positions for layer in (1, 3)]
    assert set(fast) <= set(positions)
    assert bool(fast) == (name != "dense")


@pytest.mark.parametrize("family", [family.name for family in FULL_ATTENTION])
@pytest.mark.parametrize(
    ("selector", "slow_step"), [("cumulative_mass", "observe"), ("per_head", "verify")]
)
def test_fast_attention_is_plain_attention_over_what_it_says_is_visible(
    family: str, selector: str, slow_step: Literal["observe", "verify"]
) -> None:
    """And over all keys and values once the budget holds everything."""
    config = OBSERVE.replace(slow_step=slow_step, selector={"name": selector})
    for budget in (6, 1000):
        policy = config.replace(memory={"selected_tokens": budget})
        if budget == 1000:
            policy = policy.replace(selector={"name": "per_head"})
        steps: list[int] = []

        def look(seen: FastAttention, budget: int = budget, steps: list[int] = steps) -> None:
            steps.append(seen.position)
            check_fast_attention(seen, full=budget == 1000)

        with tiny_engine(family).session(policy) as session:
            session.attach(Instruments(on_fast_attention=look))
            session.decode(PROMPT, max_new_tokens=7)
        assert steps


def check_fast_attention(seen: FastAttention, *, full: bool) -> None:
    memory = seen.state.memory
    assert memory is not None
    keys, visible = seen.visible_keys()
    assert keys.shape[:2] == visible.shape
    out = plain_attention(seen, keys, memory.values, visible)
    torch.testing.assert_close(seen.output, out, rtol=1e-4, atol=1e-4)
    all_keys, all_values = seen.all_keys_values()
    assert all_keys.shape[1] == all_values.shape[1] == seen.position + 1
    found = (keys[:, :, None] == all_keys[:, None]).all(-1)
    assert bool((found.sum(-1)[visible] == 1).all()), "a visible key is none of the sequence's"
    places = found.int().argmax(-1)
    for head in range(len(keys)):
        positions = places[head][visible[head]].tolist()
        assert len(set(positions)) == len(positions)
        assert seen.position in positions and 0 in positions
    if full:
        everything = visible.new_ones(len(keys), seen.position + 1)
        out = plain_attention(seen, all_keys, all_values, everything)
        torch.testing.assert_close(seen.output, out, rtol=1e-4, atol=1e-4)


def plain_attention(seen: FastAttention, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    query, rule = seen.query, seen.state.rule
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    logits = torch.einsum("hqd,hkd->hqk", query, keys) * seen.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logits = logits.masked_fill(~visible.repeat_interleave(group, 0)[:, None], float("-inf"))
    if rule.sinks is not None:
        logits = torch.cat([logits, rule.sinks[:, None, None]], dim=-1)
    return logits.softmax(-1)[..., : values.shape[1]] @ values


class _Planned(Exception):
    """Raised by an instrument."""


@pytest.mark.parametrize("name", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("where", ["on_logits", "on_refresh", "on_fast_attention"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_what_an_instrument_raises_ends_the_decoding_and_loses_nothing(
    name: str, where: str, call: int
) -> None:
    engine, left = tiny_engine("gemma3"), call

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Planned

    with engine.session(CONFIGS["dense"]) as plain, engine.session(CONFIGS[name]) as session:
        session.attach(Instruments(**{where: fail}))
        with pytest.raises(_Planned):
            session.decode(PROMPT, max_new_tokens=30)
        ids = session.token_ids
        assert session.stats.history_tokens < len(ids) == len(PROMPT) + len(session.trace)
        session.attach(Instruments())
        session.decode([], max_new_tokens=5)
        assert session.token_ids[: len(ids)] == ids
        if name == "verify":
            plain.decode(PROMPT, max_new_tokens=len(session.token_ids) - len(PROMPT))
            assert session.token_ids == plain.token_ids
            assert close(session.next_logits(), plain.next_logits())


def test_later_instruments_take_the_place_of_earlier_ones_and_forks_have_none() -> None:
    first, second = Notes(), Notes()
    with tiny_engine("gemma3").session(CONFIGS["verify"]) as session:
        session.attach(first.instruments)
        session.decode(PROMPT, max_new_tokens=2)
        session.attach(second.instruments)
        session.decode([], max_new_tokens=3)
        with session.fork() as child:
            child.decode([], max_new_tokens=4)
        assert (len(first.logits), len(second.logits)) == (2, 3)


def test_a_session_that_is_decoding_cannot_be_attached_to() -> None:
    with tiny_engine("gemma3").session(OBSERVE) as session:

        def attach_from_inside(position: int, logits: Tensor) -> None:
            _attach(session)

        session.attach(Instruments(on_logits=attach_from_inside))
        with pytest.raises(SessionBusy):
            session.decode(PROMPT, max_new_tokens=2)


def test_a_closed_session_cannot_be_attached_to() -> None:
    session = tiny_engine("llama").session(OBSERVE)
    session.close()
    with pytest.raises(SessionStateError):
        session.attach(Instruments())


def _attach(session: Session) -> None:
    session.attach(Instruments())
