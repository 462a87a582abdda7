"""Files that were damaged, or made up by somebody: one kind of error, and never a wrong session."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfi_agent import Session, SfiError, StoreError
from sfi_agent.engine.saved_history import LayerSizes
from sfi_agent.session.store import loading, strict_json
from sfi_agent.session.store.directory import MANIFEST_NAME
from sfi_agent.session.store.manifest_file import _sealed, parse_manifest
from sfi_agent.session.store.shard_form import ShardForm
from sfi_agent.session.store.understanding import understand
from tests.test_guarantees.test_save_load import history_of, same_bits
from tests.test_session.conversations import call_text, chat_engine, policy, says

END = "<|im_end|>"
CONFIG = policy(sampling={"max_new_tokens": 6})
fuzz = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def find_room(name: str) -> str:
    """Finds a room.

    Args:
        name: Whose room.
    """
    return f"room of {name}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Session]]:
    """A conversation over two stretches, with a call that waits, and the session itself."""
    engine, folder = chat_engine(), tmp_path_factory.mktemp("original")
    with engine.session(CONFIG, system="Be kind.", tools=[find_room]) as session:
        with says(engine, f"Hello Ada.{END}", f"{call_text('find_room', name='Ada')}{END}"):
            session.send("I am Ada.")
            session.save(folder)
            session.send("Where is my room?")
        session.decode([], max_new_tokens=1)
        session.save(folder)
        assert len(list(folder.iterdir())) == 3
        yield folder, session


Original = tuple[Path, Session]


@pytest.fixture
def folder(original: Original, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def require_refused_or_same(folder: Path, session: Session) -> bool:
    """Whether it was refused; otherwise every bit is as it was."""
    try:
        loaded = session.engine.load_session(folder, tools=[find_room])
    except StoreError as error:
        assert str(error)
        return True
    with loaded:
        assert loaded.token_ids == session.token_ids
        assert loaded.messages == session.messages
        assert loaded.trace == session.trace and loaded.config == session.config
        assert same_bits(history_of(loaded), history_of(session))
    return False


# ---------------------------------------------------------------- bytes


@given(data=st.data())
@fuzz
def test_bytes_that_were_changed(original: Original, data: st.DataObject) -> None:
    source, session = original
    target = source.parent / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = data.draw(st.sampled_from(sorted(target.iterdir())))
    content = bytearray(file.read_bytes())
    before = bytes(content)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "double"]))
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif kind == "double":
            content[place:place] = content[place : place + 64]
    file.write_bytes(content)
    assert require_refused_or_same(target, session) == (bytes(content) != before)


# ---------------------------------------------------------------- values


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON, and in the JSON texts that stand in it."""
    yield path
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        # Of long lists a few: ids and columns would drown everything else.
        shown = {*range(min(4, len(value))), len(value) - 1} if value else set()
        items = [(index, value[index]) for index in shown]
    else:
        try:
            inner = json.loads(value) if isinstance(value, str) else None
        except ValueError:
            return
        if isinstance(inner, (dict, list)):
            yield from paths_in(inner, (*path, json))
        return
    for key, item in items:
        yield from paths_in(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """The tree with one place changed; `change` gets the holder and the key."""
    if path[0] is json:
        return json.dumps(changed_at(json.loads(value), path[1:], change))
    value[path[0]] = changed_at(value[path[0]], path[1:], change)
    return value


def changed_at(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    return changed(value, path, change) if path else change(value, None)


values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            *[None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**40, 2**63, 10**300, -(10**30)],
            *[0.5, -0.0, 1e308, "", "x", "fast", "../../etc/passwd", "0" * 64, "\x00"],
            *["sfi-history-" + "0" * 32 + ".safetensors", "sfi-session.json", [], {}, [[]]],
            *[{"a": 1}, [1, 2, 3], "{}", "[]", '{"role": "user", "content": "x"}'],
        ]
    ),
    st.integers(-5, 300),
    st.text(max_size=4),
)


