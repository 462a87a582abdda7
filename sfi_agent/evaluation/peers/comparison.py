"""One comparison: same weights, same cases, same token ids, every arm."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import explain
from sfi_agent.evaluation.peers.arms import DENSE_ARM, Contest
from sfi_agent.evaluation.peers.earlier import Earlier, read_earlier
from sfi_agent.evaluation.peers.environment import (
    PeerError,
    check_environment,
    python_versions,
    run_worker,
)
from sfi_agent.evaluation.peers.exchange import ArmRun, PlannedCase, plan_json
from sfi_agent.evaluation.peers.questions import Questions, prompt_json
from sfi_agent.evaluation.peers.rendering import CaseRenderer
from sfi_agent.evaluation.peers.scores import ArmSummary, ScoredTurn, score_runs, summarise
from sfi_agent.evaluation.peers.sessions import play_sessions
from sfi_agent.evaluation.peers.tables import comparison_tables
from sfi_agent.evaluation.tasks import Case, Score, Task

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["Comparison", "compare", "weights_digest"]

_READ_BYTES = 2**20

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out.

    Attributes:
        titles: Every arm's name in words, in the order of the tables.
        summaries: Sums per task, protocol, arm and turn.
        turns: Every turn of every arm.
        details: Weights, settings, versions, arms and prompts, as plain data.
    """

    titles: Mapping[str, str]
    summaries: tuple[ArmSummary, ...]
    turns: tuple[ScoredTurn, ...]
    details: Mapping[str, Any]

    def markdown(self) -> str:
        """Tables, with what they were made under."""
        details = self.details
        lines = [
            f"Kept or visible per layer and KV head: {details['kept_tokens']} tokens. "
            f"Model {details['model']}, {details['dtype']} on {details['device']}, "
            f"{details['threads']} threads.",
            "",
            *(
                f"- {name}: " + ", ".join(f"{key} {value}" for key, value in found.items())
                for name, found in details["versions"].items()
            ),
            "",
            comparison_tables(self.summaries, self.titles),
        ]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            **self.details,
            "titles": dict(self.titles),
            "summaries": [_summary_json(item) for item in self.summaries],
            "turns": [asdict(turn) for turn in self.turns],
        }

    def save(self, path: Path) -> tuple[Path, Path]:
        """Write the JSON to `path`, and the tables beside it with the suffix .md."""
        tables = path.with_suffix(".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1), encoding="utf-8")
        tables.write_text(self.markdown(), encoding="utf-8")
        return path, tables


def compare(
    engine: Engine,
    model: Path,
    contest: Contest,
    questions: Questions,
    *,
    kvpress_python: Path | None = None,
    earlier_path: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Play all arms on all cases and judge them.

    Args:
        engine: The model that sessions use.
        model: Folder that it came from; the workers load the same files.
        contest: The arms.
        questions: The cases.
        kvpress_python: Python of the peer's environment; needed when an arm is played there.
        earlier_path: Output of an earlier comparison; what its workers computed is taken over.
        progress: Called with a line for every finished arm and case.

    Raises:
        PeerError: The peer's environment is missing or wrong, or a worker failed.
        InputError: A case does not fit, a prompt cannot be rendered, or the earlier comparison
            was made under other conditions.
        TemplateError: The chat template cannot be used.
    """
    renderer = CaseRenderer(engine)
    cases, sources = questions.make(renderer)
    details = _details(engine, model, contest, questions, cases)
    earlier = Earlier() if earlier_path is None else read_earlier(earlier_path, details)
    pythons = _pythons(contest, earlier, kvpress_python)
    versions = {name: found for name, (_, found) in pythons.items()}
    details["versions"] = earlier.merged_versions(versions)
    runs = [*earlier.runs, *_play_workers(contest, earlier, pythons, details, cases, progress)]
    _check_dense(runs)
    runs += play_sessions(engine, contest.policies, cases, progress)

    turns = _judged(runs, cases, sources, renderer)
    return Comparison(contest.titles, tuple(summarise(turns)), tuple(turns), details)


def _judged(
    runs: Sequence[ArmRun],
    cases: Sequence[PlannedCase],
    sources: Mapping[str, tuple[Task, Case]],
    renderer: CaseRenderer,
) -> list[ScoredTurn]:
    def judge(name: str, index: int, text: str) -> Score:
        task, case = sources[name]
        return task.score(case.turns[index], text)

    def decode(ids: Sequence[int]) -> str:
        return str(renderer.tokenizer.decode(list(ids), skip_special_tokens=True))

    return score_runs(runs, cases, judge, decode, DENSE_ARM)


def _details(
    engine: Engine,
    model: Path,
    contest: Contest,
    questions: Questions,
    cases: Sequence[PlannedCase],
) -> dict[str, Any]:
    """What the results follow from, besides versions."""
    return {
        **_settings(engine, model),
        "kept_tokens": contest.kept_tokens,
        "context_tokens": questions.context_tokens,
        "cases_per_task": questions.cases,
        "first_seed": questions.first_seed,
        "arms": {arm.name: asdict(arm) for arm in contest.worker_arms},
        "policies": {name: config.resolved() for name, config in contest.policies.items()},
        "prompts": [prompt_json(case) for case in cases],
    }


def _check_dense(runs: Sequence[ArmRun]) -> None:
    """What the others are compared with must be there."""
    for run in runs:
        for turn in run.turns:
            if run.arm == DENSE_ARM and turn.error:
                raise PeerError(
                    explain(
                        f"Side by side: dense transformers on {run.case}",
                        got=turn.error,
                        remedy="Ask for fewer context tokens, or another device or dtype",
                    )
                )


def _pythons(
    contest: Contest, earlier: Earlier, kvpress_python: Path | None
) -> dict[str, tuple[Path, dict[str, str | None]]]:
    """Python and versions of every environment in which an arm is still to be played."""
    ours = Path(sys.executable)
    found = {"ours": (ours, python_versions(ours))}
    missing = [arm for arm in contest.worker_arms if arm.name not in earlier.arms]
    if any(arm.environment == "kvpress" for arm in missing) or kvpress_python is not None:
        versions = check_environment(kvpress_python)
        assert kvpress_python is not None
        found["kvpress"] = (kvpress_python, versions)
    return found


def _play_workers(
    contest: Contest,
    earlier: Earlier,
    pythons: Mapping[str, tuple[Path, Any]],
    details: Mapping[str, Any],
    cases: Sequence[PlannedCase],
    progress: Progress | None,
) -> list[ArmRun]:
    runs: list[ArmRun] = []
    for environment, (python, _) in pythons.items():
        arms = [
            arm
            for arm in contest.worker_arms
            if arm.environment == environment and arm.name not in earlier.arms
        ]
        if arms:
            plan = plan_json(
                arms,
                cases,
                model=details["model"],
                kept_tokens=contest.kept_tokens,
                device=details["device"],
                dtype=details["dtype"],
                threads=details["threads"],
            )
            runs += run_worker(python, plan, progress)
    return runs


def _settings(engine: Engine, model: Path) -> dict[str, Any]:
    """Where and how all arms compute."""
    import torch

    return {
        "model": str(model),
        "weights": weights_digest(model),
        "device": str(engine.shape.device),
        "dtype": str(engine.shape.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def weights_digest(model: Path) -> str:
    """SHA-256 over a checkpoint's configuration and weights; "" for what is no folder."""
    if not model.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted([model / "config.json", *model.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _summary_json(item: ArmSummary) -> dict[str, Any]:
    return {
        **asdict(item),
        "answer_interval_95": item.answer_interval,
        "part_interval_95": item.part_interval,
        "slow_share": item.slow_share,
        "acceptance": item.acceptance,
        "read_per_token": item.read_per_token,
        "milliseconds_per_token": item.milliseconds_per_token,
    }
