"""Plays a session step by step and keeps what it computed, for comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Engine, Evidence, Selection, Selector, Session, SessionConfig
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.runner import Runner, StepOutput
from sfi_agent.engine.sampling import uniform_noise
from sfi_agent.engine.sequence import LayerState, SequenceState
from sfi_agent.observe.trace import StepRecord
from tests.reference import (
    ReferenceRun,
    Refresh,
    VisibilityRules,
    masked_run,
    visibility_masks,
)

__all__ = [
    "LOGITS_TOLERANCE",
    "Played",
    "close",
    "play",
    "record_into",
    "replay",
    "rules_of",
    "same_tokens",
]

LOGITS_TOLERANCE = 1e-4
"""Relative to the largest logit, in float32."""


@dataclass
class Played:
    """What a session did.

    Attributes:
        ids: All ids at the end.
        generated: The ids that each turn returned.
        trace: One record per generated token.
        refreshes: In order.
        evidences: What the selector saw: history length and evidence, in order.
        row_logits: By position of the last processed token, the logits of the step that counted.
        seen: By row of each kept fast step: per layer and KV head the visible positions, read
            from the memory buffers; None on layers without a memory.
        next_logits: After the last turn.
    """

    ids: list[int] = field(default_factory=list)
    generated: list[list[int]] = field(default_factory=list)
    trace: list[StepRecord] = field(default_factory=list)
    refreshes: list[Refresh] = field(default_factory=list)
    evidences: list[tuple[int, Evidence]] = field(default_factory=list)
    row_logits: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, list[list[set[int]] | None]] = field(default_factory=dict)
    next_logits: Tensor = field(default_factory=lambda: torch.empty(0))


class _RecordingRunner(Runner):
    """A runner that keeps the logits of every step, and what fast steps could see."""

    def __init__(self, inner: Runner, played: Played, look: bool) -> None:
        super().__init__(inner.model, inner.shape, inner.prefill_chunk_tokens, execution="eager")
        self.played = played
        self.look = look

    def dense(
        self, sequence: SequenceState, ids: Sequence[int], **options: Any
    ) -> StepOutput | None:
        output = super().dense(sequence, ids, **options)
        if output is not None:
            row = sequence.processed_tokens - 1
            self.played.row_logits[row] = output.logits.cpu()
            self.played.seen.pop(row, None)
        return output

    def fast(self, sequence: SequenceState, token: Tensor | int, **options: Any) -> StepOutput:
        output = super().fast(sequence, token, **options)
        row = sequence.processed_tokens - 1
        self.played.row_logits[row] = output.logits.cpu()
        if self.look:
            self.played.seen[row] = [_seen_by(layer) for layer in sequence.layers]
        return output


def _seen_by(layer: LayerState) -> list[set[int]] | None:
    """Positions in the memory, found by comparing its keys and values with the history's."""
    memory = layer.memory
    if memory is None:
        return None
    layout, tokens = memory.layout, layer.history.tokens
    past = layer.history.joined(0, tokens)
    segment = set(range(tokens, tokens + layout.segment_tokens))
    heads = []
    for head, start in enumerate(memory.starts.tolist()):
        copied = slice(start, layout.segment_start)
        same = (memory.keys[head, copied, None] == past.keys[head]).all(-1)
        assert bool((same.sum(-1) == 1).all()), "a slot holds no key of the history, or several"
        positions = same.int().argmax(-1)
        assert torch.equal(memory.values[head, copied], past.values[head, positions])
        assert len(set(positions.tolist())) == len(positions), "a position is held twice"
        heads.append(set(positions.tolist()) | segment)
    return heads


class _RecordingSelector:
    """Passes evidence on to a selector and keeps it."""

    def __init__(self, inner: Selector, played: Played) -> None:
        self.inner = inner
        self.played = played
        self.needs = inner.needs

    def select(self, evidence: Evidence, budget: int) -> Selection:
        # Logits lie in room that the next evidence uses again.
        kept = replace(evidence, logits=evidence.logits.clone())
        self.played.evidences.append((budget, kept))
        return self.inner.select(evidence, budget)


