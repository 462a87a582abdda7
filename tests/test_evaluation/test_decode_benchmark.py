"""The decode benchmark: its coin, its roof, its refusals, and that arms leave histories alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from sfi_agent.config import SessionConfig
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sampling import OverridingChooser, Sampler
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.errors import InputError
from sfi_agent.evaluation.decode_benchmark import (
    ARMS,
    DecodeBenchmark,
    DecodeOptions,
    ModelSizes,
    benchmark,
    benchmark_decode,
    generate,
    plot_svg,
    position_room,
)
from sfi_agent.evaluation.decode_benchmark.coin import CoinChooser
from sfi_agent.evaluation.decode_benchmark.histories import Histories
from sfi_agent.evaluation.decode_benchmark.needs import needed_bytes
from sfi_agent.evaluation.decode_benchmark.options import arm_config
from sfi_agent.evaluation.decode_benchmark.records import DraftCounts
from sfi_agent.evaluation.decode_benchmark.roof import Roof
from sfi_agent.evaluation.decode_benchmark.setting import Setting
from sfi_agent.evaluation.random_models import MODEL_SHAPES, build_random_model, outline_model
from sfi_agent.session.engine import Engine

CONTEXT = 400
CPU = torch.device("cpu")
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
CONFIG = SessionConfig(memory={"selected_tokens": 64, "recent_tokens": 32, "sink_tokens": 4})
OPTIONS = DecodeOptions(batch=2, segment_tokens=4, acceptance=0.8, cycles=3, copy_bytes=1 << 16)
STEPS = ARMS[:-1]


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SHAPES, "tiny", TINY)


def tiny_model(options: DecodeOptions = OPTIONS) -> Any:
    limit = CONTEXT + position_room(options)
    return build_random_model("tiny", device=CPU, dtype=torch.float32, context_tokens=limit)


def run(options: DecodeOptions = OPTIONS, config: SessionConfig = CONFIG, **more: Any) -> Any:
    return benchmark_decode(
        lambda: tiny_model(options), CONTEXT, config, rounds=2, options=options, **more
    )


# ---------------------------------------------------------------- the coin


def test_the_coin_falls_with_its_probability_and_never_changes_its_mind() -> None:
    drafts = CoinChooser(Sampler(), 64, seed=3)
    dense = CoinChooser(Sampler(), 64, seed=3, acceptance=0.9)
    assert isinstance(dense, OverridingChooser)
    positions = range(20000)
    stands = [drafts.at(place, 0) == dense.at(place, 1) for place in positions]
    # Two standard deviations of such a share are 0.004.
    assert abs(statistics.fmean(stands) - 0.9) < 0.008
    tokens = {dense.at(place, 5) for place in positions}
    assert tokens == set(range(64)), "tokens of the whole vocabulary, and no others"
    assert all(dense.at(place, -1) == dense.at(place, 7) for place in range(100))
    other = replace(drafts, seed=4)
    assert any(other.at(place, 0) != drafts.at(place, 0) for place in range(10))
    logits = torch.zeros(64)
    assert int(drafts.choose(logits, 11)) == drafts.at(11, -1)


@pytest.mark.parametrize("vocabulary", [2, 3, 65])
def test_tokens_stay_inside_small_and_odd_vocabularies(vocabulary: int) -> None:
    dense = CoinChooser(Sampler(), vocabulary, seed=1, acceptance=0.5)
    assert all(0 <= dense.at(place, 0) < vocabulary for place in range(500))


def test_the_measured_acceptance_is_the_one_that_was_asked_for() -> None:
    options = replace(OPTIONS, arms=("verify",), cycles=60, batch=1)
    drafts = run(options).arms["verify"].drafts
    assert drafts is not None and drafts.judged > 400
    # Two standard deviations are 0.04.
    assert abs(drafts.acceptance - 0.8) < 0.06
    assert drafts.judged <= drafts.drafted and drafts.accepted < drafts.judged


def test_captured_steps_throw_the_same_coin() -> None:
    options = replace(OPTIONS, arms=("verify",), cycles=6, batch=1)
    eager, captured = (
        run(options, execution=execution).arms["verify"].drafts
        for execution in ("eager", "uncaptured")
    )
    # They end within a few tokens of each other; up to there it is the same coin.
    assert eager is not None and 0 < eager.accepted < eager.judged
    assert captured is not None and abs(captured.judged - eager.judged) <= 8
    assert abs(captured.acceptance - eager.acceptance) < 0.05


@pytest.mark.parametrize(("acceptance", "expected"), [(1.0, 5.0), (0.0, 1.0)])
def test_the_ends_of_the_coin(acceptance: float, expected: float) -> None:
    options = replace(OPTIONS, arms=("verify",), acceptance=acceptance, verify_tokens=4)
    arm = run(options).arms["verify"]
    assert arm.drafts is not None and arm.drafts.acceptance == acceptance
    each = arm.drafts.accepted / arm.drafts.verifications + 1
    assert each == expected and arm.drafts.drafted == 4 * arm.drafts.verifications


# ---------------------------------------------------------------- arms


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, DecodeBenchmark]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_SHAPES, "tiny", TINY)
        yield {name: run(execution=name) for name in ("eager", "uncaptured")}


@pytest.mark.parametrize("execution", ["eager", "uncaptured"])
def test_every_arm_is_timed(results: dict[str, DecodeBenchmark], execution: str) -> None:
    result = results[execution]
    assert tuple(result.arms) == STEPS and not result.left_out
    for name, arm in result.arms.items():
        low, high = arm.quartile_seconds
        assert arm.rounds == 2 and 0 < low <= arm.median_seconds <= high, name
        assert arm.roof_bytes > 0 and arm.share_of_roof > 0
    assert result.dense_over_fast and result.slow_over_dense
    assert (result.arms["verify"].drafts is None) is False
    # 4 sink, 64 selected, 32 recent, and a segment of 4 from its first token to its last.
    assert result.memory_tokens in (102, 103)
    assert result.warmup.reason == ("" if execution == "uncaptured" else result.warmup.reason)
    document = result.as_json()
    assert document["arms"]["verify"]["drafts"]["acceptance"] == pytest.approx(0.8, abs=0.2)
    assert document["batch"] == 2 and document["segment_tokens"] == 4


def test_a_sample_has_the_tokens_of_its_segments(results: dict[str, DecodeBenchmark]) -> None:
    for result in results.values():
        assert result.arms["dense"].tokens == 2 and result.arms["generate"].tokens == 2
        # Three segments; the slow steps of the two sequences get out of step.
        assert 13 <= result.arms["observe"].tokens <= 15
        assert 13 <= result.arms["rectify"].tokens <= 15


@pytest.mark.parametrize("execution", ["eager", "uncaptured"])
@pytest.mark.parametrize("name", STEPS)
def test_an_arm_leaves_the_histories_as_they_were(
    name: str, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Histories] = []
    original = Histories.fill

    def fill(self: Histories, on_progress: Any) -> None:
        original(self, on_progress)
        seen.append(self)
        before.extend(contents(self))

    before: list[Tensor] = []
    monkeypatch.setattr(Histories, "fill", fill)
    run(replace(OPTIONS, arms=(name,)), execution=execution)
    (histories,) = seen
    histories.check()
    assert all(map(torch.equal, before, contents(histories)))
    assert {state.sequence.processed_tokens for state in histories.sparse} == {CONTEXT}


def contents(histories: Histories) -> list[Tensor]:
    """All keys and values of the context, copied."""
    return [
        tensor.clone()
        for state in (*histories.sparse, *histories.dense)
        for layer in state.sequence.layers
        for piece in layer.history.pieces(0, CONTEXT)
        for tensor in (piece.keys, piece.values)
    ]


def test_generate_and_dense_decoding_attend_to_the_same_history() -> None:
    """Both choose the same tokens: they are the same model over the same keys and values."""
    model = tiny_model()
    engine = Engine(model)
    histories = Histories(
        engine.shape, Setting(ModelSizes.of(model), CPU, CONTEXT, CONFIG, OPTIONS)
    )
    histories.fill(lambda _: None)
    found: list[list[int]] = []

    class Noting(SimpleNamespace):
        def generate(self, **arguments: Any) -> Tensor:
            ids = cast("Tensor", model.generate(**arguments))
            found.extend(ids[:, CONTEXT + 1 :].tolist())
            return ids

    arm = generate.GenerateArm(model, histories, 5)
    arm._model = Noting()
    arm.sample()
    with AttentionSwitch.of(model).switched_on(model):
        runner = Runner(model, engine.shape)
        for state, tokens in zip(histories.dense, found, strict=True):
            for place, token in enumerate(tokens):
                output = runner.dense(state.sequence, state.ids[CONTEXT + place :])
                assert output is not None and int(output.logits.argmax()) == token
                state.ids.append(token)


def test_without_room_for_its_copy_generate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "free_bytes", lambda _: 1000)
    result = run(replace(OPTIONS, arms=("generate", "dense")))
    assert list(result.arms) == ["dense"]
    assert "a second copy of the histories" in result.left_out["generate"]
    assert result.as_json()["left_out"] == result.left_out


def test_the_policy_of_an_arm() -> None:
    options = DecodeOptions(segment_tokens=24)
    config = SessionConfig.preset("exact")
    observe = arm_config(config, "fast", options)
    assert (observe.mode, observe.slow_step, observe.boundaries) == ("slow_fast", "observe", ())
    assert observe.refresh.min_segment_tokens == observe.refresh.max_segment_tokens == 24
    verify = arm_config(config, "verify", options)
    assert (verify.refresh.min_segment_tokens, verify.refresh.max_segment_tokens) == (1, 32)
    fixed = arm_config(config, "verify", replace(options, verify_tokens=7))
    assert (fixed.refresh.min_segment_tokens, fixed.refresh.max_segment_tokens) == (7, 7)
    assert arm_config(config, "dense", options).mode == "dense"
    assert arm_config(config, "rectify", options).slow_step == "rectify"


# ---------------------------------------------------------------- bytes


def sizes_of(shape: str) -> ModelSizes:
    return ModelSizes.of(outline_model(shape, dtype=torch.bfloat16, context_tokens=1000))


def test_the_bytes_of_published_shapes() -> None:
    small, large = sizes_of("qwen3-4b"), sizes_of("llama-3.1-8b")
    assert small.weight_bytes == pytest.approx(8.04e9, rel=0.01)
    # 36 layers, 8 heads of 128, keys and values, two bytes each.
    assert small.token_bytes == 36 * 8 * 128 * 2 * 2
    # Tied: the table is the head, and read once.
    assert small.read_weight_bytes(1) == small.weight_bytes
    assert large.weight_bytes == pytest.approx(16.06e9, rel=0.01)
    table, row = 128256 * 4096 * 2, 4096 * 2
    assert large.read_weight_bytes(4) == large.weight_bytes - table + 4 * row


def test_only_active_experts_are_read() -> None:
    sizes = sizes_of("qwen3-30b-a3b")
    assert sizes.weight_bytes == pytest.approx(61.1e9, rel=0.01)
    assert sizes.kv_heads == 4 and sizes.head_size == 128 and sizes.layers == 48
    one, rest = sizes.read_weight_bytes(1), sizes.weight_bytes - sizes.expert_bytes
    active = one - rest + sizes.lookup_bytes - sizes.row_bytes
    assert active == pytest.approx(sizes.expert_bytes * 8 / 128, rel=1e-6)
    assert one < sizes.read_weight_bytes(4) < sizes.read_weight_bytes(1000) < sizes.weight_bytes


def test_the_roof() -> None:
    sizes = sizes_of("qwen3-4b")
    token, weights = sizes.token_bytes, sizes.weight_bytes
    roof = Roof(sizes, 4, 131072, 2324.0, 2308)
    dense, fast = (roof.bytes_of(name, 32, None) for name in ("dense", "fast"))
    slow = roof.bytes_of("slow", 32, None)
    assert dense == roof.bytes_of("generate", 32, None) == weights + 4 * 131073 * token
    assert fast == weights + 4 * 2325 * token
    assert slow == dense + 4 * 2 * 2308 * token
    observe, rectify = (roof.bytes_of(name, 32, None) for name in ("observe", "rectify"))
    assert observe == pytest.approx((32 * fast + slow) / 33, abs=1)
    assert rectify == pytest.approx(observe + 4 * 32 * token / 33, abs=1)
    counts = DraftCounts(judged=80, accepted=70, verifications=10, drafted=80)
    verify = roof.bytes_of("verify", 32, counts)
    assert verify == pytest.approx((8 * fast + slow + 4 * 8 * token) / 8, abs=1)
    selection = roof.bytes_of("selection", 32, None)
    assert selection == 4 * (131072 * token // 2 + 2 * 2308 * token)


def test_what_a_device_needs() -> None:
    sizes, config, cuda = sizes_of("qwen3-4b"), SessionConfig(), torch.device("cuda")
    options = DecodeOptions(batch=4)
    parts = needed_bytes(Setting(sizes, cuda, 131072, config, options))
    assert parts["4 histories of 131,072 tokens"] == pytest.approx(77.3e9, rel=0.01)
    assert parts["evidence"] > 4 * 4 * 32 * 131072
    # It fits one card of 141 GB, and none of 80.
    assert 90e9 < sum(parts.values()) < 110e9
    dense = needed_bytes(Setting(sizes, cuda, 131072, config, replace(options, arms=("dense",))))
    assert "evidence" not in dense and sum(dense.values()) < sum(parts.values())
    cpu = needed_bytes(Setting(sizes, CPU, 32768, config, DecodeOptions()))
    assert "logits of captured steps" not in cpu


# ---------------------------------------------------------------- refusals and pictures


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch 0"),
        ({"segment_tokens": 0}, "segment 0"),
        ({"verify_tokens": 0}, "verified segment 0"),
        ({"cycles": 0}, "cycles 0"),
        ({"acceptance": 1.5}, "acceptance 1.5"),
        ({"arms": ()}, "no arm"),
        ({"arms": ("dense", "sparse")}, "'sparse'"),
        ({"arms": ("kernels",)}, "the arm kernels alone"),
        ({"arms": ("dense", "kernels")}, "no CUDA device"),
    ],
)
def test_options_without_meaning_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(replace(OPTIONS, **change))


def test_other_refusals() -> None:
    with pytest.raises(InputError, match="1 rounds"):
        benchmark_decode(tiny_model, CONTEXT, CONFIG, rounds=1)
    with pytest.raises(InputError, match=r"dense_layers \[5\]"):
        run(config=CONFIG.replace(memory={"dense_layers": [5]}))
    with pytest.raises(InputError, match=r"more than sink \+ recent = 36"):
        benchmark_decode(tiny_model, 36, CONFIG)


def test_no_room_is_refused_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "free_bytes", lambda _: 10**6)
    planned = ModelSizes.of(outline_model("tiny", dtype=torch.float32, context_tokens=1000)), CPU
    with pytest.raises(InputError, match="2 histories of 400 tokens.*lower --context"):
        benchmark_decode(
            lambda: pytest.fail("it was built"), CONTEXT, CONFIG, options=OPTIONS, planned=planned
        )


def test_dense_layers_are_timed_and_counted() -> None:
    result = run(replace(OPTIONS, arms=("fast",)), CONFIG.replace(memory={"dense_layers": [0]}))
    sparse = run(replace(OPTIONS, arms=("fast",)))
    assert result.arms["fast"].roof_bytes > sparse.arms["fast"].roof_bytes


def test_the_picture(results: dict[str, DecodeBenchmark], tmp_path: Path) -> None:
    machine = {"device_name": "A <card> & more", "torch": "2"}
    document = {"shape": "tiny", "machine": machine, **results["eager"].as_json()}
    svg = ElementTree.fromstring(plot_svg(document))
    name = "{http://www.w3.org/2000/svg}"
    bars = svg.findall(f"{name}rect")
    assert len(bars) == 1 + len(STEPS)
    texts = [text.text or "" for text in svg.findall(f"{name}text")]
    assert set(STEPS) <= set(texts) and any("A <card> & more" in text for text in texts)
    widths = {arm: float(bar.attrib["width"]) for arm, bar in zip(STEPS, bars[1:], strict=True)}
    slowest = max(STEPS, key=lambda arm: results["eager"].arms[arm].median_seconds)
    assert max(widths, key=lambda arm: widths[arm]) == slowest
