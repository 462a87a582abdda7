"""What `sfi-agent eval` shows: a table of policies, recall by layer, and a verdict for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sfi_agent.cli.fitting_tables import fitting_tables
from sfi_agent.cli.quantities import count_text, share_text

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.evaluation.fidelity import ForcedFidelity, LayerFidelity, PolicyFidelity

__all__ = ["EvalScreen"]

_WIDEST_CELLS = 110
_WORST_HEADS = 3
_LEVELS = (0.6, 0.8, 0.9, 0.95, 0.97, 0.99, 0.999)
"""Recall from which the next mark of the strip is taken."""
_BARS, _DIGITS = "▁▂▃▄▅▆▇█", "12345678"
_ALL_BAR, _ALL_PLAIN = "·", "."
_VERDICT_STYLES = {
    "exact": "bold green",
    "safe": "bold green",
    "caution": "bold yellow",
    "unsafe": "bold red",
    "undecided": "bold magenta",
}
_COLUMNS = (
    "policy",
    "slow",
    "sees",
    "top-1",
    "KL",
    "KL p99",
    "recall",
    "error",
    "as dense",
    "accepts",
)


class EvalScreen:
    """Prints a measurement.

    Args:
        console: Where to print.
        document: The JSON document; model, source and settings are taken from it.
        policies: What was measured, in order.
    """

    def __init__(
        self, console: Console, document: Mapping[str, Any], policies: Sequence[PolicyFidelity]
    ) -> None:
        self._console = console
        self._document = document
        self._policies = policies
        self._width = min(console.width, _WIDEST_CELLS)
        bars = _can_show(console.encoding, _BARS + _ALL_BAR)
        self._bars = _BARS if bars else _DIGITS
        self._all = _ALL_BAR if bars else _ALL_PLAIN

    def show(self) -> None:
        """Everything, from what was measured to the verdicts."""
        self._print(*self._opening())
        for table in self._tables():
            self._print(table)
        self._print(*self._legend())
        for policy in self._policies:
            self._print(Rule(f" {policy.policy} ", style="dim", align="left"), self._detail(policy))

    def _print(self, *parts: RenderableType, space: int = 1) -> None:
        self._console.print(Padding(Group(*parts), (space, 0, 0, 0)), width=self._width)

    def _opening(self) -> Iterator[Text]:
        model, source = self._document["model"], self._document["source"]
        windows = source["windows"]
        lengths = [window["prompt_tokens"] for window in windows]
        yield Text(
            f"{model['name']}: {model['class']}, {_parameters(model['parameters'])}, "
            f"{count_text(model['layers'], 'layer')}, {model['dtype']} on {model['device']}",
            style="bold",
        )
        yield Text(
            f"{count_text(len(windows), 'window')} of {_span(lengths)} tokens of history: "
            f"{source['name']}"
        )
        for window in windows:
            yield Text(f"  {window['origin']}", style="dim")

    def _tables(self) -> Iterator[Table]:
        """One table, or on a narrow terminal several with a part of the columns each."""
        rows, styles = [], []
        for policy in self._policies:
            rows += [tuple(_continuation_row(policy)), tuple(_text_row(policy.forced["text"]))]
            styles += [None, "dim"]
        return fitting_tables(_COLUMNS, rows, self._width, styles=styles)

    def _legend(self) -> Iterator[Text]:
        tokens = self._document["settings"]["continuation_tokens"]
        marks = ", ".join(
            f"{mark} {low:g}" for mark, low in zip(self._bars[1:], _LEVELS, strict=True)
        )
        lines = (
            "First row: on dense's own greedy continuation (at most "
            f"{count_text(tokens, 'token')} per window); second row: on the text itself.",
            "Higher is better: top-1 (tokens that are dense's own choice), recall (attention mass "
            "that fast steps see), as dense (equal tokens before free-running output first "
            "differs, median; of dense's), accepts (fast tokens that verification would keep).",
            "Lower is better: slow (share of slow steps) and sees (share of the history) are the "
            "cost; KL (dense || policy, nat); error (relative, of the attention output).",
            f"Recall by layer: {self._bars[0]} below {_LEVELS[0]:g}, {marks} and up; "
            f"{self._all} reads its whole history.",
        )
        for line in lines:
            yield Text(line, style="dim")

    def _detail(self, policy: PolicyFidelity) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right", no_wrap=True)
        grid.add_column()
        grid.add_row("recall", self._strip(policy.layers))
        worst = policy.worst_layer
        if worst is not None:
            grid.add_row("worst", _worst(worst))
        grid.add_row("distance", _distances(policy.forced["continuation"]))
        verdict = policy.verdict
        grid.add_row("verdict", Text(verdict.sentence, style=_VERDICT_STYLES[verdict.level]))
        for number, remedy in enumerate(verdict.remedies, start=1):
            grid.add_row("change" if number == 1 else "", Text(f"{number}. {remedy}"))
        return grid

    def _strip(self, layers: Sequence[LayerFidelity]) -> Text:
        text = Text("layer 0 ")
        for layer in layers:
            text.append(*self._mark(layer.recall_mean))
        return text.append(f" {len(layers) - 1}")

    def _mark(self, recall: float | None) -> tuple[str, str]:
        if recall is None:
            return self._all, "dim"
        level = sum(recall >= low for low in _LEVELS)
        style = "green" if recall >= 0.99 else "yellow" if recall >= 0.9 else "red"
        return self._bars[level], style


def _continuation_row(policy: PolicyFidelity) -> Iterator[str]:
    forced, free = policy.forced["continuation"], policy.free
    sparse = [layer for layer in policy.layers if layer.recall_mean is not None]
    yield policy.policy
    yield share_text(free.slow_share)
    yield "all" if forced.memory_share is None else share_text(forced.memory_share)
    yield _percent(forced.agreement)
    yield _small(forced.kl_nats.mean)
    yield _small(forced.kl_nats.p99)
    # Layers that read everything recall everything and make no error: they count as such.
    count = len(policy.layers)
    yield f"{1 - sum(layer.lost_mass for layer in sparse) / count:.3f}"
    yield _small(sum(layer.output_error_mean or 0.0 for layer in sparse) / count)
    yield f"{free.median_agreed_tokens:g}/{median(free.dense_tokens):g}"
    if free.verified_acceptance is not None:
        yield _percent(free.verified_acceptance)
    else:
        yield _accepted(forced)


def _text_row(forced: ForcedFidelity) -> Iterator[str]:
    yield "  text"
    yield share_text(forced.slow_share)
    yield "all" if forced.memory_share is None else share_text(forced.memory_share)
    yield _percent(forced.agreement)
    yield _small(forced.kl_nats.mean)
    yield _small(forced.kl_nats.p99)
    yield from ("", "", "")
    yield _accepted(forced)


def _accepted(forced: ForcedFidelity) -> str:
    share = None if forced.acceptance is None else forced.acceptance.kept_share
    return "" if share is None else _percent(share)


def _worst(layer: LayerFidelity) -> Text:
    ranked = sorted(enumerate(layer.head_recall), key=lambda item: (item[1], item[0]))
    heads = ", ".join(f"{head} ({recall:.3f})" for head, recall in ranked[:_WORST_HEADS])
    word = "heads" if len(layer.head_recall) > 1 else "head"
    return Text(
        f"layer {layer.layer}: recall {layer.recall_mean:.3f}, output error "
        f"{_small(layer.output_error_mean or 0.0)}; worst {word} {heads}"
    )


def _distances(forced: ForcedFidelity) -> Text:
    found = ", ".join(f"{item.label}: {_small(item.kl_mean_nats)}" for item in forced.by_distance)
    return Text(f"mean KL by tokens since the refresh: {found}")


def _percent(share: float) -> str:
    """Rounded down, so that nothing is called 100 % that is not."""
    return "100 %" if share == 1 else f"{math.floor(share * 1000) / 10} %"


def _small(number: float) -> str:
    """A number of which only the size matters."""
    if number < 0.001:
        return "0" if number == 0 else "<0.001"
    return f"{number:.3f}" if number < 1 else f"{number:.2f}"


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _parameters(number: int) -> str:
    billions = number / 1e9
    return f"{billions:.1f} B parameters" if billions >= 1 else f"{number / 1e6:.1f} M parameters"


def _can_show(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
