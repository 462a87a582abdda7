"""Trains the embedded model: curriculum over document lengths, then an attention-entropy phase.

Run: python -m sfi_agent.embedded.train --out DIR [--resume] [--stop-after SECONDS]

Phases have budgets in seconds of training (compilation and data start-up not counted), so a
faster card sees more documents. State is saved at the end of every phase and when
`--stop-after` is reached; `--resume` goes on from there. `DIR/export` holds the model of the
last save in bfloat16 with its tokenizer, loadable by transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.embedded.documents import FragmentTable
from sfi_agent.embedded.export import export_network
from sfi_agent.embedded.network import TrainingForward, build_network
from sfi_agent.embedded.tokenizer_build import build_tokenizer
from sfi_agent.embedded.train_data import Batch, BatchStream, make_batch
from sfi_agent.embedded.train_progress import Meter, Phase, Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["PHASES", "SEED", "Phase", "Trainer", "main"]

SEED = 7


PHASES = (
    Phase("short", (512,), 50, 65_536, 1.5e-3, 1.5e-3),
    Phase("page", (1024,), 60, 65_536, 1.5e-3, 1.5e-3),
    Phase("pages", (2048,), 90, 65_536, 1.5e-3, 1.5e-3),
    Phase("chapter", (4096, 2048), 110, 81_920, 1.5e-3, 1.2e-3),
    Phase("long", (10_240, 4096), 150, 81_920, 1.2e-3, 7e-4),
    Phase("peaked", (10_240, 4096, 10_240, 2048), 300, 81_920, 8e-4, 1e-5, 0.03),
)
_WARMUP_STEPS = 200
_UNTIMED_STEPS = 2
_REPORT_SECONDS = 10.0
_EVALUATION_BATCHES = 3


class Trainer:
    """Runs phases, saves and resumes. One instance per process.

    Args:
        out: Folder for state, log and export.
        phases: What to do, in order.
        device: "cuda" or "cpu"; on CUDA the forward is compiled and runs under bfloat16 autocast.
        workers: Data processes.
        changes: Fields of the network configuration to replace, for tests.
        tokenizer: What `build_tokenizer` returned; None builds it.
    """

    def __init__(
        self,
        out: Path,
        *,
        phases: tuple[Phase, ...] = PHASES,
        device: str = "cuda",
        workers: int = 14,
        changes: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.out, self.phases, self.device, self.workers = out, phases, device, workers
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = tokenizer or build_tokenizer()
        self.tokenizer.save_pretrained(out / "export")
        self._tokenizer_file = out / "export" / "tokenizer.json"
        network: Qwen3ForCausalLM = build_network(len(self.tokenizer), SEED, **(changes or {}))
        self.network = network
        network.to(device)  # type: ignore[arg-type]
        self.forward = TrainingForward(network, compiled=device == "cuda")
        self.optimizer = _make_optimizer(network, fused=device == "cuda")
        self.progress = Progress()

    def run(self, *, stop_after: float = math.inf) -> bool:
        """Train until all phases are done, or until `stop_after` seconds of wall time.

        Returns:
            True when every phase is complete.
        """
        deadline = time.monotonic() + stop_after
        while self.progress.phase < len(self.phases):
            phase = self.phases[self.progress.phase]
            key = f"{SEED}:{phase.name}"
            with BatchStream(
                key,
                phase.lengths,
                phase.batch_tokens,
                self.progress.phase_batches,
                self._tokenizer_file,
                self.workers,
            ) as stream:
                done = self._run_phase(phase, stream, deadline)
            if done:
                self._say({"phase_done": phase.name, **self.evaluate(phase)})
                self.progress.phase += 1
                self.progress.phase_seconds, self.progress.phase_batches = 0.0, 0
            self.save()
            if not done:
                return False
        return True

    def _run_phase(self, phase: Phase, stream: BatchStream, deadline: float) -> bool:
        state, meter = self.progress, Meter()
        untimed = {length: _UNTIMED_STEPS for length in phase.lengths}
        mark = time.monotonic()
        while state.phase_seconds < phase.seconds:
            if time.monotonic() > deadline:
                return False
            batch = stream.take()
            loss, entropy = self.step(phase, batch)
            meter.add(loss, entropy, batch.ids.size)
            state.steps += 1
            state.phase_batches += 1
            state.tokens += batch.ids.size
            length = batch.ids.shape[1]
            if untimed[length]:
                self._synchronize()
                untimed[length] -= 1
                mark = time.monotonic()
            else:
                now = time.monotonic()
                state.phase_seconds += now - mark
                mark = now
            if meter.elapsed > _REPORT_SECONDS:
                rate = self.optimizer.param_groups[0]["lr"]
                self._say({"phase": phase.name, "rate": round(rate, 6), **meter.report(state)})
                meter = Meter()
        return True

    def step(self, phase: Phase, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns loss and attention entropy, both in nats."""
        state = self.progress
        share = min(1.0, state.phase_seconds / phase.seconds)
        rate = phase.rate_start + (phase.rate_end - phase.rate_start) * share
        rate *= min(1.0, (state.steps + 1) / _WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, entropy, _ = self._losses(phase, batch)
        (loss + phase.entropy_weight * entropy).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), entropy.detach()

    def _losses(self, phase: Phase, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        rows = self._move(batch.rows) if phase.entropy_weight else None
        with self._autocast():
            return self.forward(self._move(batch.ids).long(), self._move(batch.answered), rows)

    def evaluate(self, phase: Phase) -> dict[str, Any]:
        """Exact answers per kind on held-out documents of the phase's longest length.

        Teacher forced: an answer counts when the greedy choice is right at each of its tokens,
        which is when greedy decoding would have written it.
        """
        table = FragmentTable(self.tokenizer.backend_tokenizer)
        length = max(phase.lengths)
        right: dict[str, list[bool]] = {}
        for index in range(_EVALUATION_BATCHES):
            batch = make_batch(
                f"held-out:{index}", length, max(1, phase.batch_tokens // length), table
            )
            # With gradients on, the compiled graph of the training steps serves here as well.
            _, _, hits = self._losses(phase, batch)
            for row, turns in enumerate(batch.turns):
                for kind, start, end in turns:
                    exact = bool(hits[row, start - 1 : end - 1].all())
                    right.setdefault(kind, []).append(exact)
        exact_by_kind = {k: round(sum(v) / len(v), 4) for k, v in sorted(right.items())}
        return {"length": length, "exact": exact_by_kind}

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

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _move(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _make_optimizer(network: Qwen3ForCausalLM, *, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-9, fused=fused)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module text."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and export")
    parser.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=14, help="data processes")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="wall seconds")
    parser.add_argument("--time-scale", type=float, default=1.0, help="factor on all budgets")
    options = parser.parse_args(arguments)
    phases = tuple(
        Phase(**{**asdict(phase), "seconds": phase.seconds * options.time_scale})
        for phase in PHASES
    )
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(options.out, phases=phases, device=options.device, workers=options.workers)
    if options.resume:
        trainer.resume()
    complete = trainer.run(stop_after=options.stop_after)
    print(json.dumps({"complete": complete, **asdict(trainer.progress)["history"][-1]}))


if __name__ == "__main__":
    main()
