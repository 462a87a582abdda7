"""Numbers with their units, as people read them."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "seconds_text", "share_text"]


def bytes_text(number: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: "29.6 MB"."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 999.5 else f"{number:,.0f} GB"


def seconds_text(seconds: float) -> str:
    """Seconds, or milliseconds below one: "1.24 s", "13.5 ms"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def share_text(share: float) -> str:
    """A share of 1 in per cent: "12 %", "0.4 %"."""
    percent = share * 100
    return f"{percent:.1f} %" if 0 < percent < 1 else f"{percent:.0f} %"


def count_text(number: int, noun: str) -> str:
    """A number with its noun: "1 token", "2 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
