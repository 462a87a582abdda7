"""The other Python: what is said when it is missing or wrong, and how its results come back."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sfi_agent.errors import SfiError
from sfi_agent.evaluation.peers import worker
from sfi_agent.evaluation.peers.environment import (
    PINS,
    PeerError,
    check_environment,
    environment_python,
    make_environment,
    python_versions,
    run_worker,
)
from sfi_agent.evaluation.peers.exchange import Arm, PeerTurn, run_from_json
from tests.families import tiny_engine
from tests.test_evaluation.peers_cases import plan_for, planned_case

PINNED = {"python": "3.11.7", **PINS, "torch": PINS["torch"] + "+cpu"}
ARM = Arm("snapkv", "kvpress SnapKVPress", "kvpress", "explicit", "SnapKVPress", "prefill")


def fake_python(folder: Path, *, versions: dict[str, Any] | None = None, play: str = "") -> Path:
    """A program that is called like Python with the worker script and plays it by `play`."""
    path = folder / "python"
    body = textwrap.dedent(
        f"""\
        #!{sys.executable}
        import json, sys
        isolated, script, command, *files = sys.argv[1:]
        assert isolated == "-I" and script.endswith("worker.py")
        if command == "versions":
            print(json.dumps({versions if versions is not None else PINNED!r}))
            sys.exit()
        plan = json.load(open(files[0]))
        results = open(files[1], "w")
        """
    )
    path.write_text(body + textwrap.dedent(play))
    path.chmod(0o755)
    return path


PLAY = """
    for arm in plan["arms"]:
        for case in plan["cases"]:
            if case["name"] in arm["cases"]:
                turns = [
                    {"output_ids": [arm["kept_tokens"], *turn["ids"]], "seconds": 0.5}
                    for turn in case["turns"]
                ]
                record = {"arm": arm["name"], "case": case["name"], "turns": turns}
                print(json.dumps(record), file=results)
                print("played", arm["name"], flush=True)
    """


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path: Path) -> None:
    for python in (None, tmp_path / "nowhere" / "python"):
        with pytest.raises(PeerError) as raised:
            check_environment(python)
        assert "python -m sfi_agent.evaluation.peers --make-environment DIR" in str(raised.value)
        assert "--kvpress-python" in str(raised.value)
    assert issubclass(PeerError, SfiError)


def test_pinned_versions_are_accepted_whatever_the_build(tmp_path: Path) -> None:
    assert check_environment(fake_python(tmp_path)) == PINNED


@pytest.mark.parametrize("package", PINS)
def test_another_version_is_refused_by_name(package: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path, versions={**PINNED, package: "5.4.0"})
    with pytest.raises(PeerError, match=rf"got {package} 5\.4\.0; allowed: torch .*kvpress"):
        check_environment(python)


def test_a_package_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    python = fake_python(tmp_path, versions={**PINNED, "kvpress": None})
    with pytest.raises(PeerError, match="got kvpress missing"):
        check_environment(python)


def test_something_that_is_no_python_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    with pytest.raises(PeerError, match="for its versions"):
        python_versions(program)
    program.chmod(0o644)
    with pytest.raises(PeerError, match="PermissionError"):
        python_versions(program)


def test_this_python_has_versions() -> None:
    assert python_versions(sys.executable)["python"] == sys.version.split()[0]


def test_a_plan_goes_out_and_runs_come_back(tmp_path: Path) -> None:
    case, lines = planned_case(turns=2), list[str]()
    plan = plan_for(case, ARM, kept_tokens=33)
    (run,) = run_worker(fake_python(tmp_path, play=PLAY), plan, lines.append)
    assert (run.arm, run.case) == ("snapkv", case.name)
    assert run.turns == tuple(
        PeerTurn(output_ids=(33, *turn.ids), seconds=0.5) for turn in case.turns
    )
    assert lines == ["played snapkv"]


def test_the_real_worker_plays_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = tiny_engine("qwen3").model
    model.save_pretrained(tmp_path / "model")
    case, arm = planned_case(), Arm("dense", "dense", "ours", "generate")
    plan = {**plan_for(case, arm), "model": str(tmp_path / "model")}
    (run,) = run_worker(sys.executable, plan)
    (here,) = worker.play(model, plan)
    assert run.turns[0].output_ids == run_from_json(here).turns[0].output_ids


def test_a_worker_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    python = fake_python(tmp_path, play="raise RuntimeError('no such checkpoint')")
    with pytest.raises(PeerError, match="no such checkpoint") as raised:
        run_worker(python, plan_for(planned_case(), ARM))
    assert "exit status 1 and 0 of 1 results" in str(raised.value)


@pytest.mark.parametrize("ending", ["", 'results.write(\'{"arm": "sna\')'])
def test_results_that_are_cut_off_are_no_success(ending: str, tmp_path: Path) -> None:
    python = fake_python(tmp_path, play=ending)
    with pytest.raises(PeerError, match="exit status 0 and 0 of 1 results"):
        run_worker(python, plan_for(planned_case(), ARM))


def test_an_environment_is_made_in_a_new_folder_only(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="a folder that exists"):
        make_environment(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_making_an_environment_installs_the_pins_with_its_own_pip(tmp_path: Path) -> None:
    record, folder = tmp_path / "calls.jsonl", tmp_path / "environment"
    pip = environment_python(folder)
    base = tmp_path / "base"
    note = f"open({str(record)!r}, 'a').write(json.dumps(sys.argv) + chr(10))"
    base.write_text(
        f"#!{sys.executable}\nimport json, pathlib, shutil, sys\n{note}\n"
        f"if sys.argv[1:3] == ['-m', 'venv']:\n"
        f"    pathlib.Path({str(pip.parent)!r}).mkdir(parents=True)\n"
        f"    shutil.copy(sys.argv[0], {str(pip)!r})\n"
    )
    base.chmod(0o755)
    assert make_environment(folder, base_python=str(base)) == pip
    made, installed = (json.loads(line) for line in record.read_text().splitlines())
    assert made == [str(base), "-m", "venv", str(folder)]
    assert installed[:3] == [str(pip), "-m", "pip"]
    assert {f"{name}=={version}" for name, version in PINS.items()} <= set(installed)


def test_a_failing_installation_says_what_failed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_text("#!/bin/sh\necho no network >&2\nexit 3\n")
    base.chmod(0o755)
    with pytest.raises(PeerError, match="exit status 3: no network"):
        make_environment(tmp_path / "environment", base_python=str(base))
