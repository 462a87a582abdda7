"""The results folder: whole files or none, damage is noticed, strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sfi_agent import InputError
from sfi_agent.evaluation.ablation.store import ResultsFolder, write_atomically
from sfi_agent.evaluation.ablation.units import CaseKey, RunKey

KEY = RunKey(CaseKey("niah_single_1", 700, "dense_question", "own", 0, 3), "per_head / 64")
FINGERPRINT = {"seeds": [0], "policies": {"a": {"memory": {"sink_tokens": 4}}}}


def store(folder: Path) -> ResultsFolder:
    results = ResultsFolder(folder)
    with results.opened(FINGERPRINT):
        pass
    return results


def run_document(**more: Any) -> dict[str, Any]:
    return {"format": 1, **KEY.as_json(), "status": "done", "error": None, "turns": [], **more}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    results = store(tmp_path)
    assert results.read_run(KEY) is None and results.damaged == []
    write_atomically(results.run_path(KEY), run_document(text="Größe\u2028<script>"))
    assert results.read_run(KEY) == run_document(text="Größe\u2028<script>")
    assert [path.name for path in results.runs.iterdir()] == [f"{KEY.id}.json"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    results = store(tmp_path_factory.mktemp("damage"))
    path = results.run_path(KEY)
    write_atomically(path, run_document(numbers=[1, 2, 0.5], text="abc"))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 3))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
    else:
        byte = data.draw(st.integers(33, 126).filter(lambda value: value != whole[at]))
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        if same:  # Such as 1.0 for 1.00: other bytes, the same content.
            return
    with capture_logs() as logs:
        assert results.read_run(KEY) is None
    assert results.damaged == [f"runs/{KEY.id}.json"]
    assert [entry["event"] for entry in logs] == ["ablation_file_damaged"]


def test_a_file_under_another_runs_name_is_not_believed(tmp_path: Path) -> None:
    results = store(tmp_path)
    other = RunKey(KEY.case, "top_k / 64")
    write_atomically(results.run_path(other), run_document())
    assert results.read_run(other) is None and len(results.damaged) == 1


def test_an_interrupted_write_leaves_the_old_file_and_its_rest_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = store(tmp_path)
    path = results.run_path(KEY)
    write_atomically(path, run_document(text="first"))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space"):
            write_atomically(path, run_document(text="second"))
    rests = list(results.runs.glob(".*.tmp"))
    assert len(rests) == 1 and results.read_run(KEY) == run_document(text="first")
    store(tmp_path)
    assert list(results.runs.iterdir()) == [path]


def test_another_fingerprint_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    store(tmp_path)
    other = {"seeds": [0, 1], "policies": {"a": {"memory": {"sink_tokens": 8}}}, "new": {}}
    with pytest.raises(InputError) as caught, ResultsFolder(tmp_path).opened(other):
        pass
    message = str(caught.value)
    assert "seeds: [0] there, [0, 1] now" in message
    assert "policies.a.memory.sink_tokens: 4 there, 8 now" in message and "new only now" in message
    assert "another folder" in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "notes.txt"),
        (lambda folder: (folder / "store.json").write_text("{"), "a damaged store.json"),
        (lambda folder: (folder / "store.json").write_text("{}"), "a damaged store.json"),
        (
            lambda folder: write_atomically(folder / "store.json", {"format": 99}),
            "results of format 99",
        ),
    ],
    ids=["foreign", "half", "empty", "later format"],
)
def test_folders_that_are_not_ours_are_refused(tmp_path: Path, prepare: Any, said: str) -> None:
    prepare(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=said), ResultsFolder(tmp_path).opened(FINGERPRINT):
        pass
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="a file"):
        ResultsFolder(file).check_usable()


def test_a_kill_before_the_first_file_leaves_a_usable_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / ".store.json.77.tmp").write_text("{")
    store(tmp_path)
    assert not (tmp_path / ".store.json.77.tmp").exists()


def test_two_ablations_do_not_share_a_folder(tmp_path: Path) -> None:
    with ResultsFolder(tmp_path).opened(FINGERPRINT):
        with pytest.raises(InputError, match="another ablation is writing"):
            with ResultsFolder(tmp_path).opened(FINGERPRINT):
                pass
    store(tmp_path)
