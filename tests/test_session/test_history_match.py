"""Longest common prefix of ids, against the plain definition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.session.templates.history_match import common_prefix, describe_difference
from tests.tiny_tokenizers import byte_tokenizer

IDS = st.lists(st.integers(0, 1), max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shared=IDS, left=IDS, right=IDS)
def test_common_prefix_is_the_longest(shared: list[int], left: list[int], right: list[int]) -> None:
    ids_a, ids_b = [*shared, *left], [*shared, *right]
    expected = 0
    for one, other in zip(ids_a, ids_b, strict=False):
        if one != other:
            break
        expected += 1
    assert common_prefix(ids_a, tuple(ids_b)) == expected


def test_the_difference_is_described_with_its_text() -> None:
    tokenizer = byte_tokenizer()
    left, right = tokenizer.encode("the same old end"), tokenizer.encode("the same new end")
    text = describe_difference(tokenizer, left, right)
    assert text.startswith("token 9: ")
    assert "old" in text and "new" in text
    assert describe_difference(tokenizer, left, left) == "no difference in 16 tokens"
