"""Ablations on the embedded model: results, resuming after kills, workers, failures, refusals."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from sfi_agent import ConfigError, InputError, Selection, SfiError, hookimpl
from sfi_agent.embedded import checkpoint_path
from sfi_agent.evaluation.ablation import (
    AblationGrid,
    AblationProgress,
    AblationResults,
    run_ablation,
    write_ablation_report,
)
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.store import ResultsFolder
from sfi_agent.evaluation.ablation.worker import WorkerArguments, serve
from sfi_agent.evaluation.ablation.worker_processes import as_error
from sfi_agent.plugins import temporary_plugins
from sfi_agent.settings import Settings
from tests.source_tree import ROOT

KEYS: dict[str, Any] = {
    "tasks": [{"name": "office_attribute", "context_tokens": [500, 640], "cases": 2}],
    "base": {"memory": {"recent_tokens": 16, "selected_tokens": 24}},
    "selectors": ["per_head", "window"],
    "traces": {"policies": 1, "probe_every_steps": 1},
}
GRID = AblationGrid(**KEYS)
TIMES = ("seconds_per_token", "seconds", "created", "workers")


def timeless(value: Any) -> Any:
    """Results without what differs between two runs of the same: times and dates."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every finished run: both change when one is written again."""
    files = [*(folder / "runs").iterdir(), *(folder / "traces").iterdir()]
    found = [path for path in files if not path.name.startswith(".")]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in found
    }


