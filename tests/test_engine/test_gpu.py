"""The guarantees on a CUDA device, in float32 and bfloat16, and what only a device can show.

Run with `python -m pytest -m gpu`; needs no package beyond those of the engine and pytest.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sfi_agent import Engine, SessionConfig
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.history import Piece
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.sampling import Sampler, entropy_nats, uniform_noise
from sfi_agent.engine.sdpa import attend_history, attend_rows, lse_kernel, reference_attention
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.plugins import build_selector
from tests.families import FAMILIES, Family, build_model, word_tokenizer
from tests.reference import dense_logits
from tests.test_engine.test_sdpa import assert_near, by_the_book, causal, draw
from tests.test_guarantees.adversaries import (
    ADVERSARIAL_DETECTORS,
    ADVERSARIAL_SELECTORS,
    adversaries,
)
from tests.test_guarantees.play import close, play, same_tokens
from tests.test_guarantees.policies import (
    FILLING_SELECTORS,
    block_policies,
    dense_twin,
    for_each,
    sparse_policies,
)
from tests.test_guarantees.test_bfloat16 import _ROUTED, ROUNDING
from tests.test_guarantees.test_rectify import dense_history, same_history, watch_histories
from tests.test_guarantees.test_replay import check_replay

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

TURNS = [list(range(60)), [7, 7, 3], []]
FEW = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 7}],
    memory={"sink_tokens": 2, "selected_tokens": 8, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 16},
)
EVERYTHING = FEW.replace(memory={"selected_tokens": 1000})

over_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@lru_cache
def _engine(name: str, dtype: torch.dtype) -> Engine:
    family = next(family for family in FAMILIES if family.name == name)
    model = build_model(family, dtype=dtype, device=DEVICE)
    return Engine(model, word_tokenizer(), prefill_chunk_tokens=16)


def engine_of(family: Family, dtype: torch.dtype) -> Engine:
    """The shared engine of a family on the device."""
    return _engine(family.name, dtype)


@over_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_budget_equals_dense(family: Family, dtype: torch.dtype) -> None:
    """float32: 1e-4 of the largest logit. bfloat16: the gap rule of `test_bfloat16`, with 5
    instead of 4 roundings: Qwen2 on an H200 flips a token that led by three steps of bfloat16."""
    engine = engine_of(family, dtype)
    exact = dtype is torch.float32
    dense = play(engine, EVERYTHING.replace(mode="dense"), TURNS, new_tokens=20)
    sparse = play(engine, EVERYTHING, TURNS, new_tokens=20)
    if same_tokens(dense, sparse, EVERYTHING, tolerance=1e-4 if exact else 5 * ROUNDING):
        assert dense.ids == sparse.ids
    if exact or family.name not in _ROUTED:
        expected = dense_logits(engine.model, sparse.ids)
        for row, logits in sparse.row_logits.items():
            assert close(logits, expected[row], 1e-4 if exact else 16 * ROUNDING), f"row {row}"


@pytest.mark.parametrize("selector", FILLING_SELECTORS, ids=str)
def test_every_selector_that_fills_its_budget_equals_dense(selector: dict[str, Any]) -> None:
    engine = engine_of(FAMILIES[0], torch.float32)
    played = play(engine, EVERYTHING.replace(selector=selector), TURNS, new_tokens=20)
    expected = dense_logits(engine.model, played.ids)
    for row, logits in played.row_logits.items():
        assert close(logits, expected[row]), f"row {row}"


@over_families
def test_a_session_equals_a_plain_forward_with_the_same_steps(family: Family) -> None:
    @for_each(family.name, 3, config=sparse_policies())
    def check(config: SessionConfig) -> None:
        engine = engine_of(family, torch.float32)
        played = play(engine, config, TURNS, new_tokens=9, look=True)
        check_replay(engine, config, played, TURNS)


@over_families
@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        (torch.float32, {}),
        (torch.float32, {"temperature": 1.0, "seed": 6}),
        (torch.bfloat16, {}),
    ],
    ids=["float32", "float32-sampled", "bfloat16"],
)
def test_verify_equals_dense(family: Family, dtype: torch.dtype, sampling: dict[str, Any]) -> None:
    """Adversarial plugins included. bfloat16: where dense decoding of a block rounds otherwise
    than token by token, a token may flip; the gap rule of `test_full_budget_equals_dense`."""
    engine = engine_of(family, dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 5 * ROUNDING
    with adversaries():
        for detector, selector in (
            (ADVERSARIAL_DETECTORS[-1], ADVERSARIAL_SELECTORS[0]),
            ("entropy", "kl_fusion"),
        ):
            config = FEW.replace(
                slow_step="verify",
                boundaries=[{"name": detector}],
                selector={"name": selector},
                refresh={"evidence_queries": 3},
                sampling=sampling,
            )
            dense = play(engine, dense_twin(config), TURNS, new_tokens=12)
            verified = play(engine, config, TURNS, new_tokens=12)
            if same_tokens(dense, verified, config, tolerance):
                assert dense.ids == verified.ids


@over_families
@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_slow_steps_leave_the_history_of_a_dense_run(
    family: Family, slow_step: Literal["rectify", "verify"]
) -> None:
    with adversaries():

        @for_each(family.name + slow_step, 3, config=block_policies(slow_step))
        def check(config: SessionConfig) -> None:
            engine = engine_of(family, torch.float32)
            with engine.session(config) as session:
                found = watch_histories(session)
                for turn in TURNS:
                    session.decode(turn, max_new_tokens=9)
                ids = session.token_ids
            expected = dense_history(engine, ids)
            assert len(found) >= len(TURNS)
            for snapshot in found.values():
                same_history(snapshot, expected)


@over_families
def test_ragged_budgets_equal_a_plain_forward(family: Family) -> None:
    """Heads that keep different numbers of tokens share one buffer and one mask."""
    selector = {"name": "cumulative_mass", "mass": 0.6}
    config = FEW.replace(selector=selector, memory={"selected_tokens": 30})
    engine = engine_of(family, torch.float32)
    played = play(engine, config, TURNS, new_tokens=9, look=True)
    check_replay(engine, config, played, TURNS)


@over_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_extents_after_forks(family: Family, dtype: torch.dtype) -> None:
    """A grandchild reads three extents; its parents are bit-identical afterwards."""
    engine = engine_of(family, dtype)
    dense = EVERYTHING.replace(mode="dense")
    with engine.session(EVERYTHING) as parent:
        parent.decode(TURNS[0], max_new_tokens=6)
        before = parent.next_logits()
        child = parent.fork()
        child.decode([5, 4], max_new_tokens=6)
        grandchild = child.fork(dense)
        grandchild.decode([9], max_new_tokens=6)
        child.decode([9], max_new_tokens=6)
        found = [(one.token_ids, one.next_logits()) for one in (child, grandchild)]
        assert torch.equal(parent.next_logits(), before)
        child.close()
        grandchild.close()
    if dtype is torch.float32:
        assert found[0][0] == found[1][0]
    if dtype is torch.float32 or family.name not in _ROUTED:
        for ids, logits in found:
            tolerance = 1e-4 if dtype is torch.float32 else 16 * ROUNDING
            assert close(logits, dense_logits(engine.model, ids)[-1], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_seed_gives_the_same_bits(dtype: torch.dtype) -> None:
    sampling = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
    config = FEW.replace(sampling=sampling, selector={"name": "kl_fusion"})
    first, second = (
        play(engine_of(FAMILIES[0], dtype), config, TURNS, new_tokens=20) for _ in range(2)
    )
    assert first.ids == second.ids
    assert torch.equal(first.next_logits, second.next_logits)


def test_both_devices_draw_the_same_noise_and_tokens() -> None:
    device = torch.device(DEVICE)
    logits = draw(1, 5000, dtype=torch.float32)
    for position in range(50):
        here = uniform_noise(3, position, 5000, torch.device("cpu"))
        assert torch.equal(uniform_noise(3, position, 5000, device).cpu(), here)
        for sampler in (Sampler(0.8, seed=3), Sampler(1.3, 0.9, 50, 4), Sampler()):
            chosen = sampler.choose(logits.to(device), position)
            assert chosen.device.type == DEVICE
            assert int(chosen) == int(sampler.choose(logits, position))
    entropy = entropy_nats(logits.to(device)).cpu()
    torch.testing.assert_close(entropy, entropy_nats(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 12, 16, 40, 64, 80, 96, 128, 256])
def test_kernels_with_log_sum_exps(dtype: torch.dtype, dim: int) -> None:
    for tokens, rows, is_causal in (
        (1, 1, True),
        (33, 33, True),
        (130, 7, False),
        (1000, 1, False),
    ):

        def views(seed: int, length: int = tokens) -> Tensor:
            return draw(seed, 3, length + 5, dim, dtype=dtype).to(DEVICE)[:, 3 : length + 3]

        query, keys, values = views(1, rows).contiguous(), views(2), views(3)
        out, lse = lse_kernel(query, values)(query, keys, values, dim**-0.5, is_causal)
        expected, expected_lse = reference_attention(query, keys, values, dim**-0.5, is_causal)
        assert lse.shape == (3, rows)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
        assert_near(out, expected.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("rows", [1, 2, 31])
def test_a_history_in_pieces_is_one_softmax(dtype: torch.dtype, dim: int, rows: int) -> None:
    query = draw(1, 8, rows, dim, dtype=dtype).to(DEVICE)
    keys, values = (draw(seed, 2, 300, dim, dtype=dtype).to(DEVICE) for seed in (2, 3))
    expected = by_the_book(query, keys, values, 0.2, causal(rows, 300).to(DEVICE))
    for cuts in ([0, 300], [0, 1, 300], [0, 130, 201, 300 - rows, 300]):
        pieces = [
            Piece(start, keys[:, start:end], values[:, start:end])
            for start, end in zip(cuts, cuts[1:], strict=False)
            if start < end
        ]
        assert_near(attend_history(query, pieces, AttentionRule(0.2)), expected, dtype)
    everything = by_the_book(query, keys, values, 0.2)
    assert_near(attend_rows(query, keys, values, AttentionRule(0.2)), everything, dtype)


@pytest.mark.parametrize("measure_mass", [False, True])
@pytest.mark.parametrize("selector", ["per_head", "cumulative_mass"])
def test_a_fast_step_never_waits_for_the_device(selector: str, measure_mass: bool) -> None:
    """Shapes are static and lengths live on the device: a captured graph needs both."""
    engine = engine_of(FAMILIES[0], torch.bfloat16)
    runner, shape = engine.runner, engine.shape
    sequence = SequenceState(shape.windows, MemoryLayout(2, 8, 4, shape.device), frozenset())
    tokens: list[Tensor | int] = [
        torch.tensor(5, device=DEVICE),
        6,
        torch.tensor(7, device=DEVICE),
        8,
    ]
    with AttentionSwitch.of(engine.model).switched_on(engine.model):
        runner.dense(sequence, list(range(40)), evidence_rows=4)
        refresh_memory(sequence, build_selector({"name": selector}), segment_capacity=6)
        runner.fast(sequence, 4, measure_mass=measure_mass)
        addresses = [layer.memory.keys.data_ptr() for layer in sequence.layers if layer.memory]
        with warnings.catch_warnings():
            # torch says that this mode is a prototype; the test wants it all the same.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        try:
            for token in tokens:
                output = runner.fast(sequence, token, measure_mass=measure_mass)
                Sampler(1.0, 0.9, 5).choose(output.logits, 7)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (output.selected_mass is not None) == measure_mass
    assert addresses == [layer.memory.keys.data_ptr() for layer in sequence.layers if layer.memory]
    assert sequence.segment_tokens == 5
