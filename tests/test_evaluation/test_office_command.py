"""`python -m sfi_agent.evaluation.office`: wrong input is one message and status 2."""

from __future__ import annotations

import pytest

from sfi_agent.evaluation.office import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "0"], "cases 0; allowed: 1 or more"),
        (["--presets", "fats"], "no preset has this name; got 'fats'"),
        (["--model", "/nowhere"], "no such directory"),
        (["--log-tokens", "3", "--cases", "1"], "got log_tokens 3"),
    ],
)
def test_wrong_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == "" and said in told.err.splitlines()[-1]