def mutations(old: Any, other: Any) -> list[Any]:
    """What a place may become besides something else."""
    found: list[Any] = [other]
    if isinstance(old, bool):
        found.append(not old)
    elif isinstance(old, int):
        found += [old + 1, old - 1, old * 2, -old, float(old), str(old)]
    elif isinstance(old, str):
        found += [old + "x", old[:-1], old.upper(), [old]]
    elif isinstance(old, list):
        found += [old[:-1], old[1:], old + old, old[::-1], [*old, other], dict(enumerate(old))]
    elif isinstance(old, dict):
        found += [{**old, "more": other}, dict(list(old.items())[1:]), list(old.values())]
    return found


def reseal(folder: Path, content: Any) -> None:
    (folder / MANIFEST_NAME).write_bytes(_sealed(strict_json.compact(content, finite=False)))


def use(loaded: Session) -> None:
    """Whatever a session says and does, its errors are ours."""
    assert loaded.status == "open"
    assert len(loaded.trace) == loaded.stats.generated_tokens
    assert all(loaded.token_ids[record.position] == record.token_id for record in loaded.trace)
    repr((loaded, loaded.messages, loaded.config))
    try:
        if loaded.config == CONFIG:
            if loaded.token_ids:
                assert bool(torch.isfinite(loaded.next_logits()).all())
            loaded.send("Go on.")
            loaded.rewind(loaded.mark(len(loaded.token_ids) // 2))
            loaded.send("And now?")
    except SfiError:
        pass


@given(data=st.data())
@fuzz
def test_values_that_were_made_up(original: Original, data: st.DataObject) -> None:
    """Sealed again, so that nothing but the values themselves can be refused."""
    source, session = original
    target = source.parent / "made_up"
    if not target.exists():
        shutil.copytree(source, target)
    content = json.loads((source / MANIFEST_NAME).read_bytes())["session"]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(paths_in(content), key=repr)))
        other = data.draw(values)

        def change(old: Any, _: Any, other: Any = other) -> Any:
            return data.draw(st.sampled_from(mutations(copy.deepcopy(old), other)))

        content = changed_at(content, path, change)
    reseal(target, content)
    try:
        loaded = session.engine.load_session(target)
    except StoreError as error:
        assert str(error)
        return
    with loaded:
        use(loaded)


def test_the_seal_is_what_a_saved_session_has(original: Original) -> None:
    data = (original[0] / MANIFEST_NAME).read_bytes()
    assert _sealed(strict_json.compact(json.loads(data)["session"])) == data
    assert data.isascii()


