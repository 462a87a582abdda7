"""The pages say what the code does: blocks run, names and signatures stand in them, links resolve.

Pages with tests of their own elsewhere (`writing_a_*.md`) are checked here for all but their code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pydantic import BaseModel

import sfi_agent
import sfi_agent.embedded
import sfi_agent.testing
from sfi_agent import errors, hookspecs
from sfi_agent.cli.main import app
from sfi_agent.config import SessionConfig
from sfi_agent.observe.log import LOGGER_NAME
from sfi_agent.session.events import Event
from sfi_agent.session.stats import SessionStats
from tests.embedded_folder import shipped_or_stand_in
from tests.families import FAMILIES
from tests.source_tree import PACKAGES, ROOT, modules

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.glob("*.md"))]
TESTED_ELSEWHERE = {"writing_a_detector.md", "writing_a_selector.md"}
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
README_LINES = 15


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """A fenced Python block.

    Attributes:
        line: Line of its first statement in the page.
        code: What it says.
        runs: Whether it is run; the others must only compile.
    """

    line: int
    code: str
    runs: bool


def python_blocks(path: Path) -> list[CodeBlock]:
    text, found = text_of(path), []
    for match in BLOCK.finditer(text):
        language, marks = match[1], match[2].split()
        if language == "python":
            assert set(marks) <= {"no-run"}, f"{page_id(path)}: unknown marks {marks}"
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(CodeBlock(line, match[3], "no-run" not in marks))
    return found


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", text_of(path))


# ---------------------------------------------------------------- code


@pytest.fixture
def embedded_model(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`checkpoint_path()` finds a model, also in a tree without the trained weights.

    What a page changes in this process (threads, log level) is put back.
    """
    folder = shipped_or_stand_in(tmp_path_factory.getbasetemp() / "embedded_stand_in")
    monkeypatch.setattr(sfi_agent.embedded, "checkpoint_path", lambda: folder)
    logger = logging.getLogger(LOGGER_NAME)
    threads, level = torch.get_num_threads(), logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


PAGES_WITH_CODE = [
    path for path in PAGES if path.name not in TESTED_ELSEWHERE and python_blocks(path)
]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_id)
def test_the_code_of_a_page_runs(
    page: Path,
    embedded_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs_page"}
    for block in python_blocks(page):
        # Blank lines in front make a traceback point into the page.
        source = "\n" * (block.line - 1) + block.code
        code = compile(source, page_id(page), "exec", dont_inherit=True)
        if not block.runs:
            continue
        capsys.readouterr()
        exec(code, namespace)
        promised = re.findall(r"^#> (.*)$", block.code, flags=re.MULTILINE)
        if promised:
            assert capsys.readouterr().out.splitlines() == promised, f"{page_id(page)}:{block.line}"


def test_pages_with_code_are_found_and_few_blocks_are_not_run() -> None:
    assert {"README.md", "quickstart.md", "configuration.md"} <= {p.name for p in PAGES_WITH_CODE}
    blocks = [block for path in PAGES_WITH_CODE for block in python_blocks(path)]
    assert sum(not block.runs for block in blocks) <= len(blocks) / 5


def test_the_first_screen_of_the_readme() -> None:
    text = text_of(ROOT / "README.md")
    first = python_blocks(ROOT / "README.md")[0]
    lines = [line for line in first.code.splitlines() if line.strip()]
    assert first.runs and len(lines) < README_LINES
    demo, test, code = (text.index(part) for part in ("make demo", "make test", "```python"))
    assert demo < test < code
    assert text.count("\n", 0, code) < README_LINES, "theory first?"


# ---------------------------------------------------------------- pages among themselves


def anchors(path: Path) -> set[str]:
    """What headings of a page can be linked to, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page_id(page)} links to {target}"


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"^\| \[(\S+)\]\(\1\)", text_of(DOCS / "index.md"), re.MULTILINE))
    assert listed == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


@every_page
def test_no_page_names_a_folder_of_somebodys_machine(page: Path) -> None:
    found = re.findall(
        r"(?<![\w.])/(?:home|root|tmp|mnt|usr|work|Users)/\S*|\b[A-Z]:\\\S*", text_of(page)
    )
    assert found == []


# ---------------------------------------------------------------- names, fields, signatures


def cell_names(text: str) -> set[str]:
    """Every identifier that stands in backticks, calls without their arguments."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {name for span in spans for name in re.findall(r"[A-Za-z_]\w*", span)}


REFERENCE = text_of(DOCS / "reference.md")


def test_every_public_name_is_in_the_reference() -> None:
    public = {*sfi_agent.__all__, *sfi_agent.testing.__all__, *sfi_agent.embedded.__all__}
    assert public - cell_names(REFERENCE) == set()


def records() -> dict[str, type[Any]]:
    events: tuple[type[Any], ...] = Event.__args__
    named = {kind.__name__: kind for kind in events}
    for name in ("Reply", "Usage", "StepRecord", "Mark"):
        named[name] = getattr(sfi_agent, name)
    return {**named, "session.stats": SessionStats}


@pytest.mark.parametrize("name", sorted(records()))
def test_every_field_of_a_record_is_in_the_reference(name: str) -> None:
    rows = REFERENCE.splitlines()
    (start,) = [index for index, row in enumerate(rows) if row.startswith(f"| `{name}` | `")]
    own = [rows[start]]
    for row in rows[start + 1 :]:
        if not row.startswith("| |"):
            break
        own.append(row)
    fields = {item.name for item in dataclasses.fields(records()[name])}
    public = {field for field in fields if not field.startswith("_")}
    assert public <= cell_names("\n".join(own))


@pytest.mark.parametrize("kind", [sfi_agent.Session, sfi_agent.Engine])
def test_every_member_is_in_the_reference_with_its_arguments(kind: type[Any]) -> None:
    (section,) = re.findall(rf"^\| `{kind.__name__}` \| \|\n(.*?)\n\n", REFERENCE, re.M | re.S)
    documented = cell_names(section)
    bases = [base for base in kind.__mro__ if base.__module__.startswith("sfi_agent")]
    for name, member in [item for base in bases for item in vars(base).items()]:
        if name.startswith("_") or name == "create":
            continue
        assert name in documented, f"{kind.__name__}.{name}"
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function):
            arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
            (row,) = [line for line in section.splitlines() if re.search(rf"\b{name}\(", line)]
            assert arguments <= cell_names(row), f"{kind.__name__}.{name}"


