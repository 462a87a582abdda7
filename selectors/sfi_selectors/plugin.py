"""The built-in selectors enter through the same hook as third-party ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfi_agent import hookimpl
from sfi_selectors.cumulative_mass import CumulativeMass, CumulativeMassConfig
from sfi_selectors.kl_fusion import KlFusion, KlFusionConfig
from sfi_selectors.page import Page, PageConfig
from sfi_selectors.per_head import PerHead, PerHeadConfig
from sfi_selectors.question import Question, QuestionConfig
from sfi_selectors.random import Random, RandomConfig
from sfi_selectors.span import Span, SpanConfig
from sfi_selectors.top_k import TopK, TopKConfig
from sfi_selectors.window import Window, WindowConfig


@hookimpl
def sfi_register_selectors(register: Callable[..., Any]) -> None:
    """Offer the built-in selectors."""
    register("top_k", TopKConfig, TopK)
    register("per_head", PerHeadConfig, PerHead)
    register("cumulative_mass", CumulativeMassConfig, CumulativeMass)
    register("kl_fusion", KlFusionConfig, KlFusion)
    register("span", SpanConfig, Span)
    register("page", PageConfig, Page)
    register("question", QuestionConfig, Question)
    register("window", WindowConfig, Window)
    register("random", RandomConfig, Random)
