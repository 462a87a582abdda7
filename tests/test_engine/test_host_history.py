"""Sessions with their history in host memory decode what ordinary ones decode.

The "device" is the CPU too: chunks, rooms and lanes are what differs, made so small that pieces end
anywhere, and so late that what nobody waited for is wrong (`host_cases`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sfi_agent import Engine, OutOfDeviceMemoryError, Selection, Session, SessionConfig
from sfi_agent.engine import history as history_module
from sfi_agent.engine.cpu_rows import row_kernels
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.memory_parts import memory_parts
from sfi_agent.engine.streamed_refresh import LayerWatch
from sfi_agent.observe.trace import SlowStepKind
from tests.families import VOCABULARY, model_of, tiny_engine
from tests.test_engine.host_cases import (
    HostWays,
    LateLane,
    contents,
    host_engine,
    on_host,
    sequence_of,
    shared_host_engine,
)
from tests.test_engine.program_cases import (
    POLICY,
    Told,
    agree,
    counted_requests,
    eager_engine,
    program_policies,
    records_of,
    tell,
    told,
)
from tests.test_guarantees.adversaries import adversaries
from tests.test_guarantees.pair import Planned, raising_at
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import LAYOUT_NAMES, for_each, prompts, turns_of_ids

NEW_TOKENS = 9
PROMPT = list(range(60))
WAYS = (
    HostWays(),
    HostWays(room_bytes=700, rooms=3, chunk_bytes=1000, by_device=False),
    HostWays(room_bytes=1, rooms=1, chunk_bytes=1),
    HostWays(room_bytes=1 << 20, chunk_bytes=1 << 20, late=False),
)
over_slow_steps = pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])


@pytest.fixture(autouse=True)
def _buffers_grow_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MINIMUM_GROWTH_TOKENS", 5)


def same_contents(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Keys and values of two sessions, as near as rounding lets them be."""
    for expected, got in zip(one, other, strict=True):
        assert expected.shape == got.shape and close(got, expected)


def both(
    family: str,
    config: SessionConfig,
    act: Callable[[Session], None],
    engine: Engine,
    chunk: int | None = None,
) -> bool:
    """Whether a session on the host is an ordinary one, logits and history included; false where
    rounding let them part."""
    kept: list[list[torch.Tensor]] = []

    def look(session: Session) -> None:
        act(session)
        kept.append(contents(session))
        kept.append([session.next_logits()])

    expected = tell(eager_engine(family, chunk), config, look, logits=True)
    got = tell(engine, on_host(config), look, logits=True)
    if not agree(expected, got, config):
        return False
    assert got.logits.keys() == expected.logits.keys()
    assert all(close(got.logits[place], expected.logits[place]) for place in expected.logits)
    same_contents(kept[0], kept[2])
    same_contents(kept[1], kept[3])
    return True


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_turns_equal_ordinary_ones(family: str) -> None:
    """Any policy, adversarial plugins included; prefills in chunks of any size."""
    whole = []

    def check(
        config: SessionConfig, turns: list[list[int]], ways: HostWays, chunk: int | None
    ) -> None:
        def act(session: Session) -> None:
            for turn in turns:
                session.decode(turn, max_new_tokens=NEW_TOKENS)

        engine = shared_host_engine(family, ways, chunk)
        whole.append(both(family, config, act, engine, chunk))

    with adversaries():
        for_each(
            family,
            5,
            config=program_policies(),
            turns=turns_of_ids,
            ways=st.sampled_from(WAYS),
            chunk=st.sampled_from([None, 5, 16]),
        )(check)
    assert sum(whole) >= 4, "rounding decided too often"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_forks_and_rewinds_equal_ordinary_ones(family: str) -> None:
    """Parents and children keep their histories where they like, with dense layers of their own."""

    def story(
        engine: Engine, configs: list[SessionConfig], turns: list[list[int]], cut: int
    ) -> tuple[list[Told], list[list[torch.Tensor]]]:
        with engine.session(configs[0]) as parent:
            found = [told(parent, logits=True)]
            parent.decode(turns[0], max_new_tokens=NEW_TOKENS)
            with parent.fork(configs[1]) as child, child.fork(configs[2]) as grandchild:
                sessions = [parent, child, grandchild]
                found += [told(session, logits=True) for session in sessions[1:]]
                child.decode([], max_new_tokens=NEW_TOKENS)
                grandchild.decode([], max_new_tokens=3)
                parent.rewind(parent.mark(1 + cut % (len(parent.token_ids) - 1)))
                parent.decode([], max_new_tokens=NEW_TOKENS)
                child.rewind(child.mark(len(turns[0]) + 2))
                for session, turn in zip(sessions, turns, strict=True):
                    session.decode(turn, max_new_tokens=NEW_TOKENS)
                for one, session in zip(found, sessions, strict=True):
                    one.records = records_of(session)
                return found, [[*contents(one), one.next_logits()] for one in sessions]

    def check(
        configs: list[SessionConfig],
        hosts: list[bool],
        turns: list[list[int]],
        cut: int,
        ways: HostWays,
        execution: Any,
    ) -> None:
        expected, kept = story(eager_engine(family), configs, turns, cut)
        placed = [
            on_host(config) if host else config for config, host in zip(configs, hosts, strict=True)
        ]
        got, found = story(shared_host_engine(family, ways, None, execution), placed, turns, cut)
        for index, config in enumerate(configs):
            # Where rounding lets a parent and its twin part, children are not compared.
            if not agree(expected[index], got[index], config):
                return
            same_contents(kept[index], found[index])
        whole.append(True)

    whole: list[bool] = []
    with adversaries():
        for_each(
            f"forks {family}",
            4,
            configs=st.lists(program_policies(), min_size=3, max_size=3),
            hosts=st.lists(st.booleans(), min_size=3, max_size=3),
            turns=st.lists(prompts, min_size=3, max_size=3),
            cut=st.integers(0, 1000),
            ways=st.sampled_from(WAYS),
            execution=st.sampled_from(["eager", "uncaptured"]),
        )(check)
    assert len(whole) >= 2, "rounding decided too often"


