"""The page as a document: whole, escaped, and on its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.evaluation.report import write_report
from sfi_agent.evaluation.report.folder import read_folder
from sfi_agent.evaluation.report.page import embedded_json, visible_text
from sfi_agent.evaluation.report.page_data import Limits, page_data, trace_data
from tests.test_evaluation.report_folder import HOSTILE_TOKENS, ReportFolder

ASSETS = resources.files("sfi_agent.evaluation.report") / "assets"


class Document(HTMLParser):
    """Start tags with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.words = ""
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.raw.append(({"tag": tag, **dict(attrs)}, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            attributes, text = self.raw[-1]
            self.raw[-1] = (attributes, text + data)
        else:
            self.words += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ReportFolder(hostile=True).write(tmp_path_factory.mktemp("hostile") / "results")


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(text: str) -> Document:
    return Document(text)


def test_hostile_texts_open_no_element(folder: Path, document: Document) -> None:
    scripts = [attributes for attributes, _ in document.raw if attributes["tag"] == "script"]
    traces = len(list(folder.glob("traces/*.json")))
    names = [attributes.get("id") for attributes in scripts if attributes.get("type")]
    assert names == ["data", *(f"trace-{number}" for number in range(traces))]
    assert len(scripts) == len(names) + 1, "one script runs"
    tags = {tag for tag, _ in document.tags}
    assert not tags & {"img", "iframe", "object", "embed", "form", "base", "b"}
    for tag, attributes in document.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "src" not in attributes and "style" not in attributes, tag


def test_the_data_blocks_hold_the_data(folder: Path, document: Document) -> None:
    read = read_folder(folder)
    expected: list[Any] = [page_data(read), *trace_data(read.traces, Limits())]
    blocks = [text for attributes, text in document.raw if attributes.get("type")]
    assert [json.loads(text) for text in blocks] == json.loads(json.dumps(expected))
    tokens = {token for _, texts in json.loads(blocks[1])["texts"] for token in texts}
    assert set(HOSTILE_TOKENS) <= tokens


def test_the_head_names_the_run_and_what_went_wrong(document: Document) -> None:
    words = re.sub(r"\s+", " ", document.words)
    for expected in (
        f"Selectors {HOSTILE_TOKENS[0]}",
        "embedded, Qwen3ForCausalLM, float32, cpu",
        "sfi_agent 0.1.0, torch 2.13.0",
        "2026-01-02T03:04:05+00:00",
        "sfi-agent ablate grid.yaml --out results",
        "240 of 241 finished, 1 failed, 1 combination skipped",
        "ContextOverflowError: <b>too long</b> </script>",
        "never / span / 64: exclude rule 1",
        "One damaged file was written again.",
    ):
        assert expected in words


def test_nothing_comes_from_elsewhere(text: str, document: Document) -> None:
    allowed = "http://www.w3.org/2000/svg"
    assert set(re.findall(r"(?:https?|wss?|ftp)://[^\s\"'<]*", text)) == {allowed}
    style = next(text for attributes, text in document.raw if attributes["tag"] == "style")
    assert "@import" not in style and "@font-face" not in style
    assert "url(" not in style
    for _, attributes in document.tags:
        address = attributes.get("href") or "#"
        assert address.startswith("#") or address == "data:,"


def test_the_security_policy_names_exactly_this_script_and_style(document: Document) -> None:
    policy = next(
        attributes["content"] or ""
        for tag, attributes in document.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        (content,) = [
            text
            for attributes, text in document.raw
            if attributes["tag"] == kind and not attributes.get("type")
        ]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_no_placeholder_is_left_and_none_is_read_from_data(text: str) -> None:
    left = re.findall(r"\{\{\w+\}\}", text)
    assert set(left) == {"{{script}}"}, "the one that stands in the hostile tokens"
    assert text.count("function summaryTiles") == 1


def test_scripts_make_no_markup_from_text() -> None:
    sources = [path for path in ASSETS.iterdir() if path.name.endswith(".js")]
    assert len(sources) > 10
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
        r"|fetch\(|XMLHttp|import\("
    )
    for path in sources:
        found = re.findall(forbidden, path.read_text(encoding="utf-8"))
        assert not found, path.name
        assert "</script" not in path.read_text(encoding="utf-8").lower(), path.name
        assert "<!--" not in path.read_text(encoding="utf-8"), path.name


def test_every_asset_is_part_of_the_page_and_short(text: str) -> None:
    for path in ASSETS.iterdir():
        content = path.read_text(encoding="utf-8")
        assert len(content.splitlines()) <= 320, path.name
        if path.name != "page.html":
            assert content.strip() in text, path.name


@settings(deadline=None, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_embedded_json_comes_back_and_is_harmless(value: object) -> None:
    text = embedded_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set(text) & set("<>&")


def test_embedded_json_takes_lone_surrogates_and_refuses_infinity() -> None:
    assert json.loads(embedded_json("\ud83d")) == "\ud83d"
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded_json(float("inf"))


def test_visible_text_names_what_would_not_be_seen() -> None:
    assert visible_text('a<b>&"c"') == "a&lt;b&gt;&amp;&quot;c&quot;"
    assert visible_text("x\u202ey\x00\u2028") == "x&lt;U+202E&gt;y&lt;U+0000&gt;&lt;U+2028&gt;"
    assert visible_text("\ud83d") == "&lt;U+D83D&gt;"
    assert visible_text("שלום 🧭\n") == "שלום 🧭\n"


def test_missing_parts_of_the_folder_are_called_missing(tmp_path: Path) -> None:
    folder = ReportFolder().write(tmp_path / "results")
    (folder / "recall.json").unlink()
    for path in folder.glob("traces/*.json"):
        path.unlink()
    data = json.loads((folder / "results.json").read_text())
    data.update(command=None, complete=False, planned_runs=250, seconds=None)
    data["model"] = {"name": "some model"}
    (folder / "results.json").write_text(json.dumps(data))
    words = Document(write_report(folder).read_text(encoding="utf-8")).words
    assert "no command line was recorded" in words
    assert "9 of 250 planned runs are still to come" in words
    assert "not recorded" in words
    assert "None" not in words and "null" not in words
