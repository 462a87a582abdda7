"""The contract tests of sfi-agent, and what these two plugins promise beyond them."""

from __future__ import annotations

import torch
from sfi_example import Fading, FadingConfig, Keyword, KeywordConfig

from sfi_agent import Evidence, TokenEvent
from sfi_agent.testing import check_detector, check_selector


def test_fading_keeps_the_selector_contract() -> None:
    check_selector(Fading(FadingConfig()))
    check_selector(Fading(FadingConfig(half_life_tokens=3.0)))


def test_equal_attention_goes_to_the_newest() -> None:
    evidence = Evidence(torch.zeros(1, 2, 1, 6), None, torch.zeros(1, 2, 1), candidate_start=4)
    assert Fading(FadingConfig()).select(evidence, 2).positions.tolist() == [[[8, 9], [8, 9]]]


def test_strong_attention_outweighs_age() -> None:
    logits = torch.zeros(1, 1, 1, 6)
    logits[..., 1] = 5.0
    evidence = Evidence(logits, None, torch.zeros(1, 1, 1), candidate_start=0)
    assert Fading(FadingConfig()).select(evidence, 1).positions.tolist() == [[[1]]]


def test_keyword_keeps_the_detector_contract() -> None:
    check_detector(lambda: Keyword(KeywordConfig()))


def test_a_word_is_found_however_it_is_cut() -> None:
    text = "It rains. However, we go; howevers are none. However "
    for width in (1, 2, 5, 7):
        detector = Keyword(KeywordConfig(words=("however",)))
        detector.reset([], "")
        pieces = [text[start : start + width] for start in range(0, len(text), width)]
        found = [
            detector.after_token(TokenEvent(token_id=0, position=place, text=piece))
            for place, piece in enumerate(pieces)
        ]
        assert sum(boundary is not None for boundary in found) == 2
