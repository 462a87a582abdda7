"""What a policy is on a model: the decoder that follows it, and the empty state it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoder import Decoder
from sfi_agent.engine.decoding_state import StepSettings
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.sampling import Sampler
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.plugins import build_detector, build_selector
from sfi_agent.session.piece_source import TokenizerPieces

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["empty_sequence", "make_decoder"]


def make_decoder(engine: Engine, config: SessionConfig) -> Decoder:
    """A decoder with detectors, selector and sampler of its own.

    Raises:
        PluginError: A plugin cannot be built.
    """
    sparse, seed = config.mode == "slow_fast", config.sampling.seed
    detectors = [
        (entry.name, build_detector(entry, engine.tokenizer, default_seed=seed))
        for entry in (config.boundaries if sparse else ())
    ]
    pieces = TokenizerPieces(engine.tokenizer) if engine.tokenizer is not None else None
    sampling, refresh = config.sampling, config.refresh
    return Decoder(
        engine.runner,
        Sampler(sampling.temperature, sampling.top_p, sampling.top_k, seed),
        build_selector(config.selector, default_seed=seed),
        BoundaryMonitor(detectors, pieces),
        StepSettings(
            sparse=sparse,
            slow_step=config.slow_step,
            minimum_segment_tokens=refresh.min_segment_tokens,
            maximum_segment_tokens=refresh.max_segment_tokens,
            evidence_queries=refresh.evidence_queries,
            prefill_evidence_queries=refresh.prefill_evidence_queries,
            lag_tokens=refresh.lag,
        ),
    )


def empty_sequence(engine: Engine, config: SessionConfig) -> SequenceState:
    """A sequence without tokens, with a memory where the policy has one."""
    memory, history, shape = config.memory, config.history, engine.shape
    layout = None
    if config.mode == "slow_fast":
        layout = MemoryLayout(
            memory.sink_tokens, memory.selected_tokens, memory.recent_tokens, shape.device
        )
    return SequenceState(
        shape.windows,
        layout,
        frozenset(memory.dense_layers),
        history.reserve_tokens,
        engine.runner.host.store if history.device == "cpu" else None,
    )
