"""Trains the embedded model on a CPU: short stretched documents first, then long real ones.

Run: python -m sfi_agent.embedded.train --out DIR [--resume] [--stop-after SECONDS]

A phase is a number of batches, and every batch follows from its name, so a run can be repeated
document by document. State is saved every few minutes, at the end of every phase and when
`--stop-after` is reached; `--resume` goes on from there. `DIR/export` holds the model of the
last save in float32 with its tokenizer, loadable by transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.embedded.export import export_network
from sfi_agent.embedded.network import ForwardResult, build_network, training_forward
from sfi_agent.embedded.recipe import PHASES, SEED
from sfi_agent.embedded.tokenizer_build import build_tokenizer
from sfi_agent.embedded.train_data import Batch, make_batch
from sfi_agent.embedded.train_progress import Meter, Phase, Progress, Shape
from sfi_agent.embedded.writer import FragmentTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["Trainer", "main"]

_WARMUP_STEPS = 50
_REPORT_SECONDS = 20.0
_SAVE_SECONDS = 180.0
_EVALUATION_TOKENS = 16_384


class Trainer:
    """Runs phases, saves and resumes.

    Args:
        out: Folder for state, log and export.
        phases: What to do, in order.
        device: "cpu" or "cuda".
        changes: Fields of the network configuration to replace, for tests.
        tokenizer: What `build_tokenizer` returned; None builds it.
    """

    def __init__(
        self,
        out: Path,
        *,
        phases: tuple[Phase, ...] = PHASES,
        device: str = "cpu",
        changes: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.out, self.phases, self.device = out, phases, device
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = tokenizer or build_tokenizer()
        self.table = FragmentTable(self.tokenizer.backend_tokenizer)
        network: Qwen3ForCausalLM = build_network(len(self.tokenizer), SEED, **(changes or {}))
        self.network = network
        network.to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.progress = Progress()

    def run(self, *, stop_after: float = math.inf) -> bool:
        """Train until all phases are done, or until `stop_after` seconds of wall time.

        Returns:
            True when every phase is complete.
        """
        deadline = time.monotonic() + stop_after
        while self.progress.phase < len(self.phases):
            phase = self.phases[self.progress.phase]
            done = self._run_phase(phase, deadline)
            if done:
                self._say({"phase_done": phase.name, **self.evaluate(phase)})
                self.progress.phase += 1
                self.progress.phase_batches = 0
            self.save()
            if not done:
                return False
        return True

    def _run_phase(self, phase: Phase, deadline: float) -> bool:
        state, meter = self.progress, Meter()
        saved = last = time.monotonic()
        for index, batch in self._batches(phase):
            if last > deadline:
                return False
            result = self.step(phase, batch, index / phase.batches)
            meter.add(result, batch.ids.numel())
            state.steps += 1
            state.phase_batches = index + 1
            state.tokens += batch.ids.numel()
            now = time.monotonic()
            state.seconds, last = state.seconds + now - last, now
            if meter.elapsed > _REPORT_SECONDS:
                rate = self.optimizer.param_groups[0]["lr"]
                self._say({"phase": phase.name, "rate": round(rate, 6), **meter.report(state)})
                meter = Meter()
            if now - saved > _SAVE_SECONDS:
                self.save()
                saved = now
        return True

    def _batches(self, phase: Phase) -> Iterator[tuple[int, Batch]]:
        for index in range(self.progress.phase_batches, phase.batches):
            shape = phase.shapes[index % len(phase.shapes)]
            yield index, self._make_batch(f"{SEED}:{phase.name}:{index}", shape)

    def _make_batch(self, name: str, shape: Shape) -> Batch:
        return make_batch(
            name,
            shape.tokens,
            shape.documents,
            self.table,
            last_position=shape.last_position,
            log_share=shape.log_share,
            missing_share=shape.missing_share,
        )

    def step(self, phase: Phase, batch: Batch, share: float) -> ForwardResult:
        """One optimiser step; `share` of the phase is done, from 0 to 1."""
        rate = phase.rate_start + (phase.rate_end - phase.rate_start) * share
        rate *= min(1.0, (self.progress.steps + 1) / _WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self._forward(phase, batch)
        total = result.loss + phase.source_weight * sum(result.sources.values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _forward(self, phase: Phase, batch: Batch) -> ForwardResult:
        with torch.autocast(self.device, torch.bfloat16, enabled=phase.low_precision):
            return training_forward(
                self.network,
                batch.ids.to(self.device),
                batch.answered.to(self.device),
                batch.positions.to(self.device),
                {
                    role: (rows.to(self.device), targets.to(self.device))
                    for role, (rows, targets) in batch.sources.items()
                },
            )

    def evaluate(self, phase: Phase) -> dict[str, Any]:
        """Exact answers per kind on held-out documents of the phase's longest shape.

        Teacher forced: an answer counts when the greedy choice is right at each of its tokens,
        which is when greedy decoding would have written it. Positions are not stretched.
        """
        longest = max(phase.shapes, key=lambda shape: shape.tokens)
        shape = Shape(longest.tokens, longest.documents, longest.log_share)
        right: dict[str, list[bool]] = {}
        for index in range(max(1, _EVALUATION_TOKENS // (shape.tokens * shape.documents))):
            batch = self._make_batch(f"held-out:{index}", shape)
            with torch.no_grad():
                result = self._forward(phase, batch)
            hits = torch.zeros(batch.ids.shape, dtype=torch.bool)
            hits[batch.answered] = result.right.cpu()
            for row, turns in enumerate(batch.turns):
                for kind, start, end in turns:
                    right.setdefault(kind, []).append(bool(hits[row, start:end].all()))
        exact = {kind: [sum(found), len(found)] for kind, found in sorted(right.items())}
        return {"length": shape.tokens, "exact": exact}

    def save(self) -> None:
        """Write state (to resume) and export (to use)."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        part = self.out / "state.pt.part"
        torch.save(state, part)
        part.replace(self.out / "state.pt")
        export_network(self.network, self.tokenizer, self.out / "export")
        log = json.dumps(self.progress.history, indent=0)
        (self.out / "training_log.json").write_text(log, encoding="utf-8")

    def resume(self) -> None:
        """Go on from the last save. Raises FileNotFoundError when there is none."""
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _say(self, record: dict[str, Any]) -> None:
        self.progress.history.append(record)
        print(json.dumps(record), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module text."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and export")
    parser.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of matrix products")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="wall seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    trainer = Trainer(options.out, device=options.device)
    if options.resume:
        trainer.resume()
    complete = trainer.run(stop_after=options.stop_after)
    print(json.dumps({"complete": complete, "seconds": round(trainer.progress.seconds)}))


if __name__ == "__main__":
    main()
