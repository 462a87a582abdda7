"""Captured and compiled steps on a CUDA device equal eager ones and allocate nothing that grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.engine.programs.program import Program
from sfi_agent.evaluation.random_models import MODEL_SHAPES, build_random_model
from sfi_agent.observe.trace import SlowStepKind
from tests.families import FAMILIES, build_model, word_tokenizer
from tests.test_engine.program_cases import (
    POLICY,
    agree,
    counted_requests,
    records_of,
    tell,
    told,
)
from tests.test_guarantees.test_bfloat16 import ROUNDING

DEVICE = "cuda"
CONTEXT_TOKENS = 32_768
PROMPT = list(range(60))
SEGMENTS = POLICY.replace(
    boundaries=[{"name": "interval", "every_tokens": 5}],
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 7},
)
"""Blocks of at most eight tokens: one program for all of them."""
ANY_TEXT = SEGMENTS.replace(
    memory={"selected_tokens": 4000}, sampling={"temperature": 1.0, "seed": 5}
)
SAMPLED = SEGMENTS.replace(sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 3})

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
HELD = ("qwen3", "llama", "gemma2", "gemma3", "gpt_oss")
"""Families with head sizes that the kernels take."""
over_slow_steps = pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])


@lru_cache
def model_on_device(name: str, dtype: torch.dtype) -> Any:
    """A family's model with room for long histories."""
    family = next(family for family in FAMILIES if family.name == name)
    model = build_model(family, dtype=dtype, device=DEVICE, max_position_embeddings=CONTEXT_TOKENS)
    if name == "gpt_oss":
        # The usual way to compute experts waits for the host in float32, and cannot be captured.
        model.set_experts_implementation("batched_mm")
    return model


@lru_cache
def eager_engine(name: str, dtype: torch.dtype = torch.float32) -> Engine:
    """Plain forward passes on the device."""
    return Engine(model_on_device(name, dtype), word_tokenizer(), execution="eager")


@lru_cache
def captured_engine(name: str, dtype: torch.dtype = torch.float32) -> Engine:
    """The same model, its steps captured when they first happen."""
    return Engine(model_on_device(name, dtype), word_tokenizer())


def all_captured(engine: Engine) -> bool:
    """Whether nothing went wrong with capture so far."""
    programs = engine.runner.programs
    return programs is not None and programs.captures and not programs.problem


@contextmanager
def captures() -> Iterator[list[Program]]:
    """The programs that are captured inside this block."""
    made: list[Program] = []
    capture = Program.capture

    def counting(program: Program, pool: Any) -> None:
        capture(program, pool)
        made.append(program)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Program, "capture", counting)
        yield made


def decoding(new_tokens: int) -> Any:
    def act(session: Session) -> None:
        session.decode(PROMPT, max_new_tokens=new_tokens)

    return act


@over_slow_steps
def test_captured_steps_equal_eager_ones(slow_step: SlowStepKind) -> None:
    config, whole = SEGMENTS.replace(slow_step=slow_step), 0
    for family in HELD:
        expected = tell(eager_engine(family), config, decoding(500), logits=True)
        with counted_requests() as counts:
            got = tell(captured_engine(family), config, decoding(500), logits=False)
        whole += agree(expected, got, config)
        assert len(got.records) == 500 and counts["FastStep"] > 300
        assert (counts["BlockStep"] > 50) == (slow_step == "verify")
        assert all_captured(captured_engine(family))
    assert whole >= 2, "rounding decided too often"


@over_slow_steps
def test_captured_steps_draw_as_eager_ones(slow_step: SlowStepKind) -> None:
    config, whole = SAMPLED.replace(slow_step=slow_step), 0
    for family in HELD:
        expected = tell(eager_engine(family), config, decoding(100), logits=True)
        got = tell(captured_engine(family), config, decoding(100), logits=False)
        whole += agree(expected, got, config)
        assert len({record.token_id for record in got.records}) > 20
    assert whole >= 2, "rounding decided too often"


@over_slow_steps
def test_a_captured_batch_equals_eager_sessions_alone(slow_step: SlowStepKind) -> None:
    """Greedy and sampled rows, two selectors, prompts of different lengths, a fork of the first."""
    greedy, sampled = (policy.replace(slow_step=slow_step) for policy in (SEGMENTS, SAMPLED))
    configs = [greedy, sampled, greedy.replace(selector={"name": "kl_fusion"}), sampled]
    prompts = [PROMPT, PROMPT[:17], PROMPT[5:], []]

    def act(engine: Engine, *, batch: bool) -> list[Any]:
        with ExitStack() as stack:
            sessions = [stack.enter_context(engine.session(config)) for config in configs[:3]]
            sessions[0].decode(PROMPT, max_new_tokens=3)
            sessions.append(stack.enter_context(sessions[0].fork(configs[3])))
            found = [told(session, logits=not batch, refreshes=True) for session in sessions]
            if batch:
                engine.decode_batch(sessions, prompts, max_new_tokens=[40, 50, 60, 50])
            else:
                for session, prompt, limit in zip(sessions, prompts, (40, 50, 60, 50), strict=True):
                    session.decode(prompt, max_new_tokens=limit)
            for one, session in zip(found, sessions, strict=True):
                one.records = records_of(session)
        return found

    whole = 0
    for family in HELD:
        expected = act(eager_engine(family), batch=False)
        got = act(captured_engine(family), batch=True)
        for one, other, config in zip(expected, got, configs, strict=True):
            whole += agree(one, other, config)
        assert all_captured(captured_engine(family))
    assert whole >= 10, "rounding decided too often"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("early_launch", [False, True])