def runs_of(found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The stamps of runs alone."""
    return {name: stamp for name, stamp in found.items() if name.startswith("runs/")}


def played(folder: Path, **keys: Any) -> tuple[AblationResults, list[AblationProgress]]:
    moments: list[AblationProgress] = []
    results = run_ablation(
        keys.pop("grid", GRID), folder, report=False, on_progress=moments.append, **keys
    )
    return results, moments


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> AblationResults:
    """The grid, run in one go in this process."""
    return played(tmp_path_factory.mktemp("reference"))[0]


@pytest.fixture
def copy(reference: AblationResults, tmp_path: Path) -> Path:
    """A finished folder to do things to."""
    return shutil.copytree(reference.folder, tmp_path / "copy")


# ---------------------------------------------------------------- what comes out


def test_the_table_is_complete_and_says_what_the_runs_say(reference: AblationResults) -> None:
    document = reference.document
    assert document["complete"] and document["failed"] == [] and document["notes"] == []
    assert document["planned_runs"] == document["finished_runs"] == 12
    assert [(row["context_tokens"], row["policy"]) for row in reference.rows] == [
        (tokens, policy) for tokens in (500, 640) for policy in ("dense", "per_head", "window")
    ]
    for row in reference.rows:
        runs = [json.loads(path.read_text()) for path in (reference.folder / "runs").glob("*.json")]
        mine = [
            run
            for run in runs
            if run["policy"] == row["policy"] and run["context_tokens"] == row["context_tokens"]
        ]
        turns = [turn for run in mine for turn in run["turns"]]
        assert len(mine) == row["cases"] == 2
        for name in ("right", "parts", "generated_tokens", "fast_tokens", "dense_passes"):
            assert row[name] == sum(turn[name] for turn in turns) and row["parts"] > 0
        kinds = ("fast_tokens", "slow_tokens", "retry_tokens")
        assert sum(row[kind] for kind in kinds) == row["generated_tokens"]
        assert row["agreed_share"] == 1.0 or row["policy"] != "dense"
        assert (row["fast_tokens"] == 0) == (row["policy"] == "dense")
    dense = {row["context_tokens"]: row for row in reference.rows if row["policy"] == "dense"}
    assert all(row["slow_share"] > 0.5 and row["right"] == row["parts"] for row in dense.values())


def test_csv_and_json_hold_the_same_numbers(reference: AblationResults) -> None:
    document = json.loads((reference.folder / "results.json").read_text())
    assert document.pop("checksum") and document == reference.document
    with (reference.folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(reference.rows)
    for line, row in zip(lines, reference.rows, strict=True):
        for name in ("policy", "right", "slow_share", "acceptance", "memory_tokens_mean"):
            assert line[name] == ("" if row[name] is None else str(row[name]))
    assert AblationGrid.load(reference.folder / "grid.yaml") == GRID


def test_traces_show_the_steps_and_what_was_selected(reference: AblationResults) -> None:
    traces = {
        trace["policy"]: trace
        for path in (reference.folder / "traces").glob("*.json")
        if (trace := json.loads(path.read_text()))
    }
    assert set(traces) == {"dense", "per_head"}
    runs = {
        run["policy"]: run
        for path in (reference.folder / "runs").glob("*-500-s0-c0000-*.json")
        if (run := json.loads(path.read_text()))
    }
    for policy, trace in traces.items():
        turn = runs[policy]["turns"][0]
        assert trace["output"] == turn["output"], "looking changed the run"
        kinds = [step["kind"] for step in trace["steps"]]
        assert kinds.count("fast") == turn["fast_tokens"] and len(kinds) == turn["generated_tokens"]
        assert len(trace["tokens"]) == trace["prompt_tokens"] + len(kinds)
        assert [step["position"] for step in trace["steps"]] == list(
            range(trace["prompt_tokens"], len(trace["tokens"]))
        )
        answer = "".join(trace["tokens"][trace["prompt_tokens"] :])
        assert turn["output"].strip() in answer
        assert turn["question"] in "".join(trace["tokens"][: trace["prompt_tokens"]])
    refreshes = traces["per_head"]["refreshes"]
    assert refreshes and traces["dense"]["refreshes"] == []
    for refresh in refreshes:
        heads = refresh["selected_heads_total"] // refresh["layers_total"]
        layers = refresh["layers"].values()
        # Each head of each layer selects its budget; the union counts layers and heads.
        assert all(sum(length * n for _, length, n in runs) == 24 * heads for runs in layers)
        assert sum(length * n for _, length, n in refresh["union"]) == 24 * heads * len(layers)
        step = traces["per_head"]["steps"][refresh["step"]]
        assert step["kind"] == "slow" and step["position"] == refresh["history_tokens"]


def test_recall_is_measured_on_the_traced_policies(reference: AblationResults) -> None:
    recall = json.loads((reference.folder / "recall.json").read_text())["policies"]
    assert set(recall) == {"per_head"}
    found, model = recall["per_head"], reference.document["model"]
    assert found["fast_steps"] > 0 and len(found["layers"]) == model["layers"]
    values = [value for heads in found["layers"] for value in heads]
    assert len(values) == model["layers"] * model["query_heads"]
    assert all(0 < value <= 1 for value in values)
    assert found["mean"] == pytest.approx(sum(values) / len(values))


def test_the_report_is_written_from_a_folder_alone(copy: Path) -> None:
    (copy / "results.json").unlink()
    results = write_ablation_report(copy)
    assert results.report is not None and results.report == copy / "report.html"
    assert "per_head" in results.report.read_text(encoding="utf-8")
    assert results.complete and (copy / "results.json").exists()
    with pytest.raises(InputError, match=r"no store\.json"):
        write_ablation_report(copy.parent)
    (copy / "grid.yaml").unlink()
    with pytest.raises(InputError, match=r"without grid\.yaml"):
        write_ablation_report(copy)


# ---------------------------------------------------------------- resuming


def test_a_finished_folder_is_not_played_again(copy: Path, reference: AblationResults) -> None:
    before = stamps(copy)
    results, moments = played(copy)
    assert stamps(copy) == before and timeless(results.document) == timeless(reference.document)
    assert max(moment.resumed for moment in moments if moment.stage == "running") == 12


KILLED = """
import sys
from pathlib import Path
from sfi_agent.evaluation.ablation import AblationGrid, run_ablation
run_ablation(AblationGrid.load(sys.argv[1]), Path(sys.argv[2]), workers=2, report=False)
"""


def test_after_kill_minus_nine_nothing_finished_is_lost_or_played_again(
    reference: AblationResults,
    tmp_path: Path,
    child_environment: Callable[..., dict[str, str]],
) -> None:
    folder, wanted = tmp_path / "killed", 4
    grid = GRID.save(tmp_path / "grid.yaml")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(grid), str(folder)], env=child_environment()
    )
    try:
        deadline = time.monotonic() + 90
        while len(list((folder / "runs").glob("[!.]*.json"))) < wanted:
            assert child.poll() is None and time.monotonic() < deadline, "the child did not play"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    time.sleep(1.0)  # Its workers end with it; one that went on would write runs again, below.
    before = stamps(folder)
    assert wanted <= len(runs_of(before)) < 12 and not (folder / "results.json").exists()
    results, moments = played(folder)
    after = stamps(folder)
    assert {name: after[name] for name in before} == before, "a finished run was played again"
    running = [moment for moment in moments if moment.stage == "running"]
    assert running[0].resumed == len(runs_of(before))
    assert sum(bool(moment.detail) for moment in running) == 12 - len(runs_of(before))
    assert timeless(results.document) == timeless(reference.document)


def test_ctrl_c_sums_up_what_is_done_and_resumes(
    reference: AblationResults, tmp_path: Path
) -> None:
    def interrupt(moment: AblationProgress) -> None:
        if moment.stage == "running" and moment.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablation(GRID, tmp_path, report=False, on_progress=interrupt)
    part = json.loads((tmp_path / "results.json").read_text())
    assert not part["complete"] and part["finished_runs"] == 5 and part["rows"]
    before = stamps(tmp_path)
    results, _ = played(tmp_path)
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert timeless(results.document) == timeless(reference.document)


def test_damaged_and_half_written_runs_are_named_and_played_again(
    copy: Path, reference: AblationResults
) -> None:
    before = stamps(copy)
    half, changed, *_ = sorted((copy / "runs").iterdir())
    half.write_text(half.read_text()[:100])
    changed.write_text(changed.read_text().replace('"right": 1', '"right": 0', 1))
    (copy / "runs" / ".left.json.9.tmp").write_text("{")
    trace = next((copy / "traces").glob("*per_head*"))
    trace.write_text("")
    with capture_logs() as logs:
        results, _ = played(copy)
    damaged = [log["file"] for log in logs if log["event"] == "ablation_file_damaged"]
    assert set(damaged) == {str(half), str(changed), str(trace)}
    assert sum("was damaged" in note for note in results.document["notes"]) == 3
    after = stamps(copy)
    assert set(after) == set(before)
    again = {name for name in before if after[name] != before[name]}
    touched = {path.relative_to(copy).as_posix() for path in (half, changed, trace)}
    assert again == touched
    found, wanted = timeless(results.document), timeless(reference.document)
    assert {**found, "notes": []} == wanted


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"selectors": ["per_head", "top_k"]},
            "policies.window only there; policies.top_k only now",
        ),
        ({"seeds": [1]}, "seeds: [0] there, [1] now"),
        ({"dtype": "bfloat16"}, 'model.dtype: "float32" there, "bfloat16" now'),
        ({"base": {"memory": {"recent_tokens": 17}}}, "recent_tokens: 16 there, 17 now"),
    ],
)
def test_another_grid_in_the_same_folder_is_refused(
    copy: Path, keys: dict[str, Any], said: str
) -> None:
    before = stamps(copy)
    with pytest.raises(InputError) as caught:
        played(copy, grid=AblationGrid(**{**KEYS, **keys}))
    assert said in str(caught.value) and "another folder" in str(caught.value)
    assert stamps(copy) == before


def test_other_weights_in_the_same_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    import safetensors.torch

    other = shutil.copytree(checkpoint_path(), tmp_path / "other")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] += 1.0
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="weights_digest"):
        played(copy, grid=AblationGrid(**KEYS, model=str(other), dtype="float32"))


def test_title_and_traces_may_change_without_playing_again(copy: Path) -> None:
    before = stamps(copy)
    traces = {"policies": 2, "probe_every_steps": 2}
    results, _ = played(copy, grid=AblationGrid(**{**KEYS, "traces": traces, "title": "New"}))
    assert runs_of(stamps(copy)) == runs_of(before)
    assert results.document["title"] == "New" and len(list((copy / "traces").iterdir())) == 3
    recall = json.loads((copy / "recall.json").read_text())["policies"]
    assert set(recall) == {"per_head", "window"}
    played(copy, grid=AblationGrid(**{**KEYS, "traces": {"policies": 0}}))
    assert not list((copy / "traces").iterdir()) and not (copy / "recall.json").exists()


# ---------------------------------------------------------------- workers


@pytest.mark.skipif(os.name == "nt", reason="kills a process by a signal")
def test_workers_give_the_same_table_and_one_that_dies_loses_nothing_else(
    reference: AblationResults, tmp_path: Path
) -> None:
    seen: list[int] = []

    def kill_one(moment: AblationProgress) -> None:
        children = multiprocessing.active_children()
        if moment.stage == "running" and moment.done == 3 and len(children) == 2:
            seen.append(len(children))
            victim = children[0]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)

    folder = tmp_path / "workers"
    results = run_ablation(GRID, folder, workers=2, report=False, on_progress=kill_one)
    if seen:
        assert "signal 9" in " ".join(results.document["notes"])
    assert multiprocessing.active_children() == []
    before = stamps(folder)
    again, _ = played(folder)
    after = stamps(folder)
    assert {name: after[name] for name in before} == before
    assert timeless(again.document) == timeless(reference.document)


def test_a_worker_says_why_it_cannot_start(tmp_path: Path) -> None:
    keys = {**KEYS, "base": {"memory": {"dense_layers": [77]}}}
    ours, theirs = multiprocessing.Pipe()
    serve(theirs, WorkerArguments(AblationGrid(**keys).as_json(), str(tmp_path), 0, None))
    message = ours.recv()
    assert message[:2] == ("refused", "ConfigError") and "dense_layers" in message[2]
    error = as_error(message)
    assert isinstance(error, ConfigError) and str(error) == message[2]
    assert type(as_error(("refused", "ContextOverflowError", "too long"))) is SfiError


# ---------------------------------------------------------------- failures


class _FlakyConfig(Settings):
    pass


class _Flaky:
    """Breaks with more than 300 candidates, and gives rubbish with fewer."""

    needs: frozenset[str] = frozenset()

    def __init__(self, _config: _FlakyConfig) -> None:
        pass

    def select(self, evidence: Any, budget: int) -> Selection:
        import torch

        if evidence.logits.shape[-1] > 300:
            raise ZeroDivisionError("a bug of the plugin")
        positions = torch.full((1, evidence.logits.shape[1], budget), 10**6)
        return Selection(positions, torch.full(positions.shape[:2], budget))


class _FlakyPlugin:
    @hookimpl
    def sfi_register_selectors(self, register: Any) -> None:
        register("flaky", _FlakyConfig, _Flaky)


@pytest.fixture
def flaky() -> Iterator[None]:
    with temporary_plugins(flaky=_FlakyPlugin()):
        yield


def test_failing_runs_are_kept_with_their_reason_and_end_nothing(
    flaky: None, tmp_path: Path, reference: AblationResults
) -> None:
    keys = {**KEYS, "selectors": ["flaky", "per_head", "window"]}
    results, moments = played(tmp_path, grid=AblationGrid(**keys))
    document = results.document
    assert document["complete"] and document["failed_runs"] == 4 == len(results.failed)
    assert {failure["policy"] for failure in results.failed} == {"flaky"}
    kinds = {failure["context_tokens"]: failure for failure in results.failed}
    assert kinds[500]["error"] == "PluginError" and "contract" in kinds[500]["message"]
    assert kinds[640]["error"] == "ZeroDivisionError"
    stored = json.loads((tmp_path / kinds[640]["run"]).read_text())
    assert "_Flaky" not in stored["error"]["message"] and "select" in stored["error"]["traceback"]
    assert max(moment.failed for moment in moments) == 4
    rows = {(row["policy"], row["context_tokens"]): row for row in results.rows}
    assert rows["flaky", 500]["cases"] == 0 and rows["flaky", 500]["failed"] == 2
    others = [row for row in results.rows if row["policy"] != "flaky"]
    assert timeless(others) == timeless(reference.rows)

    before = stamps(tmp_path)
    played(tmp_path, grid=AblationGrid(**keys))
    assert stamps(tmp_path) == before, "failed runs were played again unasked"
    played(tmp_path, grid=AblationGrid(**keys), retry_failed=True)
    after = stamps(tmp_path)
    again = {name for name in before if before[name] != after[name]}
    assert again == {failure["run"] for failure in results.failed}


def test_an_error_of_the_listener_is_no_failed_run(tmp_path: Path) -> None:
    def listen(moment: AblationProgress) -> None:
        if moment.done == 2:
            raise ValueError("a bug of the listener")

    with pytest.raises(ValueError, match="a bug of the listener"):
        run_ablation(GRID, tmp_path, report=False, on_progress=listen)
    part = json.loads((tmp_path / "results.json").read_text())
    assert part["finished_runs"] == 2 and part["failed_runs"] == 0


def test_a_full_disk_ends_the_ablation_and_is_no_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: AblationResults
) -> None:
    real, written = os.fsync, [0]

    def full(descriptor: int) -> None:
        written[0] += 1
        if written[0] == 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left.*it resumes"):
            played(tmp_path)
    results, _ = played(tmp_path)
    assert timeless(results.document) == timeless(reference.document)


# ---------------------------------------------------------------- refused before any compute


def _without_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(checkpoint_path() / name, folder)
    return folder


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = _without_tokenizer(tmp_path / "bare")
    with pytest.raises(InputError) as caught, capture_logs():
        played(tmp_path / "out", grid=AblationGrid(**KEYS, model=str(model)))
    assert "without a tokenizer" in str(caught.value) and str(model) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_everything_that_does_not_fit_the_model_is_listed(tmp_path: Path) -> None:
    grid = AblationGrid(
        tasks=[
            {"name": "office_attribute", "context_tokens": [3, 500, 10**7]},
            {"name": "office_report_easy", "context_tokens": [5], "protocol": "sparse_question"},
        ],
        settings={"memory.dense_layers": [[], [0], [99]]},
    )
    with pytest.raises(ConfigError) as caught:
        played(tmp_path / "out", grid=grid)
    message = str(caught.value)
    for part in ("3 context_tokens", "10000000 context_tokens", "office_report_easy with 5", "99"):
        assert part in message
    assert "500 context_tokens" not in message and not (tmp_path / "out").exists()


def test_no_worker_and_foreign_folders_are_refused_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    grid = AblationGrid(**KEYS, model=str(tmp_path / "missing"))
    with pytest.raises(InputError, match="workers=0"):
        played(tmp_path / "out", workers=0)
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="mine"):
        played(tmp_path, grid=grid)
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_folder_knows_what_is_missing(copy: Path) -> None:
    plan, results = Plan.of(GRID), ResultsFolder(copy)
    assert plan.jobs(results, retry_failed=True) == [] == plan.detail_jobs(results)
    lost = plan.runs[4]
    results.run_path(lost).unlink()
    (job,) = plan.jobs(results, retry_failed=False)
    assert (job.case, job.policies, job.detailed) == (lost.case, (lost.policy,), False)


def test_reading_a_grid_imports_no_torch(child_python: Callable[..., str]) -> None:
    program = f"""
        import sys
        from sfi_agent.evaluation.ablation import AblationGrid
        AblationGrid.load({str(ROOT / "examples" / "ablation_grid.yaml")!r})
        print("torch" in sys.modules, "transformers" in sys.modules)
    """
    assert child_python(program) == "False False"
