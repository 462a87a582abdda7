"""Records a run in detail: token texts, kinds of steps, selections, recalled attention mass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.evaluation.ablation.store import FORMAT

if TYPE_CHECKING:
    from torch import Tensor

    from sfi_agent.evaluation.ablation.grid_sections import TraceSettings
    from sfi_agent.evaluation.ablation.units import RunKey
    from sfi_agent.evaluation.fidelity.attention_probe import AttentionProbe, AttentionSample
    from sfi_agent.evaluation.play import CaseRun, TurnRun
    from sfi_agent.evaluation.tasks import Case
    from sfi_agent.protocols import Selection
    from sfi_agent.session.session import Session

__all__ = ["DetailRecorder", "position_runs", "spread"]

_STEP_FIELDS = (
    "position",
    "kind",
    "slow_step",
    "reason",
    "memory_tokens",
    "segment_tokens",
    "seconds",
    "drafted_tokens",
    "accepted_tokens",
)


@dataclass(frozen=True, slots=True)
class _Refresh:
    """One refresh: per layer how many KV heads selected each position (`[history]`, CPU)."""

    history_tokens: int
    heads_per_layer: dict[int, Tensor]


class DetailRecorder:
    """Watches one session while it plays a case.

    Args:
        session: The session; instruments are attached to it.
        settings: How much is kept.
    """

    def __init__(self, session: Session, settings: TraceSettings) -> None:
        from sfi_agent.engine.instruments import Instruments
        from sfi_agent.evaluation.fidelity.attention_probe import AttentionProbe

        self._session = session
        self._settings = settings
        self._prompt_ids: list[int] = []
        self._refreshes: dict[int, _Refresh] = {}
        self._probe: AttentionProbe = AttentionProbe(settings.probe_every_steps)
        session.attach(
            Instruments(
                on_refresh=self._note_refresh,
                on_fast_attention=self._probe,
            )
        )

    def note_first_turn(self, turn: TurnRun) -> None:
        """Take the prompt's ids while the session has them; call it when the first turn is over."""
        if turn.steps:
            self._prompt_ids = self._session.token_ids[: turn.steps[0].position]

    def document(self, key: RunKey, case: Case, run: CaseRun) -> dict[str, Any]:
        """The trace of the first answer, and the recall over all of them."""
        first, turn = run.turns[0], case.turns[0]
        memory = self._session.config.memory
        sparse = self._session.config.mode == "slow_fast"
        prompt = self._prompt_ids
        steps = [{name: asdict(step)[name] for name in _STEP_FIELDS} for step in first.steps]
        step_of = {
            step.position: index for index, step in enumerate(first.steps) if step.kind != "fast"
        }
        last = first.steps[-1].position if first.steps else -1
        refreshes = [item for tokens, item in sorted(self._refreshes.items()) if tokens <= last]
        kept = spread(refreshes, self._settings.slow_steps)
        return {
            "format": FORMAT,
            **key.as_json(),
            "recorded": self._settings.as_recorded(),
            "question": turn.question,
            "references": list(turn.references),
            "output": first.output,
            "right": first.score.right,
            "parts": first.score.parts,
            "exact": first.score.exact,
            "num_layers": self._session.engine.shape.num_layers,
            "kv_heads": _kv_heads(self._session),
            "dense_layers": list(memory.dense_layers) if sparse else [],
            "sink_tokens": memory.sink_tokens if sparse else None,
            "recent_tokens": memory.recent_tokens if sparse else None,
            "selected_tokens": memory.selected_tokens if sparse else None,
            "prompt_tokens": len(prompt),
            "tokens": _texts(self._session, [*prompt, *first.output_ids]),
            "steps": steps,
            "slow_steps_total": len(refreshes),
            "refreshes": [self._refresh(item, step_of) for item in kept],
            "recall": self._recall(run) if sparse else None,
        }

    def _note_refresh(self, history_tokens: int, selections: list[Selection | None]) -> None:
        # A refresh from the same history again is a retry or a corrected draft: it counts.
        self._refreshes[history_tokens] = _Refresh(
            history_tokens,
            {
                layer: _heads_per_position(selection, history_tokens)
                for layer, selection in enumerate(selections)
                if selection is not None
            },
        )

    def _refresh(self, item: _Refresh, step_of: Mapping[int, int]) -> dict[str, Any]:
        layers = item.heads_per_layer
        shown = spread(sorted(layers), self._settings.layers)
        union = sum(layers.values())
        return {
            "history_tokens": item.history_tokens,
            "step": step_of.get(item.history_tokens),
            "selected_heads_total": len(layers) * _kv_heads(self._session),
            "union": position_runs(union.tolist()) if layers else [],  # type: ignore[union-attr]
            "layers": {str(layer): position_runs(layers[layer].tolist()) for layer in shown},
            "layers_total": len(layers),
        }

    def _recall(self, run: CaseRun) -> dict[str, Any]:
        # The token at position p was chosen from the step that processed position p - 1.
        retried = {
            step.position - 1 for turn in run.turns for step in turn.steps if step.kind == "retry"
        }
        samples = self._probe.samples(retried)
        if not samples:
            return {"fast_steps": 0, "layers": None, "mean": None, "reason": "no fast step"}
        by_layer: dict[int, list[AttentionSample]] = defaultdict(list)
        for sample in samples:
            by_layer[sample.layer].append(sample)
        layers = [
            _mean_per_head(by_layer[layer]) if layer in by_layer else None
            for layer in range(self._session.engine.shape.num_layers)
        ]
        values = [value for heads in layers if heads is not None for value in heads]
        return {
            "fast_steps": len({sample.position for sample in samples}),
            "layers": layers,
            "mean": sum(values) / len(values),
        }


def position_runs(counts: Sequence[int]) -> list[list[int]]:
    """Counts per position as runs `[start, length, count]` of equal counts above zero."""
    runs: list[list[int]] = []
    for position, count in enumerate(counts):
        if not count:
            continue
        if runs and runs[-1][0] + runs[-1][1] == position and runs[-1][2] == count:
            runs[-1][1] += 1
        else:
            runs.append([position, 1, count])
    return runs


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, in order; the first and the last among them
    when `most` is 2 or more."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _heads_per_position(selection: Selection, history_tokens: int) -> Tensor:
    import torch

    positions, counts = selection.positions[0], selection.counts[0]
    places = torch.arange(positions.shape[-1], device=positions.device)
    chosen = positions[places < counts[:, None]]
    return torch.bincount(chosen, minlength=history_tokens).cpu()


def _mean_per_head(samples: Sequence[AttentionSample]) -> list[float]:
    columns = zip(*(sample.recall for sample in samples), strict=True)
    return [sum(column) / len(samples) for column in columns]


def _kv_heads(session: Session) -> int:
    config: Any = session.engine.model.config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _texts(session: Session, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; "" while a character is incomplete."""
    from sfi_agent.session.output.text_stream import TextStream

    assert session.engine.tokenizer is not None
    stream = TextStream(session.engine.tokenizer)
    texts = [stream.push(token_id) for token_id in ids]
    if texts:
        texts[-1] += stream.finish()
    return texts
