"""Tools of MCP servers in the tool loop of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sfi_agent import McpTools
from tests.test_session.conversations import FULL, call_text, chat_engine, require_whole, says
from tests.test_session.mcp_servers import nothing_stays, office, raw

END = "<|im_end|>"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with nothing_stays():
        yield


def test_a_session_runs_them_beside_its_own_tools() -> None:
    def add(left: int, right: int) -> int:
        """Adds.

        Args:
            left: One number.
            right: The other one.
        """
        return left + right

    engine = chat_engine()
    calls = "\n".join(
        [
            call_text("office_find_room", name="Ada", floor=3),
            call_text("add", left=1, right=2),
            call_text("office_fail", reason="Bo"),
            call_text("office_find_room", name=5),
        ]
    )
    with McpTools(office(), prefix="office_") as server:
        config = FULL.replace(sampling={"max_new_tokens": 400})
        with engine.session(config, tools=[*server.tools, add]) as session:
            with says(engine, f"{calls}{END}", f"Room 32.{END}"):
                assert session.run("Where?").text == "Room 32."
            answers = [item["content"] for item in session.messages if item["role"] == "tool"]
            require_whole(session)
    assert '"room": 32' in answers[0] and answers[1] == "3"
    assert answers[2].startswith("office_fail failed: ")
    assert answers[3].startswith("office_find_room was not run. Argument name must be of type str")


def test_a_slow_tool_is_cut_off_and_the_loop_goes_on(tmp_path: Path) -> None:
    engine, log, slow_log = chat_engine(), tmp_path / "log", tmp_path / "slow_log"
    with (
        McpTools(raw(log), include=["zeta"]) as server,
        McpTools(raw(slow_log), include=["silent"], call_timeout_seconds=1.0) as slow_server,
    ):
        with engine.session(FULL, tools=[*server.tools, *slow_server.tools]) as session:
            turns = (call_text("silent"), call_text("zeta", text="fine"), "Done.")
            with says(engine, *(f"{turn}{END}" for turn in turns)):
                assert session.run("Go.").text == "Done."
            answers = [item["content"] for item in session.messages if item["role"] == "tool"]
    assert "after 1 seconds" in answers[0] and answers[1] == "fine"
    assert log.read_text().split()[1:] == ["ended"]
    assert slow_log.read_text().split()[1:] == ["asked", "cancelled", "ended"]
