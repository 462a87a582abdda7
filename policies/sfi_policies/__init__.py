"""Built-in boundary detectors of sfi-agent, one per file.

They enter through the same hook as anybody else's (`sfi_policies.plugin`). Nothing here imports
torch or transformers, and spaCy is imported when its detector is built, not before.
"""

from __future__ import annotations

from sfi_policies.answer_start import AnswerStart, AnswerStartConfig
from sfi_policies.drift import Drift, DriftConfig
from sfi_policies.entropy import Entropy, EntropyConfig
from sfi_policies.interval import Interval, IntervalConfig
from sfi_policies.never import Never, NeverConfig
from sfi_policies.punctuation import Punctuation, PunctuationConfig
from sfi_policies.random import Random, RandomConfig
from sfi_policies.spacy_sentences import SpacySentences, SpacySentencesConfig
from sfi_policies.structure import Structure, StructureConfig

__all__ = [
    "AnswerStart",
    "AnswerStartConfig",
    "Drift",
    "DriftConfig",
    "Entropy",
    "EntropyConfig",
    "Interval",
    "IntervalConfig",
    "Never",
    "NeverConfig",
    "Punctuation",
    "PunctuationConfig",
    "Random",
    "RandomConfig",
    "SpacySentences",
    "SpacySentencesConfig",
    "Structure",
    "StructureConfig",
]
