"""The hook implementation that offers the built-in boundary detectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfi_agent import hookimpl
from sfi_policies.answer_start import AnswerStart, AnswerStartConfig
from sfi_policies.drift import Drift, DriftConfig
from sfi_policies.entropy import Entropy, EntropyConfig
from sfi_policies.interval import Interval, IntervalConfig
from sfi_policies.never import Never, NeverConfig
from sfi_policies.punctuation import Punctuation, PunctuationConfig
from sfi_policies.random import Random, RandomConfig
from sfi_policies.spacy_sentences import SpacySentences, SpacySentencesConfig
from sfi_policies.structure import Structure, StructureConfig


@hookimpl
def sfi_register_boundary_detectors(register: Callable[..., Any]) -> None:
    """Register every built-in detector; the classes are their own factories."""
    register("punctuation", PunctuationConfig, Punctuation)
    register("spacy", SpacySentencesConfig, SpacySentences)
    register("entropy", EntropyConfig, Entropy)
    register("interval", IntervalConfig, Interval)
    register("random", RandomConfig, Random)
    register("structure", StructureConfig, Structure)
    register("answer_start", AnswerStartConfig, AnswerStart)
    register("drift", DriftConfig, Drift)
    register("never", NeverConfig, Never)
