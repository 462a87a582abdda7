"""Whole measurements on a tiny model: what must come out at the ends, and against plain runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sfi_agent import ConfigError, ContextOverflowError, Engine, InputError, SessionConfig
from sfi_agent.engine.instruments import Instruments
from sfi_agent.evaluation.fidelity import PolicyFidelity, Window, kl_nats, measure_fidelity
from tests.families import CONTEXT_TOKENS, model_of, tiny_engine

TOKENS = 20
NEVER: Any = {
    "boundaries": [{"name": "never"}],
    "refresh": {"min_segment_tokens": 1, "max_segment_tokens": 9},
}


def sizes(sink: int, selected: int, recent: int) -> dict[str, int]:
    return {"sink_tokens": sink, "selected_tokens": selected, "recent_tokens": recent}


FULL = SessionConfig(memory=sizes(4, 500, 8), **NEVER)
TINY = SessionConfig(selector={"name": "window"}, memory=sizes(1, 0, 2), **NEVER)


def ids_of(seed: int, tokens: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 101, (tokens,), generator=generator).tolist())


def windows(count: int = 2, prompt_tokens: int = 70) -> list[Window]:
    return [
        Window(ids_of(seed, prompt_tokens), ids_of(100 + seed, TOKENS), f"random ids {seed}")
        for seed in range(count)
    ]


def measure(
    policies: dict[str, SessionConfig], *, engine: Engine | None = None, **options: Any
) -> list[PolicyFidelity]:
    given = {"continuation_tokens": TOKENS, "probe_every_steps": 1, **options}
    return measure_fidelity(engine or tiny_engine("llama"), windows(), policies, **given)


@pytest.fixture(scope="module")
def ends() -> dict[str, PolicyFidelity]:
    """A policy that sees everything, one that sees next to nothing, dense, and verify."""
    verify = TINY.replace(slow_step="verify")
    found = measure(
        {"full": FULL, "tiny": TINY, "dense": SessionConfig(mode="dense"), "verify": verify}
    )
    return {item.policy: item for item in found}


def test_full_budget_is_dense(ends: dict[str, PolicyFidelity]) -> None:
    full = ends["full"]
    for forced in full.forced.values():
        assert forced.tokens == 2 * TOKENS
        assert forced.agreement == 1
        assert forced.kl_nats.p99 < 1e-6
        assert forced.memory_share == pytest.approx(1.0)
        assert forced.acceptance is not None and forced.acceptance.kept_share == 1
    for layer in full.layers:
        assert layer.recall_mean == pytest.approx(1.0, abs=1e-5)
        assert layer.output_error_p99 is not None and layer.output_error_p99 < 1e-4
        assert layer.steps > 0
    assert full.free.agreed_tokens == full.free.dense_tokens and full.free.identical == 2
    assert full.verdict.level == "undecided"
    assert "see 100 % of the history" in full.verdict.sentence


def test_a_tiny_window_is_not(ends: dict[str, PolicyFidelity]) -> None:
    tiny = ends["tiny"]
    for forced in tiny.forced.values():
        assert forced.agreement < 0.95 and forced.kl_nats.mean > 0.01
        assert forced.memory_share is not None and forced.memory_share < 0.2
    assert all(layer.recall_mean < 0.9 for layer in tiny.layers)  # type: ignore[operator]
    assert all(layer.output_error_mean > 0.05 for layer in tiny.layers)  # type: ignore[operator]
    assert tiny.free.identical == 0
    assert tiny.free.median_agreed_tokens < TOKENS
    worst = tiny.worst_layer
    assert worst is not None
    assert worst.recall_mean == min(layer.recall_mean or 1.0 for layer in tiny.layers)


def test_dense_is_exact_and_takes_no_fast_step(ends: dict[str, PolicyFidelity]) -> None:
    dense = ends["dense"]
    assert dense.verdict.level == "exact"
    assert dense.worst_layer is None and dense.free.identical == 2
    for forced in dense.forced.values():
        assert forced.memory_share is None and forced.kl_nats.p99 < 1e-9
        assert forced.acceptance is not None
        assert forced.acceptance.drafted_tokens == 0 and forced.acceptance.kept_share is None


def test_verify_is_exact_whatever_the_memory_leaves_out(ends: dict[str, PolicyFidelity]) -> None:
    verify = ends["verify"]
    assert verify.verdict.level == "exact"
    assert verify.free.agreed_tokens == verify.free.dense_tokens
    accepted = verify.free.verified_acceptance
    assert accepted is not None and 0 < accepted < 1
    assert ends["tiny"].free.verified_acceptance is None
    for forced in verify.forced.values():
        assert forced.acceptance is None and forced.agreement == 1 and forced.kl_nats.p99 < 1e-6
    assert any((layer.recall_mean or 1) < 0.9 for layer in verify.layers)


def test_counts_by_distance_add_up(ends: dict[str, PolicyFidelity]) -> None:
    for forced in ends["tiny"].forced.values():
        groups = forced.by_distance
        assert sum(group.tokens for group in groups) == forced.tokens
        total = sum(group.tokens * group.kl_mean_nats for group in groups)
        assert total / forced.tokens == pytest.approx(forced.kl_nats.mean)
        # Prefill and slow steps are dense; under observe their keys are not those of a dense run.
        near, far = groups[0], groups[-1]
        assert (near.label, far.label) == ("0", "8-15")
        # Segments of at most 9: one slow step in ten, at distances 0 to 9.
        assert near.tokens == 2 * TOKENS // 10
        acceptance = forced.acceptance
        assert acceptance is not None
        assert acceptance.drafted_tokens == forced.tokens - near.tokens
        assert acceptance.kept_tokens <= acceptance.agreed_tokens < acceptance.drafted_tokens


def test_distributions_equal_those_of_a_plain_run_of_the_model(
    ends: dict[str, PolicyFidelity],
) -> None:
    """Tokens right behind the prompt, which dense decoding and every policy see alike."""
    model = model_of("llama")
    with torch.no_grad():
        window = windows(1)[0]
        ids = [*window.prompt_ids, *window.text_ids]
        dense = model(torch.tensor([ids])).logits[0].float()
    logits: dict[int, torch.Tensor] = {}
    with tiny_engine("llama").session(TINY) as session:
        session.decode(window.prompt_ids, max_new_tokens=0)
        session.attach(Instruments(on_logits=lambda at, row: logits.update({at: row.clone()})))
        session.follow(window.text_ids)
    expected = [kl_nats(dense[position - 1], row) for position, row in sorted(logits.items())]
    agreed = [int(dense[at - 1].argmax() == row.argmax()) for at, row in sorted(logits.items())]
    (found,) = measure_fidelity(
        tiny_engine("llama"), windows(1), {"tiny": TINY}, continuation_tokens=TOKENS
    )
    forced = found.forced["text"]
    assert forced.tokens == len(expected) == TOKENS
    assert forced.kl_nats.mean == pytest.approx(sum(expected) / TOKENS, rel=1e-4)
    assert forced.kl_nats.p99 == pytest.approx(max(expected), rel=1e-4)
    assert forced.agreement == sum(agreed) / TOKENS


def test_only_fast_steps_of_unverified_policies_have_an_uncertainty(
    ends: dict[str, PolicyFidelity],
) -> None:
    # Tiny random models are never sure of anything.
    found = ends["tiny"].forced["text"].uncertainty
    assert found is not None and found.token_share == 1 and found.kl_share == pytest.approx(1)
    assert ends["dense"].forced["text"].uncertainty is None
    assert ends["verify"].forced["text"].uncertainty is None


def test_free_agreement_is_that_of_plain_sessions(ends: dict[str, PolicyFidelity]) -> None:
    engine = tiny_engine("llama")
    agreed = []
    for window in windows():
        outputs = []
        for config in (SessionConfig(mode="dense"), TINY):
            with engine.session(config) as session:
                outputs.append(session.decode(window.prompt_ids, max_new_tokens=TOKENS))
        pairs = list(zip(*outputs, strict=True))
        agreed.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
    assert ends["tiny"].free.agreed_tokens == tuple(agreed)
    assert ends["tiny"].free.dense_tokens == (TOKENS, TOKENS)


def test_equal_arguments_give_equal_results(ends: dict[str, PolicyFidelity]) -> None:
    (again,) = measure({"tiny": TINY})
    assert again == ends["tiny"]
    assert again.as_json() == ends["tiny"].as_json()


def test_sampling_is_replaced_by_greedy_decoding(ends: dict[str, PolicyFidelity]) -> None:
    (found,) = measure({"tiny": TINY.replace(sampling={"temperature": 1.5})})
    assert found == ends["tiny"]
    assert found.config["sampling"]["temperature"] == 0


def test_retried_steps_count_as_dense_and_their_fast_step_is_not_probed() -> None:
    always = TINY.replace(boundaries=[{"name": "entropy", "threshold_nats": 0.0, "when": "now"}])
    (found,) = measure({"always": always})
    for forced in found.forced.values():
        assert forced.memory_share is None
        assert forced.slow_share == pytest.approx((TOKENS - 1) / TOKENS)
    assert found.worst_layer is None, "every fast step was thrown away"
    assert found.verdict.level == "undecided"
    assert "none of the 40 tokens came from a fast step" in found.verdict.sentence


def test_dense_layers_have_no_recall() -> None:
    config = TINY.replace(memory={"dense_layers": [0, 2]})
    (found,) = measure({"some": config})
    assert [layer.recall_mean is None for layer in found.layers] == [True, False, True]


def test_progress_names_windows_and_policies() -> None:
    said: list[str] = []
    measure({"tiny": TINY}, on_progress=said.append)
    assert said[0] == "window 1 of 2: prefilling 70 tokens"
    assert said[-1] == "window 2 of 2: tiny"


def test_the_model_is_left_alone() -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    measure({"tiny": TINY})
    assert model.config._attn_implementation == before


def test_bad_input_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama")

    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(engine.model), "forward", must_not_run)
    window = windows(1)[0]
    long = replace(window, prompt_ids=ids_of(1, CONTEXT_TOKENS - TOKENS + 1))
    cases: list[tuple[type[Exception], str, Any]] = [
        (InputError, "0 windows", ([], {"a": TINY}, TOKENS, 1)),
        (InputError, "0 policies", ([window], {}, TOKENS, 1)),
        (InputError, "continuation_tokens=0", ([window], {"a": TINY}, 0, 1)),
        (InputError, "every 0 steps", ([window], {"a": TINY}, TOKENS, 0)),
        (InputError, "1 ids of prompt", ([replace(window, prompt_ids=(3,))], {"a": TINY}, 5, 1)),
        (
            InputError,
            "token id 101; allowed: 0 to 100",
            ([replace(window, text_ids=(3, 101))], {"a": TINY}, 5, 1),
        ),
        (InputError, "0 of text", ([replace(window, text_ids=())], {"a": TINY}, 5, 1)),
        (ContextOverflowError, f"{CONTEXT_TOKENS + 1:,} tokens", ([long], {"a": TINY}, TOKENS, 1)),
        (
            ConfigError,
            "dense_layers that the model lacks",
            ([window], {"a": TINY.replace(memory={"dense_layers": [9]})}, TOKENS, 1),
        ),
    ]
    for error, said, (given, policies, tokens, every) in cases:
        with pytest.raises(error, match=said):
            measure_fidelity(
                engine, given, policies, continuation_tokens=tokens, probe_every_steps=every
            )
