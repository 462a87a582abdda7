"""Tools of MCP servers: real servers in this process and beside it, good ones and bad ones."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mcp_types
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import StdioServerParameters
from mcp.server import Server
from structlog.testing import capture_logs

from sfi_agent import InputError, McpTools, MissingExtraError, ToolCall, ToolServerError
from sfi_agent.session.mcp.client import MAX_PAGES
from sfi_agent.session.tool_use.tools import Tool, ToolSet
from tests.source_tree import ROOT
from tests.test_session.async_cases import eventually
from tests.test_session.mcp_servers import RAW_NAMES, nothing_stays, office, raw, run


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with nothing_stays():
        yield


def process_is_there(log: Path) -> bool:
    """Whether the server that writes this log runs; also where only its end is not fetched."""
    try:
        os.kill(int(log.read_text().split()[0]), 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------- what is offered


def test_the_tools_of_a_server_in_this_process() -> None:
    with McpTools(office(instructions="Ask first.")) as server:
        assert (server.name, server.status, server.instructions) == ("office", "open", "Ask first.")
        names = [tool.name for tool in server.tools]
        assert (
            names == ["change", "fail", "find_room", "repeat", "wait"] == list(server.annotations)
        )
        tool = server.tools[2]
        assert tool.description == "Finds a room."
        assert tool.parameters is not None
        assert tool.parameters["properties"]["floor"]["nullable"] is True
        assert run(server, "find_room", name="Ada", floor=3) == (
            '{\n  "name": "Ada",\n  "room": 32\n}',
            False,
        )
        assert run(server, "find_room", floor=None)[0].startswith("find_room was not run. Missing")
    assert server.status == "closed" and repr(server) == "McpTools('office', closed, 5 tools)"
    assert len(server.tools) == 5
    content, is_error = run(server, "repeat", text="x")
    assert is_error and "a connection that is closed" in content


def test_schemas_do_not_depend_on_the_order_of_a_server() -> None:
    def listed(order: int) -> Server[Any]:
        async def tools(context: Any, parameters: Any) -> mcp_types.ListToolsResult:
            schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}}
            items = [
                mcp_types.Tool(name=name, input_schema=dict(sorted(schema.items())[::order]))
                for name in ("x", "y")
            ]
            return mcp_types.ListToolsResult(tools=items[::order])

        return Server("listed", on_list_tools=tools)

    with McpTools(listed(1)) as one, McpTools(listed(-1)) as other:
        assert ToolSet(one.tools).canonical_json == ToolSet(other.tools).canonical_json
        assert one.tools[0].description == "The tool x of listed."


def test_names_are_chosen_and_clashes_refused() -> None:
    def offered(**choice: Any) -> list[str | None]:
        with McpTools(office(), **choice) as server:
            assert [tool.name for tool in server.tools] == list(server.annotations)
            return [tool.name for tool in server.tools]

    assert offered(prefix="o_", include=["repeat", "fail"]) == ["o_fail", "o_repeat"]
    assert offered(exclude={"fail", "change"}) == ["find_room", "repeat", "wait"]
    renamed = offered(prefix="o_", rename={"repeat": "say"}, include=["repeat", "wait"])
    assert renamed == ["o_wait", "say"]
    for choice, problem in (
        ({"include": ["reply"]}, "reply; allowed: change, fail"),
        ({"exclude": ["reply"]}, "reply; allowed"),
        ({"rename": {"reply": "x"}}, "reply; allowed"),
        ({"rename": {"repeat": "fail"}}, "a second tool named 'fail'"),
        ({"prefix": "my tools: "}, r"'my tools: \w+' is no usable name"),
    ):
        with pytest.raises(ToolServerError, match=problem):
            offered(**choice)
    with McpTools(office()) as one, McpTools(office(), prefix="b_") as other:
        assert len(ToolSet([*one.tools, *other.tools])) == 10
        with pytest.raises(ValueError, match="Give two tools the same name"):
            ToolSet([*one.tools, *one.tools])


def test_tools_with_names_and_schemas_of_their_own_kind() -> None:
    seen: list[dict[str, Any]] = []
    properties = {name: {"type": "integer"} for name in ("self", "max-size", "from", "*")}

    async def tools(context: Any, parameters: Any) -> mcp_types.ListToolsResult:
        schema = {"type": "object", "properties": properties}
        listed = [mcp_types.Tool(name=name, input_schema=schema) for name in ("files.read", "ok")]
        broken = mcp_types.Tool(name="broken", input_schema={"type": "object", "required": 5})
        return mcp_types.ListToolsResult(tools=[*listed, broken])

    async def call(context: Any, parameters: Any) -> mcp_types.CallToolResult:
        seen.append(parameters.arguments)
        return mcp_types.CallToolResult(content=[])

    server = Server("files", on_list_tools=tools, on_call_tool=call)
    with pytest.raises(
        ToolServerError, match=r"'files.read' is no usable name.*exclude=\['files.re"
    ):
        McpTools(server, exclude=["broken"]).open()
    with pytest.raises(
        ToolServerError, match="tool 'broken' of files; got its schema is not valid"
    ):
        McpTools(server, include=["broken"]).open()
    with McpTools(server, rename={"files.read": "read"}, exclude=["broken"]) as opened:
        arguments = {name: index for index, name in enumerate(properties)}
        assert run(opened, "read", **{**arguments}) == ("(The tool returned nothing.)", False)
    assert seen == [arguments]


def test_annotations_say_what_the_protocol_says_where_a_server_is_silent() -> None:
    with McpTools(office(), call_timeout_seconds=7) as server:
        rooms, fail = server.annotations["find_room"], server.annotations["fail"]
        assert (rooms.title, rooms.read_only) == ("Rooms", True)
        assert (fail.read_only, fail.destructive, fail.open_world) == (False, True, True)
        # What may change something runs in the order of the calls.
        assert [tool.parallel for tool in server.tools] == [False, False, True, False, False]
        assert {tool.timeout_seconds for tool in server.tools} == {7.0}
        with pytest.raises(TypeError):
            server.annotations["fail"] = rooms  # type: ignore[index]


def test_all_pages_are_read_and_endless_ones_refused(tmp_path: Path) -> None:
    with McpTools(raw(tmp_path / "log")) as server:
        assert [tool.name for tool in server.tools] == RAW_NAMES

    async def endless(context: Any, parameters: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[], next_cursor="more")

    with pytest.raises(ToolServerError, match=f"more than {MAX_PAGES} pages"):
        McpTools(Server("endless", on_list_tools=endless)).open()


# ---------------------------------------------------------------- calls


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=3))
def test_texts_arrive_as_they_were_sent(texts: list[str]) -> None:
    with McpTools(office()) as server:
        for text in texts:
            assert run(server, "repeat", text=text) == (
                text or '{"result": ""}',
                False,
            )


def test_texts_pass_through_a_process(tmp_path: Path) -> None:
    with McpTools(raw(tmp_path / "log")) as server:
        for text in ("Zürich ☕ \U0001f41f", 'a\n\t"b"\\', "x" * 200_000, "\x00\x1f\u2028"):
            assert run(server, "zeta", text=text) == (text, False)


def test_errors_are_results_that_the_model_reads(tmp_path: Path) -> None:
    with McpTools(office()) as server:
        content, is_error = run(server, "fail", reason="Bo")
        assert is_error and "fail failed: ToolFailure: " in content
        assert run(server, "nope") == (run(server, "nope")[0], True)
    with McpTools(raw(tmp_path / "log")) as server:
        for name, problem in (
            ("malformed", "malformed failed: ToolServerError: Call malformed; got ValidationError"),
            ("no_content", "no_content failed: ToolServerError: Call no_content; got Validation"),
            ("refused", "refused failed: ToolServerError: Call refused; got MCPError: not today"),
        ):
            content, is_error = run(server, name)
            assert is_error and content.startswith(problem), content
        # Lines that are no messages harm nobody.
        assert run(server, "garbage") == ("garbage", False)
        assert run(server, "zeta") == ("zeta", False)


def test_a_process_that_dies_is_an_error_result_and_closing_is_fine(tmp_path: Path) -> None:
    with McpTools(raw(tmp_path / "log")) as server, capture_logs() as logs:
        for _ in range(2):
            content, is_error = run(server, "die")
            assert is_error and content.endswith("got a lost connection to python.")
    assert [item["event"] for item in logs if item["log_level"] == "warning"] == [
        *["tool_server_lost"] * 2
    ]


def test_cancelling_reaches_the_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with McpTools(raw(log)) as server:
        silent = next(tool for tool in server.tools if tool.name == "silent")

        async def impatient() -> None:
            call = asyncio.ensure_future(silent.function())
            await eventually(lambda: "asked" in log.read_text())
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(impatient())
        assert run(server, "zeta") == ("zeta", False)
        assert log.read_text().split()[1:] == ["asked", "cancelled"]
    assert log.read_text().split()[1:] == ["asked", "cancelled", "ended"] and not process_is_there(
        log
    )


def test_closing_ends_what_waits_and_calls_are_fine_from_many_threads(tmp_path: Path) -> None:
    with McpTools(raw(tmp_path / "log")) as server:
        found: list[tuple[str, bool]] = []

        def ask(name: str, text: str) -> None:
            found.append(run(server, name, text=text))

        waiting = threading.Thread(target=ask, args=("silent", ""))
        waiting.start()
        threads = [threading.Thread(target=ask, args=("zeta", str(i))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [(str(i), False) for i in range(8)]
        assert waiting.is_alive()
        server.close()
        waiting.join(20)
        assert found[-1][1] and "a connection that is closed" in found[-1][0]


def test_async_code_uses_it_without_blocking_its_loop(tmp_path: Path) -> None:
    async def work() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async with McpTools(raw(tmp_path / "log")) as server, McpTools(office()) as other:
            zeta, wait = server.tools[-1], other.tools[-1]
            answers = await asyncio.gather(
                wait.function(seconds=0.1), *(zeta.function(text=str(i)) for i in range(9))
            )
            assert answers == ["waited", *map(str, range(9))]
        ticking.cancel()
        assert ticks > 20

    asyncio.run(work())


def test_an_opening_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def impatient() -> None:
        async def enter() -> None:
            async with McpTools(raw(log, "mute")):
                raise AssertionError

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(enter(), 0.2)

    asyncio.run(impatient())
    assert not process_is_there(log)


def test_a_tool_can_be_changed_before_it_is_given() -> None:
    with McpTools(office(), include=["find_room"]) as server:
        (tool,) = server.tools
        mine = replace(tool, name="rooms", parallel=False)
        assert isinstance(mine, Tool)
        assert (
            '"room": 12'
            in ToolSet([mine]).run(ToolCall("call_0", "rooms", {"name": "Bo"}, "")).content
        )


def test_a_server_of_the_mcp_package_in_a_process() -> None:
    program = "from tests.test_session.mcp_servers import office; office().run()"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "policies", ROOT / "selectors")))
    parameters = StdioServerParameters(
        command=sys.executable, args=["-c", program], env={"PYTHONPATH": paths}
    )
    with McpTools(parameters) as server:
        assert [tool.name for tool in server.tools] == list(server.annotations)
        assert '"room": 12' in run(server, "find_room", name="Ada")[0]
        assert run(server, "repeat", text="Zürich ☕\n") == ("Zürich ☕\n", False)
        assert run(server, "fail", reason="Bo")[1] is True
        assert server.changed is False
        assert run(server, "change") == ("changed", False)


def test_a_server_at_a_url_that_goes_away() -> None:
    app = uvicorn.Server(
        uvicorn.Config(office().streamable_http_app(), port=0, log_level="critical", ws="none")
    )
    serving = threading.Thread(target=app.run)
    serving.start()
    while not app.started:
        time.sleep(0.01)
    port = app.servers[0].sockets[0].getsockname()[1]
    with McpTools(f"http://127.0.0.1:{port}/mcp") as server:
        assert '"room": 12' in run(server, "find_room", name="Ada")[0]
        app.should_exit = app.force_exit = True
        serving.join()
        content, deadline = "", time.monotonic() + 20
        while "ConnectError" not in content and time.monotonic() < deadline:
            content, is_error = run(server, "find_room", name="Ada")
            assert is_error and f"of {server.name}; got a lost connection" in content
        assert "ConnectError" in content


# ---------------------------------------------------------------- changes


@pytest.mark.parametrize("kind", ["in this process", "a process"])
def test_a_changed_list_is_noted_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    given = office() if kind == "in this process" else raw(tmp_path / "log")
    name = "change" if kind == "in this process" else "changed"
    with capture_logs() as logs, McpTools(given) as server:
        before = server.tools
        assert server.changed is False
        deadline = time.monotonic() + 20
        while not server.changed and time.monotonic() < deadline:
            run(server, name)
        assert server.changed is True and server.tools is before
    events = [entry for entry in logs if entry["event"] == "tool_list_changed"]
    assert events and events[0] == {
        "event": "tool_list_changed",
        "log_level": "warning",
        "server": server.name,
    }
    (opened,) = [entry for entry in logs if entry["event"] == "tool_server_opened"]
    assert (opened["tools"], opened["server"]) == (len(before), server.name)


def test_a_server_that_tells_no_changes_works_all_the_same() -> None:
    with capture_logs() as logs, McpTools(office(subscriptions=False)) as server:
        deadline = time.monotonic() + 20
        while not logs[1:] and time.monotonic() < deadline:
            assert run(server, "change") == ("changed", False)
        assert server.changed is False
    assert {entry["event"] for entry in logs} == {"tool_server_opened", "tool_changes_not_told"}


# ---------------------------------------------------------------- failures of the connection


def test_a_server_that_cannot_be_started_is_a_typed_error(tmp_path: Path) -> None:
    words = "import sys; print('no licence', file=sys.stderr); sys.exit(3)"
    for command, problem in (
        (["no_such_command_here"], "Connect to no_such_command_here; got FileNotFoundError"),
        ([sys.executable, "-ESc", words], "Connection closed; its stderr ends: no licence"),
        ("http://127.0.0.1:9/mcp", "Connect to http://127.0.0.1:9/mcp; got ConnectError"),
    ):
        server = McpTools(command)
        with pytest.raises(ToolServerError, match=problem):
            server.open()
        with pytest.raises(ToolServerError, match="Make another McpTools"):
            server.open()
        server.close()


def test_a_server_that_does_not_answer_in_time_is_a_typed_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ToolServerError, match="no answer within 0.3 s"):
        McpTools(raw(log, "mute"), connect_timeout_seconds=0.3).open()
    assert not process_is_there(log)


def test_a_file_takes_what_a_server_writes_to_its_stderr(tmp_path: Path) -> None:
    words = "import sys; print('hello', file=sys.stderr)"
    parameters = StdioServerParameters(command=sys.executable, args=["-ESc", words])
    with open(tmp_path / "stderr", "w") as file, pytest.raises(ToolServerError):
        McpTools(parameters, errlog=file).open()
    assert (tmp_path / "stderr").read_text() == "hello\n"


@pytest.mark.parametrize(
    "arguments",
    [
        {"server": "uvx mcp-server-git"},
        {"server": 5},
        {"server": []},
        {"server": ["python", 5]},
        {"server": ["x"], "prefix": 5},
        {"server": ["x"], "include": "repeat"},
        {"server": ["x"], "exclude": [5]},
        {"server": ["x"], "connect_timeout_seconds": 0},
        {"server": ["x"], "connect_timeout_seconds": None},
        {"server": ["x"], "call_timeout_seconds": float("nan")},
        {"server": ["x"], "call_timeout_seconds": True},
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_starts(
    arguments: dict[str, Any],
) -> None:
    with pytest.raises(InputError):
        McpTools(**arguments)


def test_what_is_not_open_says_so_and_secrets_of_a_url_are_no_name() -> None:
    server = McpTools("https://me:secret@example.org:99/mcp?key=1")
    assert server.name == "https://example.org:99/mcp"
    for attribute in ("tools", "annotations", "instructions"):
        with pytest.raises(ToolServerError, match="Use it as `with McpTools"):
            getattr(server, attribute)
    server.close()
    with pytest.raises(ToolServerError, match="was closed"):
        server.open()


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sfi-agent\[mcp\]'") as caught:
        McpTools(["x"])
    assert isinstance(caught.value, ImportError) and caught.value.extra == "mcp"


# ---------------------------------------------------------------- what is left behind


def test_a_connection_nobody_holds_any_more_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = McpTools(raw(log)).open()
    tools = server.tools
    del server
    gc.collect()
    assert ToolSet(tools).run(ToolCall("call_0", "zeta", {}, "")).content == "zeta"
    assert process_is_there(log)
    del tools
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > 1 and time.monotonic() < deadline:
        if not any("tools of" in thread.name for thread in threading.enumerate()):
            break
        time.sleep(0.01)
    assert not process_is_there(log)


def test_the_end_of_the_program_ends_the_server(
    tmp_path: Path, child_python: Callable[..., str]
) -> None:
    log = tmp_path / "log"
    program = f"""
        from sfi_agent import McpTools
        server = McpTools({raw(log)!r}).open()
        print(len(server.tools))
    """
    assert child_python(program, ROOT) == str(len(RAW_NAMES))
    assert log.read_text().split()[1:] == ["ended"] and not process_is_there(log)
