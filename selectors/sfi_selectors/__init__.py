"""The selectors that come with sfi-agent. Importing this package does not import torch."""

from __future__ import annotations

from sfi_selectors.cumulative_mass import CumulativeMass, CumulativeMassConfig
from sfi_selectors.kl_fusion import KlFusion, KlFusionConfig, KlFusionScores
from sfi_selectors.page import Page, PageConfig
from sfi_selectors.per_head import PerHead, PerHeadConfig
from sfi_selectors.question import Question, QuestionConfig
from sfi_selectors.random import Random, RandomConfig
from sfi_selectors.span import Span, SpanConfig
from sfi_selectors.top_k import TopK, TopKConfig
from sfi_selectors.window import Window, WindowConfig

__all__ = [
    "CumulativeMass",
    "CumulativeMassConfig",
    "KlFusion",
    "KlFusionConfig",
    "KlFusionScores",
    "Page",
    "PageConfig",
    "PerHead",
    "PerHeadConfig",
    "Question",
    "QuestionConfig",
    "Random",
    "RandomConfig",
    "Span",
    "SpanConfig",
    "TopK",
    "TopKConfig",
    "Window",
    "WindowConfig",
]
