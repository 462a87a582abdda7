"""The session benchmark: its long session, its arms, its disk, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import Engine, InputError, SessionConfig
from sfi_agent.embedded import checkpoint_path
from sfi_agent.embedded.tokenizer_build import build_tokenizer
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.errors import CheckpointError, TemplateError
from sfi_agent.evaluation.decode_benchmark import ModelSizes
from sfi_agent.evaluation.random_models import MODEL_SHAPES, build_random_model, outline_model
from sfi_agent.evaluation.session_benchmark import (
    ARMS,
    LongPart,
    SessionBenchmark,
    SessionOptions,
    TurnPart,
    benchmark_sessions,
    disk,
    needs,
    outline_checkpoint,
    position_room,
    saving,
    setting,
)
from sfi_agent.evaluation.session_benchmark.needs import Workload, disk_bytes
from sfi_agent.evaluation.session_benchmark.office_text import office_text
from sfi_agent.evaluation.session_benchmark.options import ChatLayout
from sfi_agent.evaluation.session_benchmark.quick_arms import QuickArms
from sfi_agent.evaluation.session_benchmark.records import SaveCost, Target, Timing
from sfi_agent.evaluation.session_benchmark.second_turn import measure_second_turn, plan_turn
from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
from sfi_agent.evaluation.session_benchmark.synthetic_chat import LongSession, open_long_session
from sfi_agent.evaluation.session_benchmark.targets import targets_of
from sfi_agent.evaluation.session_benchmark.turn_clock import TimedTurn, turn_cost
from sfi_agent.session.session import Session
from tests.test_cli.stand_in import stand_in_engine
from tests.tiny_tokenizers import chatml_tokenizer

CPU = torch.device("cpu")
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 2000,
    "tie_word_embeddings": True,
}
CONTEXT = 1500
OPTIONS = SessionOptions(
    rounds=2, save_rounds=2, turn_rounds=2, answer_tokens=200, nested_forks=3, more_tokens=3,
    turn_tokens=2, turn_context_tokens=1000,
)  # fmt: skip
COUNTS_MESSAGES = """\
{{ messages | length }} messages
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""Nothing can be appended to it: no control token, and its beginning depends on what follows."""
CONFIG = SessionConfig(memory={"selected_tokens": 64, "recent_tokens": 32, "sink_tokens": 4})
QUICK = (
    *("fork", "fork_policy", "fork_nested"),
    *("rewind_near", "rewind_far", "rewind_inside", "mark"),
)
DISK = ("save", "write", "save_again", "load_full", "load_sizes", "read")
LOGITS = ("logits", "logits_full", "logits_sizes")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SHAPES, "tiny", TINY)


def tiny_model(tokens: int = CONTEXT + position_room(OPTIONS)) -> Any:
    return build_random_model("tiny", device=CPU, dtype=torch.float32, context_tokens=tokens)


def tiny_sizes() -> ModelSizes:
    return ModelSizes.of(outline_model("tiny", dtype=torch.float32, context_tokens=1000))


def long_part(directory: Path, **changes: Any) -> LongPart:
    part = LongPart(
        make_model=tiny_model,
        tokenizer=build_tokenizer(),
        sizes=tiny_sizes(),
        context_tokens=CONTEXT,
        config=CONFIG,
        other_config=SessionConfig.preset("exact"),
        directory=directory,
    )
    return replace(part, **changes)


def turn_part(**changes: Any) -> TurnPart:
    engine = stand_in_engine()
    part = TurnPart("small", lambda: engine, ModelSizes.of(engine.model), 16384, CONFIG)
    return replace(part, **changes)


@contextmanager
def long_session(
    context: int = CONTEXT, answer: int = 200, seed: int = 1
) -> Iterator[tuple[Engine, LongSession]]:
    engine = Engine(tiny_model(context + 600), build_tokenizer())
    layout = ChatLayout.of(context, answer)
    config = CONFIG.replace(sampling={"max_new_tokens": 2})
    long = open_long_session(engine, config, layout, tiny_sizes(), seed, lambda _: None)
    with long.session:
        yield engine, long
    assert AttentionSwitch.of(engine.model).users == 0, "a session was left open"


# ---------------------------------------------------------------- the long session


@given(st.integers(1, 300_000), st.integers(64, 20_000))
def test_a_layout_fills_its_context_or_is_refused(context: int, answer: int) -> None:
    if context + 1 < answer + 64 + 256:
        with pytest.raises(InputError, match="tokens or more for one such answer"):
            ChatLayout.of(context, answer)
        return
    layout = ChatLayout.of(context, answer)
    short = layout.ids - layout.long_turns * layout.turn_ids
    assert layout.ids == context + 1 and layout.long_turns >= 1
    assert 256 <= short < 256 + layout.long_turns
    assert layout.turn_ids - answer >= 64, "no room for a prompt"


@pytest.mark.parametrize(("context", "answer", "seed"), [(1500, 200, 1), (701, 380, 7)])
def test_the_long_session_is_what_a_real_one_would_have_left(
    context: int, answer: int, seed: int
) -> None:
    with long_session(context, answer, seed) as (engine, long):
        session, tokenizer = long.session, engine.tokenizer
        assert tokenizer is not None
        ids = session.token_ids
        assert len(ids) == context + 1 and session.stats.history_tokens == context
        spans = session._chat.transcript.spans if session._chat is not None else ()
        assert [span.kind for span in spans] == ["prompt", "output"] * (len(spans) // 2)
        assert spans[-1].end == len(ids) and all(span.complete for span in spans)
        outputs = [span for span in spans if span.kind == "output"]
        lengths = [span.end - span.start for span in outputs]
        assert min(lengths[:-1]) >= answer and sum(lengths) == long.generated_tokens
        assert lengths[-2] == long.long_answer_tokens and lengths[-1] < 300
        for span in outputs:
            assert ids[span.end - 1] == tokenizer.eos_token_id
            text = str(tokenizer.decode(ids[span.start : span.end - 1]))
            assert span.messages[0]["content"] == text.strip()
        trace = session.trace
        assert len(trace) == long.generated_tokens
        assert [ids[record.position] for record in trace] == [r.token_id for r in trace]
        assert long.first_turn_end == outputs[0].end and long.last_turn_start == outputs[-2].end
        logits = session.next_logits()
        assert torch.isfinite(logits).all() and logits.std() > 0


def test_a_message_goes_on_behind_the_long_session() -> None:
    with long_session() as (_, long):
        before = len(long.session.token_ids)
        usage = long.session.send("Which rooms are free?").usage
        assert usage.cached_tokens == CONTEXT and usage.reuse_lost_reason is None
        assert usage.prompt_tokens == before - 1 + usage.prefilled_tokens
        assert 1 < usage.prefilled_tokens < 100


def test_histories_follow_from_the_seed() -> None:
    rows = []
    for seed in (1, 1, 2):
        with long_session(seed=seed) as (_, long):
            rows.append((long.session.token_ids, long.session.next_logits()))
    assert rows[0][0] == rows[1][0] and torch.equal(rows[0][1], rows[1][1])
    assert rows[0][0] != rows[2][0] and not torch.equal(rows[0][1], rows[2][1])


@settings(max_examples=20, deadline=None)
@given(st.integers(200, 9000), st.integers(0, 50))
def test_texts_are_as_long_as_they_may_be(limit: int, seed: int) -> None:
    def count(text: str) -> int:
        return len(text.split())

    text = office_text(limit, seed, count)
    longer = office_text(limit + 60, seed, count)
    assert limit - 60 < count(text) <= limit
    assert longer.startswith(text) and len(longer) > len(text)


# ---------------------------------------------------------------- forks, rewinds and marks


def quick_arms(long: LongSession) -> QuickArms:
    return QuickArms(long, SessionConfig.preset("exact"), 3, Stopwatch(CPU))


def test_quick_arms_take_time_and_leave_the_session_alone() -> None:
    with long_session() as (engine, long):
        session = long.session
        logits = session.next_logits()
        before = (session.token_ids, session.messages, session.trace, session.stats)
        quick = quick_arms(long)
        samplers = quick.samplers(ARMS)
        assert tuple(samplers) == QUICK
        assert all(0 < sample() < 10 for sample in samplers.values())
        # The session, and the chain that the nested fork is one of.
        assert AttentionSwitch.of(engine.model).users == 1 + 3
        quick.close()
        assert AttentionSwitch.of(engine.model).users == 1
        assert (session.token_ids, session.messages, session.trace, session.stats) == before
        assert torch.equal(session.next_logits(), logits)
        assert tuple(quick.samplers(("mark",))) == ("mark",)
        assert tuple(quick.samplers(("rewind",))) == QUICK[3:6]


def test_nested_forks_are_forks_of_forks_that_went_on() -> None:
    with long_session() as (_, long):
        quick = quick_arms(long)
        try:
            with quick.forks()["fork_nested"]() as deepest:
                assert deepest.stats.history_tokens == CONTEXT + 3 * 2
                assert deepest.token_ids[: CONTEXT + 1] == long.session.token_ids
                extents = deepest._core._opened().sequence.layers[0].history.extents
                assert len(extents) == 4, "a fork in between has nothing of its own"
            with quick.forks()["fork_policy"]() as other:
                assert other.config == SessionConfig.preset("exact")
        finally:
            quick.close()


def test_rewinds_go_where_they_say() -> None:
    with long_session() as (_, long):
        assert long.session._chat is not None
        spans = long.session._chat.transcript.spans
        places = quick_arms(long).rewinds()
        assert places["rewind_near"] in [s.start for s in spans if s.kind == "prompt"]
        assert places["rewind_far"] == spans[1].end < CONTEXT // 2
        inside = [s for s in spans if s.start < places["rewind_inside"] < s.end]
        assert [s.kind for s in inside] == ["output"]
        # Nearly all of it stays, and has to be read again.
        assert inside[0].end - places["rewind_inside"] <= 16 < long.long_answer_tokens


def test_a_fork_takes_no_tensors_and_a_copy_would_be_seen() -> None:
    with long_session() as (_, long):
        session = long.session
        quick = quick_arms(long)
        cost = quick.fork_cost(session.fork)
        assert cost.history_bytes == 0 and cost.shared_tokens == CONTEXT
        assert 0 <= cost.tensor_bytes < 1000
        kept: list[torch.Tensor] = []

        def copying() -> Session:
            for layer in session._core._opened().sequence.layers:
                piece = layer.history.joined(0, CONTEXT)
                kept.extend((piece.keys.clone(), piece.values.clone()))
            return session.fork()

        copied = quick.fork_cost(copying)
        assert copied.tensor_bytes - cost.tensor_bytes == CONTEXT * tiny_sizes().token_bytes


def test_growth_counts_storages_once() -> None:
    size = random.randint(1, 2_000_000)

    def allocate() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.empty(size, dtype=torch.uint8)
        return whole, whole[: size // 2]

    growth, _ = Stopwatch(CPU).growth(allocate)
    assert growth.tensor_bytes == size
    assert growth.resident_bytes is None or growth.resident_bytes < size + (1 << 24)


def test_the_stopwatch() -> None:
    def slow() -> int:
        time.sleep(0.05)
        return 7

    seconds, result = Stopwatch(CPU).time(slow)
    assert 0.05 <= seconds < 5 and result == 7


# ---------------------------------------------------------------- disk


@settings(max_examples=8, deadline=None)
@given(size=st.one_of(st.integers(0, 100_000), st.integers((1 << 24) - 2, (1 << 24) + 3)))
def test_plain_files(size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("plain") / "file"
    assert disk.plain_write(file, size) > 0
    assert file.stat().st_size == size
    with pytest.raises(FileExistsError):
        disk.plain_write(file, size)
    assert disk.forget_cached([file]) == hasattr(os, "posix_fadvise")
    assert disk.plain_read([file, file]) > 0
    data = file.read_bytes()
    assert size < 1000 or len(set(data)) > 100, "zeros would be easy for some disks"


def test_the_file_system_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a folder" / "deeper"
    inner.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    spaced = str(tmp_path / "a folder").replace(" ", "\\040")
    mounts.write_text(
        f"/dev/x / ext4 rw 0 0\ntmpfs {spaced} tmpfs rw 0 0\nq {spaced}er xfs rw 0 0\n"
    )
    monkeypatch.setattr(disk, "_MOUNTS", mounts)
    assert disk.disk_facts(inner).file_system == "tmpfs"
    assert disk.disk_facts(tmp_path).file_system == "ext4"
    assert disk.disk_facts(tmp_path).free_bytes > 0
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "nowhere")
    assert disk.disk_facts(inner).file_system == ""


# ---------------------------------------------------------------- everything in one run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def result(folder: Path) -> Iterator[SessionBenchmark]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_SHAPES, "tiny", TINY)
        yield benchmark_sessions(CPU, long_part(folder), turn_part(), OPTIONS)


def test_every_arm_is_measured(result: SessionBenchmark) -> None:
    assert set(result.times) == {*QUICK, *DISK, *LOGITS}
    for arm, timing in result.times.items():
        low, high = timing.quartile_seconds
        assert len(timing.samples_seconds) == 2, arm
        assert 0 < low <= timing.median_seconds <= high, arm
    assert set(result.forks) == set(QUICK[:3])
    for cost in result.forks.values():
        assert cost.history_bytes == 0 and cost.tensor_bytes < 1000
    assert result.long is not None
    assert result.long.context_tokens == CONTEXT
    assert result.long.history_bytes == CONTEXT * tiny_sizes().token_bytes
    assert {arm for arm, (present, kept) in result.long.rewinds.items() if kept < present} == {
        *QUICK[3:6]
    }


def test_saves_and_loads(result: SessionBenchmark, folder: Path) -> None:
    save, load, long = result.save, result.load, result.long
    assert save is not None and load is not None and long is not None
    assert list(folder.iterdir()) == [], "something was left on the disk"
    assert save.bytes_written == save.bytes_total >= long.history_bytes
    assert save.more_tokens == (
        result.long_turn.usage.prefilled_tokens + 2 if result.long_turn else 0
    )
    token_bytes = tiny_sizes().token_bytes
    more = save.more_tokens * token_bytes
    # The keys and values of the new tokens, and what describes them; none of the old ones.
    assert more <= save.again_bytes_written < long.history_bytes // 2 + more
    assert load.bytes_read == save.again_bytes_total >= long.history_bytes + more
    assert load.logits_difference < 1e-5
    times = result.times
    expected = times["write"].median_seconds / times["save"].median_seconds
    assert save.share_of_write == pytest.approx(expected)
    expected = times["read"].median_seconds / times["load_full"].median_seconds
    assert load.share_of_read == pytest.approx(expected)


def test_turns_process_what_is_new(result: SessionBenchmark) -> None:
    assert result.long_turn is not None and result.second_turn is not None
    assert result.long_turn.only_new and result.long_turn.usage.cached_tokens == CONTEXT
    second = result.second_turn
    assert second.reason == "" and second.asked_tokens == 1000
    assert 900 < second.prompt_tokens <= 1000
    assert second.turn.only_new and second.turn.new_tokens < 150
    # Without a past, everything is new; the answer of turn 1 may be written in other tokens.
    assert second.anew.only_new and second.anew.usage.cached_tokens == 0
    assert abs(second.anew.usage.prompt_tokens - second.turn.usage.prompt_tokens) < 20
    assert second.turn.usage.output_tokens <= 2
    for cost in (second.turn, second.anew, result.long_turn):
        assert cost.first_token.median_seconds <= cost.whole.median_seconds
    assert second.times_faster == pytest.approx(
        second.anew.first_token.median_seconds / second.turn.first_token.median_seconds
    )


def test_the_result_is_json(result: SessionBenchmark) -> None:
    document = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(document["targets"]) == {*QUICK[:6], "save", "long_turn", "turn"}
    for arm in QUICK[:6]:
        target = document["targets"][arm]
        assert target["measured"] == document["times"][arm]["median_seconds"]
        assert target["met"] == (target["measured"] <= 0.005)
    assert document["targets"]["save"]["limit"] == 0.7
    assert document["targets"]["turn"]["met"] and document["second_turn"]["turn"]["only_new"]
    assert document["second_turn"]["times_faster"] > 0 and document["long_turn"]["only_new"]
    assert document["disk"]["free_bytes"] > 0


def test_arms_that_are_not_wanted_cost_nothing(tmp_path: Path) -> None:
    def fail() -> Any:
        pytest.fail("it was built")

    rewinds = benchmark_sessions(
        CPU, long_part(tmp_path / "missing"), None, replace(OPTIONS, arms=("rewind",))
    )
    assert tuple(rewinds.times) == QUICK[3:6] and rewinds.disk is None
    assert (rewinds.save, rewinds.second_turn, rewinds.long_turn) == (None, None, None)
    turn = benchmark_sessions(CPU, None, turn_part(), replace(OPTIONS, arms=("turn",)))
    assert turn.second_turn is not None and turn.long is None and not turn.times
    assert set(turn.targets) == {"turn"}
    saves = benchmark_sessions(CPU, long_part(tmp_path), None, replace(OPTIONS, arms=("save",)))
    assert set(saves.times) == {*DISK, *LOGITS} and not saves.forks


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise OSError("no space left")

    monkeypatch.setattr(saving, "plain_write", broken)
    models: list[Any] = []

    def make_model() -> Any:
        models.append(tiny_model())
        return models[-1]

    with pytest.raises(OSError, match="no space left"):
        benchmark_sessions(
            CPU, long_part(tmp_path, make_model=make_model), None, replace(OPTIONS, arms=("save",))
        )
    assert list(tmp_path.iterdir()) == []
    assert AttentionSwitch.of(models[0]).users == 0


def test_who_saves_first_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    save = Session.save

    def noted(session: Session, directory: Any, **more: Any) -> Any:
        order.append("again" if Path(directory).exists() else "save")
        return save(session, directory, **more)

    def write(path: Path, size_bytes: int) -> float:
        path.touch()
        order.append("write")
        return 0.25 + size_bytes * 0

    monkeypatch.setattr(Session, "save", noted)
    monkeypatch.setattr(saving, "plain_write", write)
    options = replace(OPTIONS, arms=("save",), save_rounds=3)
    found = benchmark_sessions(CPU, long_part(tmp_path), None, options)
    # A plain write that does not count comes before both.
    first, second = ["write", "save", "write", "again"], ["write", "write", "save", "again"]
    assert order == first + second + first
    assert found.times["write"].samples_seconds == (0.25,) * 3


def test_who_reads_first_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    load = Engine.load_session

    def noted(engine: Engine, directory: Any, *, check: Any) -> Session:
        order.append(check)
        return load(engine, directory, check=check)

    def read(_: list[Path]) -> float:
        order.append("read")
        return 0.25

    monkeypatch.setattr(Engine, "load_session", noted)
    monkeypatch.setattr(saving, "plain_read", read)
    options = replace(OPTIONS, arms=("save",), save_rounds=3)
    benchmark_sessions(CPU, long_part(tmp_path), None, options)
    assert order == ["read", "full", "sizes", "full", "sizes", "read", "sizes", "read", "full"]


# ---------------------------------------------------------------- turn 2


@given(st.one_of(st.none(), st.integers(1, 60_000)), st.integers(1, 140_000), st.integers(1, 400))
def test_the_length_of_the_first_prompt(asked: int | None, limit: int, answer: int) -> None:
    longest = limit - 512 - 2 * answer
    refused = longest < 512 or (asked is not None and not 512 <= asked <= longest)
    if refused:
        with pytest.raises(InputError, match="turn 2 of a chat"):
            plan_turn(asked, limit, answer)
        return
    plan = plan_turn(asked, limit, answer)
    assert plan.asked_tokens == (asked or 32768)
    assert plan.prompt_tokens == min(plan.asked_tokens, longest)
    assert bool(plan.reason) == (plan.prompt_tokens < plan.asked_tokens)
    assert not plan.reason or f"{limit:,}" in plan.reason


def test_a_template_that_rewrites_the_past_misses_the_target() -> None:
    tokenizer = chatml_tokenizer(COUNTS_MESSAGES)
    model = build_random_model("tiny", device=CPU, dtype=torch.float32, context_tokens=9000)
    measured = measure_second_turn(
        Engine(model, tokenizer), "odd", CONFIG.replace(mode="dense"), plan_turn(3000, 9000, 2),
        rounds=2, turn_tokens=2, seed=1, on_progress=lambda _: None,
    )  # fmt: skip
    turn = measured.turn
    assert turn.usage.reuse_lost_reason == "template_rewrote_history" and not turn.only_new
    target = targets_of({}, None, None, measured)["turn"]
    assert not target.met and target.measured > target.limit


def test_a_tokenizer_without_a_template_is_refused() -> None:
    model = build_random_model("tiny", device=CPU, dtype=torch.float32, context_tokens=9000)
    for tokenizer in (None, chatml_tokenizer(None)):
        with pytest.raises(TemplateError):
            measure_second_turn(
                Engine(model, tokenizer), "mute", CONFIG, plan_turn(3000, 9000, 2),
                rounds=2, turn_tokens=2, seed=1, on_progress=lambda _: None,
            )  # fmt: skip


def test_the_worst_of_several_turns_is_reported(result: SessionBenchmark) -> None:
    assert result.second_turn is not None
    usage = result.second_turn.turn.usage
    worse = replace(
        usage,
        cached_tokens=usage.cached_tokens - 9,
        prefilled_tokens=usage.prefilled_tokens + 9,
    )

    class Answered:
        def __init__(self, usage: Any) -> None:
            self.usage = usage

    def turn(usage: Any) -> TimedTurn:
        reply: Any = Answered(usage)
        return TimedTurn(reply, result.second_turn.turn.new_tokens, 0.1, 0.2)  # type: ignore[union-attr]

    for turns in ([turn(usage), turn(worse)], [turn(worse), turn(usage)]):
        assert turn_cost(turns).usage == worse and not turn_cost(turns).only_new
    assert turn_cost([turn(usage)] * 2).only_new


# ---------------------------------------------------------------- targets


def test_targets_are_met_or_missed() -> None:
    slow, quick = Timing.of([0.006, 0.0051, 0.009]), Timing.of([0.001, 0.004, 0.9])
    save = SaveCost(10, 10, 0.69, 1, 1, 11)
    found = targets_of({"fork": quick, "rewind_far": slow, "save": slow}, save, None, None)
    assert {name: target.met for name, target in found.items()} == {
        "fork": True,
        "rewind_far": False,
        "save": False,
    }
    assert Target(0.7, "share", 0.7, higher_is_better=True).met
    assert Target(0.005, "seconds", 0.005).met


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": ()}, "no arm"),
        ({"arms": ("fork", "load")}, "'load'; allowed: fork, rewind"),
        ({"rounds": 1}, "rounds 1; allowed: 2 or more"),
        ({"save_rounds": 1}, "save rounds 1"),
        ({"turn_rounds": 0}, "turn rounds 0"),
        ({"answer_tokens": 63}, "answer tokens 63"),
        ({"nested_forks": 0}, "nested forks 0"),
        ({"more_tokens": 0}, "more tokens 0"),
        ({"turn_tokens": 0}, "turn tokens 0"),
        ({"answer_tokens": 1200}, "allowed: 1,519 tokens or more for one such answer"),
        ({"turn_context_tokens": 16000}, "a first prompt of 16,000 tokens"),
        ({"turn_context_tokens": 100}, "512 or more"),
    ],
)
def test_what_has_no_meaning_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    def fail() -> Any:
        pytest.fail("it was built")

    long, turn = long_part(tmp_path, make_model=fail), turn_part(make_engine=fail)
    with pytest.raises(InputError, match=said):
        benchmark_sessions(CPU, long, turn, replace(OPTIONS, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    sizes = replace(tiny_sizes(), vocabulary_size=500)
    with pytest.raises(InputError, match="a vocabulary of 500; allowed: 1,863 or more"):
        benchmark_sessions(CPU, long_part(tmp_path, sizes=sizes), None, OPTIONS)


@pytest.mark.parametrize(
    ("memory", "free_disk", "file_system", "said"),
    [
        (10**6, 10**12, "ext4", "needed in memory .*weights .* GB, a history of 1,759 tokens"),
        (10**12, 10**3, "ext4", "needed in /.*a saved session of 1,759 tokens .*--directory"),
        (200 * 10**6, 10**12, "tmpfs", r"a plain file as large \(tmpfs\)"),
    ],
)
def test_what_finds_no_room_is_refused_before_it_is_built(
    memory: int,
    free_disk: int,
    file_system: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Any:
        pytest.fail("it was built")

    facts = replace(disk.disk_facts(tmp_path), free_bytes=free_disk, file_system=file_system)
    monkeypatch.setattr(needs, "free_bytes", lambda _: memory)
    monkeypatch.setattr(setting, "disk_facts", lambda _: facts)
    if file_system == "tmpfs":
        monkeypatch.setattr(setting, "disk_bytes", lambda *_: {"a plain file as large": 10**9})
    with pytest.raises(InputError, match=said):
        benchmark_sessions(CPU, long_part(tmp_path, make_model=fail), None, OPTIONS)


def test_no_room_for_turn_2_is_found_out_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        pytest.fail("it was built")

    engine = stand_in_engine()
    large = replace(ModelSizes.of(engine.model), weight_bytes=10**15)
    with pytest.raises(InputError, match=r"weights 1000000.00 GB, 2 histories of 1,256 tokens"):
        benchmark_sessions(
            CPU, long_part(tmp_path, make_model=fail), turn_part(sizes=large), OPTIONS
        )


def test_what_a_long_session_needs() -> None:
    sizes = ModelSizes.of(outline_model("qwen3-0.6b", dtype=torch.bfloat16, context_tokens=1000))
    parts = Workload(sizes, CPU, 100_272, SessionConfig()).device_bytes()
    # 28 layers, 8 heads of 128, keys and values, two bytes each.
    assert parts["a history of 100,272 tokens"] == 100_272 * 28 * 8 * 128 * 2 * 2
    assert parts["weights"] == pytest.approx(1.19e9, rel=0.01)
    assert "ids and records" in parts and 12.6e9 < sum(parts.values()) < 14e9
    on_disk = disk_bytes(sizes, 100_272)
    assert len(on_disk) == 2 and 23e9 < sum(on_disk.values()) < 24e9
    load = Workload(sizes, torch.device("cuda"), 1000, SessionConfig(), sessions=2)
    cuda = load.device_bytes()
    assert cuda["2 histories of 1,000 tokens"] == 2 * 1000 * sizes.token_bytes
    assert "logits of captured steps" in cuda and "ids and records" not in cuda
    assert load.host_bytes() == {}
    offloaded = replace(load, config=SessionConfig(history={"device": "cpu"}))
    assert offloaded.host_bytes() == {"2 histories of 1,000 tokens": 2 * 1000 * sizes.token_bytes}
    assert offloaded.device_bytes()["2 histories of 1,000 tokens"] == 0


# ---------------------------------------------------------------- sizes of checkpoints


def test_the_outline_of_a_checkpoint() -> None:
    outline = outline_checkpoint(checkpoint_path(), "auto")
    loaded = Engine.from_pretrained(checkpoint_path(), device="cpu").model
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert ModelSizes.of(outline) == ModelSizes.of(loaded)
    half = ModelSizes.of(outline_checkpoint(checkpoint_path(), torch.bfloat16))
    assert half.weight_bytes * 2 == ModelSizes.of(loaded).weight_bytes


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nothing"}'])
def test_no_configuration_is_an_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="read the configuration of"):
        outline_checkpoint(tmp_path, "auto")