@over_slow_steps
def test_given_and_interrupted_tokens_leave_what_ordinary_sessions_leave(
    slow_step: SlowStepKind,
) -> None:
    """A forward pass that breaks off in any layer, in any step."""
    broken = []

    def check(config: SessionConfig, prompt: list[int], call: int, layer: int) -> None:
        config = config.replace(mode="slow_fast")
        left: list[tuple[list[int], list[torch.Tensor]]] = []
        attention = model_of("qwen3").model.layers[layer].self_attn

        def act(session: Session) -> None:
            session.decode(prompt, max_new_tokens=3)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(attention, "forward", raising_at(attention.forward, call))
                try:
                    session.decode([5], max_new_tokens=25)
                except Planned:
                    broken.append(call)
            left.append((session.token_ids, [*contents(session), session.next_logits()]))
            session.decode([6], max_new_tokens=NEW_TOKENS)

        expected = tell(eager_engine("qwen3"), config, act, logits=True)
        engine = shared_host_engine("qwen3", WAYS[call % len(WAYS)])
        got = tell(engine, on_host(config), act, logits=True)
        if agree(expected, got, config) and left[0][0] == left[1][0]:
            same_contents(left[0][1], left[1][1])

    with adversaries():
        for_each(
            f"breaks {slow_step}",
            4,
            config=program_policies(slow_step),
            prompt=prompts,
            call=st.integers(1, 20),
            layer=st.integers(0, 3),
        )(check)
    assert len(broken) >= 4, broken


@over_slow_steps
def test_a_selector_that_raises_leaves_what_ordinary_sessions_leave(
    slow_step: SlowStepKind,
) -> None:
    """It is asked within the step, and heard behind it."""
    raised = []

    def check(config: SessionConfig, prompt: list[int], call: int) -> None:
        config = config.replace(mode="slow_fast")
        left: list[tuple[list[int], list[torch.Tensor], int]] = []

        def act(session: Session) -> None:
            steps: Any = session._core._decoder.steps
            inner = steps.selector

            class Raising:
                needs = inner.needs
                select = staticmethod(raising_at(inner.select, call))

            steps.selector = Raising()
            try:
                session.decode(prompt, max_new_tokens=25)
            except Planned:
                raised.append(call)
            steps.selector = inner
            state = [*contents(session), session.next_logits()]
            left.append((session.token_ids, state, session.stats.history_tokens))
            session.decode([], max_new_tokens=NEW_TOKENS)

        expected = tell(eager_engine("llama"), config, act, logits=True)
        got = tell(shared_host_engine("llama", WAYS[call % 3]), on_host(config), act, logits=True)
        if agree(expected, got, config) and left[0][0] == left[1][0]:
            same_contents(left[0][1], left[1][1])
            assert left[0][2] == left[1][2]

    with adversaries():
        for_each(
            f"selectors {slow_step}",
            5,
            config=program_policies(slow_step),
            prompt=prompts,
            call=st.integers(1, 6),
        )(check)
    assert len(raised) >= 4, raised


# ---------------------------------------------------------------- programs and batches


