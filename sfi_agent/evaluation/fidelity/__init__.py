"""Fidelity without labels: how far a policy is from dense decoding, on any text and checkpoint."""

from __future__ import annotations

from sfi_agent.evaluation.fidelity.attention_probe import (
    AttentionProbe,
    AttentionSample,
    attention_sample,
)
from sfi_agent.evaluation.fidelity.distributions import (
    LogitComparison,
    LogitReference,
    Step,
    kl_nats,
)
from sfi_agent.evaluation.fidelity.log_source import log_windows
from sfi_agent.evaluation.fidelity.measure import PROBE_EVERY_STEPS, measure_fidelity
from sfi_agent.evaluation.fidelity.records import (
    Acceptance,
    DistanceFidelity,
    ForcedFidelity,
    FreeFidelity,
    LayerFidelity,
    PolicyFidelity,
    Uncertainty,
    Verdict,
)
from sfi_agent.evaluation.fidelity.spread import Spread
from sfi_agent.evaluation.fidelity.summary import summarize_layers
from sfi_agent.evaluation.fidelity.text_sources import (
    file_windows,
    standard_library_name,
    standard_library_windows,
)
from sfi_agent.evaluation.fidelity.verdict import judge
from sfi_agent.evaluation.fidelity.windows import Window, WindowReader, WindowSizes, tokenizer_of

__all__ = [
    "PROBE_EVERY_STEPS",
    "Acceptance",
    "AttentionProbe",
    "AttentionSample",
    "DistanceFidelity",
    "ForcedFidelity",
    "FreeFidelity",
    "LayerFidelity",
    "LogitComparison",
    "LogitReference",
    "PolicyFidelity",
    "Spread",
    "Step",
    "Uncertainty",
    "Verdict",
    "Window",
    "WindowReader",
    "WindowSizes",
    "attention_sample",
    "file_windows",
    "judge",
    "kl_nats",
    "log_windows",
    "measure_fidelity",
    "standard_library_name",
    "standard_library_windows",
    "summarize_layers",
    "tokenizer_of",
]