def play(
    engine: Engine,
    config: SessionConfig,
    turns: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    look: bool = False,
    between: Callable[[Session], None] | None = None,
) -> Played:
    """Decode some turns on one session and close it.

    Args:
        engine: May be shared.
        config: The policy.
        turns: New ids of each turn; an empty turn goes on from the pending token.
        new_tokens: Generated per turn.
        look: Whether to read the memory after every fast step.
        between: Called with the session after every turn but the last.
    """
    played = Played()
    with engine.session(config) as session:
        record_into(played, session, look=look)
        for number, turn in enumerate(turns):
            if number and between is not None:
                between(session)
            played.generated.append(session.decode(turn, max_new_tokens=new_tokens))
        played.ids, played.trace = session.token_ids, session.trace
        played.next_logits = session.next_logits()
    return played


def record_into(played: Played, session: Session, *, look: bool) -> None:
    """Let a session's decoder write down what it computes."""
    decoder: Any = session._core._decoder
    steps = decoder.steps
    decoder.runner = _RecordingRunner(decoder.runner, played, look)
    steps.selector = _RecordingSelector(steps.selector, played)
    session.attach(
        Instruments(
            on_refresh=lambda tokens, chosen: played.refreshes.append(Refresh(tokens, chosen))
        )
    )


def rules_of(engine: Engine, config: SessionConfig) -> VisibilityRules:
    """The visibility rules of a policy on a model."""
    model_config = engine.model.config.get_text_config()
    heads = getattr(model_config, "num_key_value_heads", None)
    return VisibilityRules(
        sink_tokens=config.memory.sink_tokens,
        recent_tokens=config.memory.recent_tokens,
        windows=engine.shape.windows,
        dense_layers=frozenset(config.memory.dense_layers),
        kv_heads=heads or model_config.num_attention_heads,
    )


def replay(
    engine: Engine, config: SessionConfig, played: Played
) -> tuple[ReferenceRun, list[Tensor]]:
    """The plain forward over the same ids with the same step kinds and selections."""
    rules = rules_of(engine, config)
    masks = visibility_masks(rules, len(played.ids), played.trace, played.refreshes)
    return masked_run(engine.model, played.ids, masks), masks


def close(actual: Tensor, expected: Tensor, tolerance: float = LOGITS_TOLERANCE) -> bool:
    """Equal within a share of the largest expected logit."""
    error = (actual.float().cpu() - expected.float().cpu()).abs().max()
    return bool(error <= tolerance * expected.abs().max().clamp(min=1e-6))


def choice_lead(logits: Tensor, config: SessionConfig, position: int) -> float:
    """By how much the chosen token leads the next best one, noise included, in logit units."""
    sampling = config.sampling
    if sampling.temperature == 0.0:
        first, second = logits.float().topk(2).values.tolist()
        return float(first - second)
    noise = uniform_noise(sampling.seed, position, logits.shape[-1], logits.device)
    noisy = logits.double() - sampling.temperature * torch.log(-torch.log(noise))
    first, second = noisy.topk(2).values.tolist()
    return float(first - second)


def same_tokens(
    first: Played,
    second: Played,
    config: SessionConfig,
    tolerance: float = LOGITS_TOLERANCE,
) -> bool:
    """Whether two sessions generated the same tokens.

    A difference is accepted only where rounding decides: the draw of the first session led by no
    more than the tolerance, a share of the largest logit. Tokens behind such a difference are not
    compared.

    Raises:
        AssertionError: They differ where rounding cannot be the reason.
    """
    for one, other in zip(first.trace, second.trace, strict=True):
        if one.token_id != other.token_id:
            assert one.position == other.position
            logits = first.row_logits[one.position - 1]
            lead = choice_lead(logits, config, one.position)
            allowed = tolerance * float(logits.abs().max())
            assert lead <= allowed, (
                f"position {one.position}: led by {lead:.3g}, {allowed:.3g} allowed"
            )
            return False
    return True