def streamed_buffers(session: Session) -> set[int]:
    """Addresses of what a session keeps in host memory."""
    return {
        tensor.untyped_storage().data_ptr()
        for layer in sequence_of(session).layers
        for extent in layer.history.extents
        if extent.buffer.home is not None
        for tensor in (extent.buffer.keys, extent.buffer.values)
    }


def told_addresses(engine: Engine) -> set[int]:
    """Addresses in all tables of an engine's programs."""
    programs: Any = engine.runner.programs
    tables = [
        table
        for made in programs._steps.seats._cohorts.values()
        for table in (made.cohort.history, made.cohort.memory)
    ]
    return {
        tensor.untyped_storage().data_ptr()
        for table in tables
        for layer in table._places
        for places in layer
        for place in places
        for tensor in (place.keys, place.values)
    }


@over_slow_steps
def test_fast_steps_stay_programs_and_the_rest_says_once_why_not(slow_step: SlowStepKind) -> None:
    config = POLICY.replace(slow_step=slow_step)
    seen: list[bool] = []

    def act(session: Session) -> None:
        for turn in (PROMPT, [5, 6]):
            session.decode(turn, max_new_tokens=40)
            if session.config.history.device == "cpu":
                host, tables = streamed_buffers(session), told_addresses(engine)
                seen.append(bool(host) and bool(tables) and not host & tables)

    engine = host_engine("llama", execution="uncaptured")
    expected = tell(eager_engine("llama"), config, act, logits=True)
    with capture_logs() as logs, counted_requests() as counts:
        got = tell(engine, on_host(config), act, logits=False)
    assert agree(expected, got, config)
    assert counts["FastStep"] > 50 and set(counts) == {"FastStep"}
    said = [entry["reason"] for entry in logs if entry["event"] == "eager_step"]
    assert said[0] == "a history in host memory"
    assert said[1:] == (["a block that ran eagerly"] if slow_step == "verify" else [])
    assert seen == [True, True]


def test_programs_are_not_made_for_lengths_that_they_never_read() -> None:
    engine = host_engine("llama", execution="uncaptured")
    with engine.session(on_host(POLICY)) as session:
        session.decode(PROMPT, max_new_tokens=20)
        programs: Any = engine.runner.programs
        support = programs._steps.seats.support
        assert support.read_tokens(sequence_of(session)) == 0
        with session.fork(on_host(POLICY.replace(memory={"dense_layers": [1]}))) as child:
            # What a child of dense layers inherits is where it was: its fast steps stream it.
            with capture_logs() as logs:
                child.decode([3], max_new_tokens=20)
            said = [entry["reason"] for entry in logs if entry["event"] == "eager_step"]
            assert said == ["a dense layer with its history in host memory"]
    with engine.session(on_host(POLICY.replace(memory={"dense_layers": [1]}))) as session:
        session.decode(PROMPT, max_new_tokens=20)
        sequence = sequence_of(session)
        assert [layer.history.streamed for layer in sequence.layers] == [True, False, True]
        assert support.read_tokens(sequence) == sequence.processed_tokens
        assert 0 < sequence.host_bytes < sequence.history_bytes


