"""Runs policies beside dense decoding on windows of text and measures how far they are from it.

Per window the history is prefilled once. Dense decoding goes on from it twice: over the text
itself, and greedily (its own continuation). Every policy goes on from forks of the same history:
over the same ids in both cases (teacher forcing), and freely. Decoding is greedy throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from sfi_agent.config import SessionConfig
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.instruments import Instruments
from sfi_agent.errors import ContextOverflowError, InputError, explain
from sfi_agent.evaluation.fidelity.attention_probe import AttentionProbe, AttentionSample
from sfi_agent.evaluation.fidelity.distributions import LogitComparison, LogitReference
from sfi_agent.evaluation.fidelity.records import PolicyFidelity, TextMode
from sfi_agent.evaluation.fidelity.summary import (
    ForcedTokens,
    FreeTokens,
    summarize_forced,
    summarize_free,
    summarize_layers,
)
from sfi_agent.evaluation.fidelity.verdict import judge
from sfi_agent.evaluation.shared_prefill import shared_prefill_tokens
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.templates.history_match import common_prefix
from sfi_agent.session.templates.stop_ids import stop_ids
from sfi_agent.session.token_core import TokenCore

if TYPE_CHECKING:
    from sfi_agent.evaluation.fidelity.windows import Window
    from sfi_agent.session.engine import Engine

__all__ = ["PROBE_EVERY_STEPS", "measure_fidelity"]

PROBE_EVERY_STEPS = 4
"""Every so many fast steps are probed unless the caller says otherwise."""

_MODES: tuple[TextMode, ...] = get_args(TextMode)


@dataclass(frozen=True, slots=True)
class _Reference:
    """Dense decoding over given ids: the ids, and what each was or would have been drawn from."""

    ids: tuple[int, ...]
    logits: LogitReference


@dataclass(slots=True)
class _Findings:
    """What one policy did, window after window."""

    config: SessionConfig
    forced: dict[TextMode, ForcedTokens]
    attention: list[AttentionSample] = field(default_factory=list)
    free: FreeTokens = field(default_factory=FreeTokens)

    @classmethod
    def of(cls, config: SessionConfig) -> _Findings:
        """Nothing found yet, for the policy with greedy decoding."""
        greedy = config.replace(sampling={"temperature": 0.0})
        verified = config.mode == "slow_fast" and config.slow_step == "verify"
        return cls(greedy, {mode: ForcedTokens(verified=verified) for mode in _MODES})


def measure_fidelity(
    engine: Engine,
    windows: Sequence[Window],
    policies: Mapping[str, SessionConfig],
    *,
    continuation_tokens: int,
    probe_every_steps: int = PROBE_EVERY_STEPS,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[PolicyFidelity]:
    """Measure every policy against dense decoding on every window.

    Args:
        engine: The model; a tokenizer is needed only for stop ids and for detectors of text.
        windows: Texts, see `Window`.
        policies: By name; their sampling is replaced by greedy decoding.
        continuation_tokens: Most tokens of dense and free-running output; they end at a stop id.
        probe_every_steps: Attention is probed in every n-th fast step; a probed step costs about
            a dense one. Recall and output error are means over the probed steps.
        on_progress: Told what is happening.

    Returns:
        One entry per policy, in their order. Equal arguments give equal results.

    Raises:
        InputError: There are no windows or policies, or a number or window is unusable.
        ContextOverflowError: A window and its continuation do not fit the model.
        ConfigError, PluginError: A policy does not fit the model or its tokenizer.
        UnsupportedModelError: The model's logits are not numbers.
    """
    _check(engine, windows, policies, continuation_tokens)
    AttentionProbe(probe_every_steps)  # Refuses a number of steps that no probe takes.
    findings = {name: _Findings.of(config) for name, config in policies.items()}
    for number, window in enumerate(windows, start=1):
        place = f"window {number} of {len(windows)}"
        shared = max(1, shared_prefill_tokens(len(window.prompt_ids), policies.values()))
        runner = _WindowRunner(
            window, shared, _stops(engine), continuation_tokens, probe_every_steps
        )
        on_progress(f"{place}: prefilling {len(window.prompt_ids):,} tokens")
        with closing(TokenCore(engine, SessionConfig(mode="dense"))) as base:
            base.append(window.prompt_ids[:shared], 0)
            base.prefill()
            on_progress(f"{place}: dense")
            references = runner.references(base)
            for name, found in findings.items():
                on_progress(f"{place}: {name}")
                runner.run(base, references, found)
    return [_summarized(engine, name, found) for name, found in findings.items()]


class _WindowRunner:
    """Plays one window under dense decoding and under policies."""

    def __init__(
        self,
        window: Window,
        shared: int,
        stops: frozenset[int],
        tokens: int,
        probe_every_steps: int,
    ) -> None:
        self._prompt_end = window.prompt_ids[shared:]
        self._text_ids = window.text_ids
        self._first_position = len(window.prompt_ids)
        self._stops = stops
        self._tokens = tokens
        self._probe_every_steps = probe_every_steps

    def references(self, base: TokenCore) -> dict[TextMode, _Reference]:
        """Dense logits over the text, and over dense greedy output."""
        text, continuation = LogitReference(), LogitReference()
        with self._branch(base, base.config) as core:
            core.attach(Instruments(on_logits=text))
            self._decode(core, self._text_ids)
        with self._branch(base, base.config) as core:
            core.attach(Instruments(on_logits=continuation))
            ids = tuple(record.token_id for record in self._decode(core))
        return {
            "text": _Reference(self._text_ids, text),
            "continuation": _Reference(ids, continuation),
        }

    def run(
        self, base: TokenCore, references: Mapping[TextMode, _Reference], found: _Findings
    ) -> None:
        """Everything about one policy."""
        for mode, reference in references.items():
            found.attention += self._follow(base, reference, found.config, found.forced[mode])
        self._run_free(base, references["continuation"].ids, found)

    def _follow(
        self, base: TokenCore, reference: _Reference, config: SessionConfig, into: ForcedTokens
    ) -> list[AttentionSample]:
        comparison = LogitComparison(reference.logits)
        probe = AttentionProbe(self._probe_every_steps, self._first_position)
        with self._branch(base, config) as core:
            core.attach(Instruments(on_logits=comparison, on_fast_attention=probe))
            records = self._decode(core, reference.ids)
        into.records += records
        into.steps += [comparison.steps[record.position] for record in records]
        # A retried token was drawn from a dense step; its fast step was thrown away.
        retried = {record.position - 1 for record in records if record.kind == "retry"}
        return probe.samples(discarded_positions=retried)

    def _run_free(self, base: TokenCore, dense_ids: tuple[int, ...], found: _Findings) -> None:
        into = found.free
        with self._branch(base, found.config) as core:
            records = self._decode(core)
        ids = tuple(record.token_id for record in records)
        into.records += records
        into.agreed.append(common_prefix(ids, dense_ids))
        into.dense.append(len(dense_ids))
        into.identical.append(ids == dense_ids)

    def _branch(self, base: TokenCore, config: SessionConfig) -> closing[TokenCore]:
        """A policy over the shared history, with the end of the prompt still to be processed.

        Only so does its first refresh have the evidence of a whole turn's prompt.
        """
        core = base.fork(config)
        core.append(self._prompt_end, max(self._tokens, len(self._text_ids)))
        return closing(core)

    def _decode(self, core: TokenCore, given: Sequence[int] | None = None) -> list[StepRecord]:
        """Decode over given ids, or freely until a stop id or the limit."""
        if given is None:
            return list(core.steps(DecodeLimits(self._tokens, self._stops)))
        return list(core.steps(DecodeLimits(len(given), given_ids=tuple(given))))


def _summarized(engine: Engine, name: str, found: _Findings) -> PolicyFidelity:
    forced = {mode: summarize_forced(tokens) for mode, tokens in found.forced.items()}
    layers = tuple(summarize_layers(found.attention, engine.shape.num_layers))
    free = summarize_free(found.free)
    return PolicyFidelity(
        policy=name,
        config=found.config.resolved(),
        forced=forced,
        layers=layers,
        free=free,
        verdict=judge(found.config, forced["continuation"], free, layers),
    )


def _stops(engine: Engine) -> frozenset[int]:
    if engine.tokenizer is None:
        return frozenset()
    return stop_ids(engine.tokenizer, getattr(engine.model, "generation_config", None))


def _check(
    engine: Engine,
    windows: Sequence[Window],
    policies: Mapping[str, SessionConfig],
    continuation_tokens: int,
) -> None:
    """Refuse what cannot be measured before anything runs."""
    if not windows or not policies:
        raise InputError(
            explain(
                "measured fidelity",
                got=f"{len(windows)} windows and {len(policies)} policies",
                allowed="at least one of each",
            )
        )
    if continuation_tokens < 1:
        raise InputError(
            explain("measured fidelity", got=f"{continuation_tokens=}", allowed="at least 1 token")
        )
    for config in policies.values():
        engine.check_config(config)
        # Builds its plugins, so that those that do not fit this engine are found out now.
        TokenCore(engine, config)
    for window in windows:
        _check_window(engine, window, continuation_tokens)


def _check_window(engine: Engine, window: Window, continuation_tokens: int) -> None:
    attempted = f"measured fidelity on {window.origin}"
    if len(window.prompt_ids) < 2 or not window.text_ids:
        raise InputError(
            explain(
                attempted,
                got=f"{len(window.prompt_ids)} ids of prompt, {len(window.text_ids)} of text",
                allowed="at least 2 ids of prompt and 1 of text",
            )
        )
    last = engine.shape.vocabulary_size - 1
    outside = [item for item in (*window.prompt_ids, *window.text_ids) if not 0 <= item <= last]
    if outside:
        raise InputError(
            explain(
                attempted,
                got=f"token id {outside[0]}",
                allowed=f"0 to {last}, the model's vocabulary",
                remedy="use the tokenizer that belongs to the checkpoint",
            )
        )
    needed = len(window.prompt_ids) + max(len(window.text_ids), continuation_tokens)
    limit = engine.shape.context_limit_tokens
    if needed > limit:
        raise ContextOverflowError(
            explain(
                attempted,
                got=f"{needed:,} tokens of prompt and continuation",
                allowed=f"{limit:,} tokens in this model",
                remedy="ask for a shorter prompt or continuation",
            ),
            needed_tokens=needed,
            limit_tokens=limit,
        )