def set_in(*path: Any) -> Callable[[Any, Any], None]:
    def change(content: Any, value: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


SHARD = ("history", "stretches", 0, "shards", 0)
MADE_UP: list[tuple[tuple[Any, ...], Any, str]] = [
    ((*SHARD, "name"), "../../../../etc/passwd", "name"),
    ((*SHARD, "name"), "/etc/passwd", "name"),
    ((*SHARD, "name"), "sfi-history-" + "0" * 32 + ".safetensors\n", "name"),
    ((*SHARD, "name"), "sfi-history-" + "0" * 32 + ".safetensors", "no file"),
    ((*SHARD, "first_layer"), 1, "layer"),
    ((*SHARD, "layers"), 1, "layers"),
    ((*SHARD, "bytes"), 10**12, "bytes"),
    ((*SHARD, "bytes"), 10**30, "bytes"),
    ((*SHARD, "digest"), "0" * 64, "not those that were written"),
    (("history", "stretches", 0, "tokens"), 2**40, "held|stretch"),
    (("history", "stretches", 0, "held_tokens"), 2000, "bytes"),
    (("history", "stretches", 0, "held_tokens"), 2**39, "files of 549755813888 tokens"),
    (("history", "extents"), [3], "extents"),
    (("history", "layers", 0, "kv_heads"), 1, "layers that this model does not have"),
    (("history", "layers", 1, "key_dim"), 10**6, "layers that this model does not have"),
    (("history", "layers", 0, "window"), 5, "layers that this model does not have"),
    (("history", "layers"), [], "layers"),
    (("history", "stretches"), [], "stretches"),
    (("processed_tokens",), 3, "processed"),
    (("prompt_start",), 10**6, "prompt"),
    (("token_ids", 0), 10**6, "vocabulary"),
    (("token_ids", 0), -1, "token_ids"),
    (("token_ids", 0), 1.0, "token_ids"),
    (("token_ids", 0), True, "token_ids"),
    (("conversation", "spans", 0, "end"), 1, "spans"),
    (("conversation", "spans", 0, "start"), 1, "spans"),
    (("conversation", "spans"), [], "spans"),
    (("conversation", "spans", 0, "messages"), ["{"], "JSON|Expecting"),
    (("conversation", "spans", 0, "messages"), ['{"role": "user"}'], "message"),
    (("conversation", "spans", 0, "messages"), ["[" * 60_000 + "]" * 60_000], "nested"),
    (("conversation", "spans", 0, "messages"), ["[" * 500 + "]" * 500], "nested"),
    (("conversation", "spans", 0, "messages"), [r'{"role": "user", "content": "\ud800"}'], "utf-8"),
    (("conversation", "unsent_results"), ['{"call_id": 1}'], "ToolResult"),
    (
        ("conversation", "unsent_results"),
        [r'{"call_id": "1", "name": "f", "content": "\ud800"}'],
        "utf-8",
    ),
    (("conversation",), None, "chat"),
    (("trace", "columns", "kind"), {"texts": [], "rows": [3]}, "text that is not there"),
    (("trace", "columns", "kind"), {"texts": ["quick"], "rows": [0]}, "columns"),
    (("trace", "columns", "seconds"), [], "columns"),
    (("policy", "mode"), "medium", "policy"),
    (("policy", "selector"), {"name": "nobody"}, "nobody"),
    (("policy", "memory", "dense_layers"), [99], "layers"),
    (("tools",), ['{"type": "function"}'], "function"),
    (("tools",), ["{}", "{}"], "function"),
    (("revision",), 0, "revision"),
    (("save_id",), "x", "save_id"),
    (("extra",), 1, "extra"),
]


@pytest.mark.parametrize(("path", "value", "words"), MADE_UP, ids=lambda item: str(item)[:40])
def test_what_is_made_up_is_named(
    original: Original, folder: Path, path: tuple[Any, ...], value: Any, words: str
) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())["session"]
    set_in(*path)(content, value)
    reseal(folder, content)
    started = time.perf_counter()
    with pytest.raises(StoreError, match=words):
        original[1].engine.load_session(folder)
    assert time.perf_counter() - started < 20


def test_two_shards_may_not_share_a_file(original: Original, folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())["session"]
    first, second = content["history"]["stretches"]
    second["shards"][0]["name"] = first["shards"][0]["name"]
    reseal(folder, content)
    with pytest.raises(StoreError, match="one file for two shards"):
        original[1].engine.load_session(folder)