def test_compiled_steps_equal_eager_ones(early_launch: bool) -> None:
    engine = Engine(model_on_device("qwen3", torch.float32), word_tokenizer())
    said: list[str] = []
    report = engine.warmup(SEGMENTS, early_launch=early_launch, on_progress=said.append)
    assert report.compiled and report.captured and report.reason == "" and report.seconds > 0
    assert any("compiled" in text for text in said)
    expected = tell(eager_engine("qwen3"), SEGMENTS, decoding(500), logits=True)
    with captures() as made:
        got = tell(engine, SEGMENTS, decoding(500), logits=False)
    agree(expected, got, SEGMENTS)
    # The rules of `agree` would accept an early difference.
    first, second = ([r.token_id for r in one.records] for one in (expected, got))
    assert first[:60] == second[:60]
    assert not made, "something was captured after the warm-up"
    assert all_captured(engine)


@pytest.mark.timeout(400)
def test_kernels_that_start_early_read_what_was_written() -> None:
    """Layers of a published size, so that kernels overlap as they do in use: a kernel that read too
    soon would now and then read something else, and seldom what eager steps read."""
    shape = {**MODEL_SHAPES["qwen3-4b"], "num_hidden_layers": 6, "vocab_size": 4096}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODEL_SHAPES, "six-layers", shape)
        model = build_random_model(
            "six-layers",
            device=torch.device(DEVICE),
            dtype=torch.bfloat16,
            context_tokens=CONTEXT_TOKENS,
        )
    torch.manual_seed(0)
    prompt = torch.randint(4096, (3000,)).tolist()

    def act(session: Session) -> None:
        session.decode(prompt, max_new_tokens=400)

    engine = Engine(model)
    report = engine.warmup(ANY_TEXT, early_launch=True)
    assert report.compiled and report.captured
    first, second = (tell(engine, ANY_TEXT, act, logits=False) for _ in range(2))
    ids, again = ([r.token_id for r in one.records] for one in (first, second))
    assert ids == again and len(set(ids)) > 100
    expected = tell(Engine(model, execution="eager"), ANY_TEXT, act, logits=True)
    agree(expected, first, ANY_TEXT, tolerance=5 * ROUNDING)
    # The rules of `agree` would accept an early difference.
    assert ids[:40] == [r.token_id for r in expected.records][:40]


@pytest.mark.parametrize("family", HELD)
def test_captured_steps_part_from_eager_ones_in_bfloat16_only_where_rounding_decides(
    family: str,
) -> None:
    """Full budget, so that rounding cannot change what a step sees; the rule of
    `test_bfloat16`, with 5 roundings as in `test_gpu`."""
    config = SEGMENTS.replace(memory={"selected_tokens": 1000})
    expected = tell(eager_engine(family, torch.bfloat16), config, decoding(200), logits=True)
    got = tell(captured_engine(family, torch.bfloat16), config, decoding(200), logits=False)
    agree(expected, got, config, tolerance=5 * ROUNDING)
    assert all_captured(captured_engine(family, torch.bfloat16))


def test_most_of_bfloat16_parts_nowhere() -> None:
    """The rule above would also accept sessions that part at their first token."""
    config = SEGMENTS.replace(memory={"selected_tokens": 1000})
    same = 0
    for family in HELD:
        for first in range(4):

            def act(session: Session, first: int = first) -> None:
                session.decode(PROMPT[first:], max_new_tokens=12)

            one = tell(eager_engine(family, torch.bfloat16), config, act, logits=False)
            other = tell(captured_engine(family, torch.bfloat16), config, act, logits=False)
            same += [r.token_id for r in one.records] == [r.token_id for r in other.records]
    assert same >= 6


def growth_of_64_tokens(engine: Engine, config: SessionConfig, tokens: int) -> int:
    """Bytes that decoding takes at most beyond what is there when it begins."""
    with engine.session(config) as session:
        session.decode([index % 97 for index in range(tokens)], max_new_tokens=24)
        # Once to capture what it needs, once to measure.
        for _ in range(2):
            # What rectify left open is processed here: the next decoding begins with one token.
            session.decode([], max_new_tokens=1)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with captures() as made:
                session.decode([], max_new_tokens=64)
        assert not made, "what is captured allocates"
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@over_slow_steps
def test_decoding_allocates_nothing_that_grows_with_the_history(slow_step: SlowStepKind) -> None:
    config = SEGMENTS.replace(slow_step=slow_step, history={"reserve_tokens": 21_000})
    engine = captured_engine("qwen3")
    # The long one first: programs for it serve the short one as well.
    long = growth_of_64_tokens(engine, config, 20_000)
    short = growth_of_64_tokens(engine, config, 5_000)
    # One byte per token would be 15 000 more.
    assert long - short < 8192, (long, short)


def test_a_second_warm_up_captures_nothing() -> None:
    engine = Engine(model_on_device("llama", torch.float32), word_tokenizer())
    config = SEGMENTS.replace(slow_step="verify")
    options: Any = {"batch": 2, "context_tokens": 9000, "compiled": False}
    with captures() as made:
        first = engine.warmup(config, **options)
        assert made and first.captured and not first.compiled
        made.clear()
        said: list[str] = []
        second = engine.warmup(config, **options, on_progress=said.append)
        assert second.captured and second.reason == ""
        assert not made and not said
        # Nor does a batch of what was prepared, longer than the least class.
        with engine.session(config) as one, engine.session(config) as other:
            ids = [index % 97 for index in range(8400)]
            engine.decode_batch([one, other], [ids, PROMPT], max_new_tokens=30)
        assert not made