def hook_functions() -> list[Callable[..., Any]]:
    """Everything that is marked as a hook specification."""
    mark = hookspecs.hookspec.project_name + "_spec"
    return [item for item in vars(hookspecs).values() if hasattr(item, mark)]


def test_every_hook_stands_in_the_pages_with_its_exact_signature() -> None:
    text = text_of(DOCS / "hooks.md")
    assert len(hook_functions()) >= 2
    for hook in hook_functions():
        signature = str(inspect.signature(hook)).replace("'", "")
        assert f"def {hook.__name__}{signature}\n" in text
        assert any(hook.__name__ in text_of(path) for path in DOCS.glob("writing_*.md"))


def setting_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation)


def test_every_setting_is_in_the_configuration_page() -> None:
    text = text_of(DOCS / "configuration.md")
    names = set(setting_names(SessionConfig))
    assert len(names) > 25
    assert {
        name for name in names if f"`{name}`" not in text and f"### {name}\n" not in text
    } == set()


def test_every_exception_is_in_the_reference_with_its_base() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`([^|]*)\|", REFERENCE.split("## Exceptions")[1], re.M))
    for name in set(errors.__all__) - {"explain"}:
        kind = getattr(errors, name)
        bases = {base.__name__ for base in kind.__bases__} - {"SfiError", "Exception"}
        # The nearest base of ours says the rest.
        ours = {base for base in bases if hasattr(errors, base)}
        assert set(re.findall(r"`(\w+)`", rows[name])) == (ours or bases), name


def log_events() -> dict[str, str]:
    """Level by name of every event that the package emits."""
    found: dict[str, str] = {}
    for folder in PACKAGES.values():
        for path, tree in modules(folder):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "log_event":
                    level, event = node.args[:2]
                    assert isinstance(level, ast.Constant) and isinstance(event, ast.Constant), path
                    found[str(event.value)] = str(level.value)
    return found


def test_every_log_event_is_in_the_reference() -> None:
    section = REFERENCE.split("## Log events")[1]
    documented = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section, flags=re.MULTILINE))
    assert documented == log_events()


def test_every_family_that_the_suite_builds_is_listed_as_supported() -> None:
    text = text_of(DOCS / "supported_models.md")
    for family in FAMILIES:
        assert f"| `{family.architecture}ForCausalLM` |" in text


# ---------------------------------------------------------------- commands


def commands() -> set[str]:
    """Every command of the command line, such as "bench decode"."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[str]:
        for name, child in getattr(command, "commands", {}).items():
            yield " ".join((*path, name))
            yield from walk(child, (*path, name))

    return set(walk(typer.main.get_command(app), ()))


def test_every_command_is_on_the_command_line_page() -> None:
    text = text_of(DOCS / "cli.md")
    assert {"demo", "chat", "plugins", "bench decode"} <= commands()
    for command in commands():
        assert f"\n## sfi-agent {command}\n" in text


@every_page
def test_pages_name_commands_that_exist(page: Path) -> None:
    words = {name.split()[0] for name in commands()}
    for command in re.findall(r"(?:`|^|\n) *sfi-agent ([a-z]+)", text_of(page)):
        assert command in words, f"{page_id(page)}: sfi-agent {command}"


@every_page
def test_pages_name_make_targets_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    for target in re.findall(r"(?:`|^|\n) *make ([a-z-]+)", text_of(page)):
        assert target in targets, f"{page_id(page)}: make {target}"


@every_page
def test_pages_name_files_that_exist(page: Path) -> None:
    """Paths of this project in backticks: folders and files with a slash, from the top."""
    tops = "sfi_agent|policies|selectors|examples|tests|docs"
    for name in re.findall(rf"`((?:{tops})/[\w./]*)`", prose(page)):
        if "checkpoint" not in name:
            assert (ROOT / name).exists(), f"{page_id(page)}: {name}"