def test_files_may_not_be_exchanged(original: Original, folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(StoreError, match="safetensors"):
        original[1].engine.load_session(folder)


# ---------------------------------------------------------------- the manifest as a file

SEALED_AS_1 = b'{"format":"sfi-agent session","format_version":1,'
TEXTS: list[tuple[bytes, str]] = [
    *((text, "no manifest") for text in (b"", b"null", b"[]", b'{"format": "something else"}')),
    (b"\xff\xfe{}", "no manifest"),
    (b"[" * 200_000, "no manifest"),
    (b'{"format": "sfi-agent session", "format_version": true}', "no manifest"),
    (b'{"format": "sfi-agent session", "format_version": "1"}', "no manifest"),
    (b'{"format": "sfi-agent session", "format_version": 1e999}', "no manifest"),
    (b'{"format": "sfi-agent session", "format_version": 0}', "format_version"),
    (b'{"format": "sfi-agent session", "format_version": 1}', "not what was written"),
    (SEALED_AS_1, "not what was written"),
    (SEALED_AS_1 + b'"session":' + b"[" * 200_000, "not what was written"),
    (SEALED_AS_1 + b"\xff" * 200, "not what was written"),
    (b'{"format": "sfi-agent session", "format_version": 2, "news": []}', "newer sfi-agent"),
    (b'{"format":"sfi-agent session","format_version":2,"news":' + b"[" * 9_000, "newer sfi-agent"),
]


@pytest.mark.parametrize(("content", "words"), TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_manifest(original: Original, folder: Path, content: bytes, words: str) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(StoreError, match=words):
        original[1].engine.load_session(folder)


MADE_UP_TEXTS: list[tuple[str, str]] = [
    ("", "Expecting value"),
    ("null", "the whole"),
    ("[]", "the whole"),
    ('{"a": 1, "a": 2}', "twice"),
    ('{"revision": NaN}', "finite"),
    ('{"revision": 1e999}', "finite"),
    ('{"policy": {"x": [-1e999]}}', "finite"),
    ("[" * 200_000, "nested"),
    ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested"),
    ("9" * 5_000, "digits|limit|JSON"),
    (r'{"\ud800": 1}', "JSON"),
    # Each of these took more than a second, or a gigabyte.
    ("[" + "{}," * 5_000_000 + "1]", "lists, mappings and keys"),
    ('{"tools": ["[' + "{}," * 5_000_000 + '1]"]}', "lists, mappings and keys"),
    ('{"token_ids": [' + '"",' * 300_000 + "1]}", "revision"),
    ("{" + ",".join(f'"{n}":1' for n in range(500_000)) + "}", "500000 keys"),
    ("{" + ",".join(f'"{n}":1' for n in range(9_000)) + "}", "values that cannot be"),
]


@pytest.mark.parametrize(("content", "words"), MADE_UP_TEXTS, ids=range(len(MADE_UP_TEXTS)))
def test_what_is_sealed_may_still_be_anything(
    original: Original, folder: Path, content: str, words: str
) -> None:
    (folder / MANIFEST_NAME).write_bytes(_sealed(content))
    started = time.perf_counter()
    with pytest.raises(StoreError, match=words):
        original[1].engine.load_session(folder)
    assert time.perf_counter() - started < 20


def test_a_file_of_holes_is_not_read_to_its_end(original: Original, folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())["session"]
    stretch = content["history"]["stretches"][0]
    sizes = [LayerSizes(*size) for size in sizes_of(content)]
    form = ShardForm(0, tuple(sizes), 2**30)
    shard = stretch["shards"][0]
    stretch["held_tokens"], shard["bytes"] = form.tokens, form.bytes
    with (folder / shard["name"]).open("wb") as file:
        file.write(form.header)
        file.truncate(form.bytes)
    reseal(folder, content)
    with pytest.raises(StoreError, match="files of 1073741824 tokens"):
        original[1].engine.load_session(folder)


def sizes_of(content: Any) -> Iterator[tuple[int, int, int, torch.dtype]]:
    for layer in content["history"]["layers"]:
        yield layer["kv_heads"], layer["key_dim"], layer["value_dim"], torch.float32


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device", "huge"])
def test_what_stands_in_place_of_the_manifest(original: Original, folder: Path, kind: str) -> None:
    file = folder / MANIFEST_NAME
    file.rename(folder / "elsewhere")
    if kind == "link":
        file.symlink_to(folder / "elsewhere")
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as hole:
            hole.truncate(1 << 40)
    with pytest.raises(StoreError, match=MANIFEST_NAME):
        original[1].engine.load_session(folder)


def test_a_session_in_place_of_a_file(original: Original, folder: Path) -> None:
    with pytest.raises(StoreError):
        original[1].engine.load_session(folder / MANIFEST_NAME)


# ---------------------------------------------------------------- somebody saves meanwhile


def test_a_save_while_it_is_loaded(
    original: Original, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that the older manifest names are gone before they are opened."""
    engine = original[1].engine
    with engine.load_session(folder, tools=[find_room]) as writer:
        writer.rewind(writer.mark(3))
        saves = iter([None])

        def slow(*arguments: Any) -> Any:
            for _ in saves:
                writer.save(folder)
            return understand(*arguments)

        monkeypatch.setattr(loading, "understand", slow)
        with engine.load_session(folder, tools=[find_room]) as loaded:
            assert loaded.token_ids == writer.token_ids and len(loaded.token_ids) == 3


def test_a_file_that_is_missing_for_good(original: Original, folder: Path) -> None:
    saved = parse_manifest((folder / MANIFEST_NAME).read_bytes(), folder)
    (folder / saved.history.shards[1].name).unlink()
    with pytest.raises(StoreError, match=saved.history.shards[1].name):
        original[1].engine.load_session(folder)