@pytest.mark.parametrize("execution", ["eager", "uncaptured"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_mixed_batch_equals_ordinary_sessions_alone(family: str, execution: Any) -> None:
    """Some with their history on the host, some not, forks of both."""

    def played(
        engine: Engine, configs: list[SessionConfig], turns: list[list[int]], *, batch: bool
    ) -> list[Told]:
        with ExitStack() as stack:
            sessions = [stack.enter_context(engine.session(config)) for config in configs[:3]]
            for session in sessions[:2]:
                session.decode(PROMPT[:20], max_new_tokens=3)
            for parent, config in zip(sessions[:2], configs[3:], strict=True):
                sessions.append(stack.enter_context(parent.fork(config)))
            found = [told(session, logits=not batch, refreshes=True) for session in sessions]
            if batch:
                engine.decode_batch(sessions, turns, max_new_tokens=15)
            else:
                for session, turn in zip(sessions, turns, strict=True):
                    session.decode(turn, max_new_tokens=15)
            for one, session in zip(found, sessions, strict=True):
                one.records = records_of(session)
        return found

    def check(
        configs: list[SessionConfig], hosts: list[bool], turns: list[list[int]], ways: HostWays
    ) -> None:
        expected = played(eager_engine(family), configs, turns, batch=False)
        placed = [
            on_host(config) if host else config for config, host in zip(configs, hosts, strict=True)
        ]
        engine = shared_host_engine(family, ways, None, execution)
        got = played(engine, placed, turns, batch=True)
        for index, config in enumerate(configs):
            parents = whole[-index:] if index else []
            if index < 3 or parents[index - 3]:
                whole.append(agree(expected[index], got[index], config))
            else:
                whole.append(False)

    whole: list[bool] = []
    with adversaries(), counted_requests() as counts:
        for_each(
            f"mixed {family} {execution}",
            2,
            configs=st.lists(program_policies(), min_size=5, max_size=5),
            hosts=st.permutations([True, True, True, False, False]),
            turns=st.lists(prompts, min_size=5, max_size=5),
            ways=st.sampled_from(WAYS),
        )(check)
    assert sum(whole) >= 0.7 * len(whole), "rounding decided too often"
    assert (counts["FastStep"] > 10) == (execution == "uncaptured"), counts


# ---------------------------------------------------------------- what a step costs


def counting_engine() -> tuple[Engine, LateLane]:
    engine = host_engine("llama", HostWays(room_bytes=1500))
    lane = LateLane()
    stream = HistoryStream(engine.shape.device, lane, room_bytes=1500)
    host = engine.runner.host
    engine.runner.host = type(host)(host.store, stream, host.gather)
    return engine, lane


def test_a_history_is_streamed_once_per_dense_step_and_never_by_fast_ones() -> None:
    """Keys a second time under verify, where it is known late which queries count."""
    layers, token_numbers = 3, 2 * 2 * 16
    times: dict[SlowStepKind, float] = {"observe": 1.0, "rectify": 1.0, "verify": 1.5}
    for slow_step, most in times.items():
        engine, lane = counting_engine()
        with engine.session(on_host(POLICY.replace(slow_step=slow_step))) as session:
            session.decode(PROMPT, max_new_tokens=1)
            # The first pass finds no history.
            assert lane.copied == 0
            session.decode([], max_new_tokens=1)
            assert lane.copied == layers * token_numbers * 60
            session.decode([], max_new_tokens=60)
            steps = session.trace[2:]
            passes = 1 + sum(record.dense_passes for record in steps)
            assert passes >= 8
            least = sum(61 for _ in range(passes)) * layers * token_numbers
            # The history has grown to twice its length.
            assert least < lane.copied - layers * token_numbers * 60 < 1.9 * most * least


def test_norms_and_evidence_of_streamed_layers_are_those_of_ordinary_ones() -> None:
    """Selections could agree by accident: what the selector is shown does not."""
    shown: dict[str, list[tuple[torch.Tensor, ...]]] = {"same": [], "cpu": []}

    class Looking:
        needs = frozenset({"key_norms"})

        def __init__(self, place: str, inner: Any) -> None:
            self.place, self.inner = place, inner

        def select(self, evidence: Any, budget: int) -> Selection:
            parts = (evidence.logits, evidence.key_norms, evidence.rest_mass)
            shown[self.place].append(tuple(part.clone() for part in parts))
            found: Selection = self.inner.select(evidence, budget)
            return found

    for place in shown:
        engine = host_engine("qwen3", WAYS[1], 16)
        config = POLICY.replace(history={"device": place}, slow_step="rectify")
        with engine.session(config.replace(refresh={"evidence_queries": 3})) as session:
            steps: Any = session._core._decoder.steps
            steps.selector = Looking(place, steps.selector)
            session.decode(PROMPT, max_new_tokens=30)
    assert len(shown["same"]) == len(shown["cpu"]) >= 16
    for one, other in zip(shown["same"], shown["cpu"], strict=True):
        for expected, got in zip(one, other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_only_one_layer_is_watched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their evidence shares a room."""
    order: list[tuple[str, int]] = []
    see, choose = LayerWatch.see, LayerWatch.choose

    def noted(name: str, inner: Any) -> Any:
        def call(self: LayerWatch, *arguments: Any) -> Any:
            order.append((name, id(self)))
            return inner(self, *arguments)

        return call

    monkeypatch.setattr(LayerWatch, "see", noted("see", see))
    monkeypatch.setattr(LayerWatch, "choose", noted("choose", choose))
    for slow_step in ("observe", "verify"):
        with host_engine("llama").session(on_host(POLICY.replace(slow_step=slow_step))) as session:
            session.decode(PROMPT, max_new_tokens=20)
    watching: set[int] = set()
    for name, watch in order:
        watching.add(watch)
        assert len(watching) == 1
        if name == "choose":
            watching.clear()
    assert sum(name == "choose" for name, _ in order) >= 12


def test_half_precision_and_long_histories_meet_the_compiled_rows() -> None:
    """bfloat16 beyond the length from which a CPU uses its own kernels; the same evidence."""
    from tests.families import FAMILIES, build_model, word_tokenizer

    family = next(family for family in FAMILIES if family.name == "qwen3")
    model = build_model(family, dtype=torch.bfloat16, max_position_embeddings=2048)
    config = POLICY.replace(memory={"selected_tokens": 2000})
    ids = [index % VOCABULARY for index in range(1300)]
    engine = Engine(model, word_tokenizer())
    with engine.session(config) as session:
        expected = session.decode(ids, max_new_tokens=8)
        keys = sequence_of(session).layers[0].history.joined(0, 1300).keys
        rows = keys.new_zeros(2, 2, keys.shape[-1])
        if row_kernels(rows, keys, keys) is None:
            pytest.skip("no C compiler on this machine")
        logits = session.next_logits()
    host = host_engine("qwen3", HostWays(room_bytes=1 << 19, chunk_bytes=1 << 18)).runner.host
    engine.runner.host = host
    with engine.session(on_host(config)) as session:
        got = session.decode(ids, max_new_tokens=8)
        if got == expected:
            assert close(session.next_logits(), logits, 0.05)
        assert got[0] == expected[0]


# ---------------------------------------------------------------- bytes, refusals, instruments


def test_on_a_cpu_the_setting_makes_no_difference() -> None:
    engine = tiny_engine("llama")
    with engine.session(on_host(POLICY)) as one, engine.session(POLICY) as other:
        assert one.decode(PROMPT, max_new_tokens=20) == other.decode(PROMPT, max_new_tokens=20)
        assert not sequence_of(one).streamed and sequence_of(one).host_bytes == 0
        assert one.stats == other.stats


def test_bytes_are_those_of_the_history_and_parts_those_of_the_device() -> None:
    engine = host_engine("gemma3")
    with engine.session(on_host(POLICY)) as session, engine.session(POLICY) as ordinary:
        for one in (session, ordinary):
            one.decode(PROMPT, max_new_tokens=12)
        sequence = sequence_of(session)
        assert session.stats.history_bytes == sequence.history_bytes
        # Two of four layers are sliding, and stay.
        away = [layer.history for layer in sequence.layers if layer.window is None]
        assert sequence.host_bytes == sum(history.owned_bytes for history in away) > 0
        parts = memory_parts(engine.runner, [sequence])
        assert parts["histories of 1 sequences"] == sequence.history_bytes - sequence.host_bytes
        assert parts["rooms for histories in host memory"] > 0
        other = memory_parts(engine.runner, [sequence_of(ordinary)])
        assert other["histories of 1 sequences"] == ordinary.stats.history_bytes
        assert "rooms for histories in host memory" not in other


@over_slow_steps
def test_a_full_device_is_said_and_the_session_goes_on(
    slow_step: SlowStepKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = host_engine("llama")
    room = HistoryStream._make_rooms

    def full(self: HistoryStream, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    config = POLICY.replace(slow_step=slow_step)
    with eager_engine("llama").session(config) as ordinary:
        expected = ordinary.decode(PROMPT, max_new_tokens=20)
    with engine.session(on_host(config)) as session:
        session.decode(PROMPT[:30], max_new_tokens=0)
        monkeypatch.setattr(HistoryStream, "_make_rooms", full)
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            session.decode(PROMPT[30:], max_new_tokens=20)
        assert "rooms for histories in host memory" in caught.value.parts
        assert session.token_ids == PROMPT and session.stats.history_tokens == 29
        monkeypatch.setattr(HistoryStream, "_make_rooms", room)
        got = session.decode([], max_new_tokens=20)
    assert got == expected


def test_instruments_see_all_keys_wherever_they_are() -> None:
    from sfi_agent.engine.instruments import FastAttention, Instruments

    seen: dict[str, list[torch.Tensor]] = {"same": [], "cpu": []}
    for place, kept in seen.items():

        def look(attention: FastAttention, kept: list[torch.Tensor] = kept) -> None:
            kept.extend(attention.all_keys_values())

        with host_engine("llama").session(POLICY.replace(history={"device": place})) as session:
            session.attach(Instruments(on_fast_attention=look))
            session.decode(PROMPT, max_new_tokens=5)
    same_contents(seen["same"], seen["cpu"])
    assert len(seen["cpu"]) == 2 * 3 * 4


def test_a_gather_by_the_host_is_said_once_with_its_reason() -> None:
    engine = host_engine("llama", WAYS[1])
    with capture_logs() as logs, engine.session(on_host(POLICY)) as session:
        session.decode(PROMPT, max_new_tokens=30)
    said = [entry for entry in logs if entry["event"] == "history_gathered_on_host"]
    assert [entry["reason"] for entry in said] == ["by choice"]
