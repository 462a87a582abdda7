"""Numbers with units."""

from __future__ import annotations

import pytest

from sfi_agent.cli.quantities import bytes_text, count_text, seconds_text, share_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (947_123, "947 kB"),
        (999_800, "1 MB"),
        (29_600_000, "29.6 MB"),
        (1_190_000_000, "1.19 GB"),
        (4_000_000_000_000, "4,000 GB"),
    ],
)
def test_bytes(number: int, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.01346, "13.5 ms"), (0.9999, "1 s"), (12.34, "12.3 s"), (1234.5, "1,234 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_shares_and_counts() -> None:
    assert [share_text(value) for value in (0.0, 0.004, 0.115, 1.0)] == [
        "0 %",
        "0.4 %",
        "12 %",
        "100 %",
    ]
    assert [count_text(number, "token") for number in (0, 1, 4182)] == [
        "0 tokens",
        "1 token",
        "4,182 tokens",
    ]
