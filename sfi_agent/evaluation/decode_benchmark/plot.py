"""The times of a decode benchmark as one SVG picture, written by hand."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

__all__ = ["plot_svg"]

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 800, 110, 190, 64, 34
_BAR = 18
_TEXT, _FAINT, _LINE = "#1f2933", "#52606d", "#cbd2d9"
_BARS = {"generate": "#9aa5b1", "dense": "#52606d"}
_BAR_COLOR = "#2b6cb0"
_ROOF_COLOR = "#c05621"
_STEPS = (1.0, 2.0, 5.0)


def plot_svg(document: dict[str, Any]) -> str:
    """Milliseconds per token of each arm, with quartiles and roofs.

    Args:
        document: What the command writes as JSON.
    """
    arms = document["arms"]
    longest = max(arm["quartile_seconds"][1] for arm in arms.values()) * 1000
    longest = max(longest, *(arm["median_seconds"] * 1000 for arm in arms.values()))
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    bottom = _TOP + _ROW * len(arms)
    height = bottom + 52
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13" '
        'role="img">',
        f"<title>{escape(_title(document))}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 24, _title(document), size=15, weight="600"),
        _text(_LEFT, 44, _subtitle(document), color=_FAINT),
    ]
    parts += _axis(longest, scale, bottom)
    for index, (name, arm) in enumerate(arms.items()):
        parts += _bar(_TOP + _ROW * index, name, arm, scale)
    legend = "bar: median; thin line: quartiles; mark: the roof, bytes over the speed of a copy"
    parts.append(_text(_LEFT, bottom + 40, legend, color=_FAINT, size=12))
    return "\n".join([*parts, "</svg>", ""])


def _title(document: dict[str, Any]) -> str:
    batch = document["batch"]
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    return (
        f"{document['shape']}, {document['dtype']}, {document['context_tokens']:,} tokens x "
        f"{sequences}: ms per token of each"
    )


def _subtitle(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return f"{machine['device_name']}, torch {machine['torch']}"


def _axis(longest: float, scale: float, bottom: int) -> list[str]:
    parts = []
    step = _tick_step(longest)
    ticks = int(longest / step)
    for index in range(ticks + 1):
        value = index * step
        x = _LEFT + value * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{_LINE}"/>'
        )
        parts.append(_text(x, bottom + 18, f"{value:g}", color=_FAINT, size=12, anchor="middle"))
    return parts


def _bar(top: int, name: str, arm: dict[str, Any], scale: float) -> list[str]:
    median = arm["median_seconds"] * 1000
    low, high = (1000 * value for value in arm["quartile_seconds"])
    roof = arm["roof_seconds"] * 1000
    middle = top + _BAR / 2
    end = _LEFT + median * scale
    color = _BARS.get(name, _BAR_COLOR)
    said = f"{median:.3g} ms, {arm['share_of_roof']:.0%} of the roof"
    parts = [
        _text(_LEFT - 8, middle + 4, name, anchor="end"),
        f'<rect x="{_LEFT}" y="{top}" width="{median * scale:.1f}" height="{_BAR}" '
        f'fill="{color}"/>',
        f'<line x1="{_LEFT + low * scale:.1f}" y1="{middle}" x2="{_LEFT + high * scale:.1f}" '
        f'y2="{middle}" stroke="{_TEXT}" stroke-width="2"/>',
        _text(max(end, _LEFT + high * scale) + 6, middle + 4, said, color=_FAINT, size=12),
    ]
    if roof <= median:
        x = _LEFT + roof * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{top - 3}" x2="{x:.1f}" y2="{top + _BAR + 3}" '
            f'stroke="{_ROOF_COLOR}" stroke-width="3"/>'
        )
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    color: str = _TEXT,
    size: int = 13,
    weight: str = "400",
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _tick_step(longest: float) -> float:
    """A round step that gives four to ten ticks."""
    power = 10.0**-9
    while True:
        for factor in _STEPS:
            if longest / (factor * power) <= 8:
                return factor * power
        power *= 10
