"""Guards of the layout: what must not appear where, and which way imports point."""

from __future__ import annotations

import ast
import importlib
import re
import selectors
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sfi_agent
from tests.source_tree import PACKAGES, ROOT, Import, imports, modules

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli", reason="tomllib came with Python 3.11")

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()
PUBLIC_MODULES = {
    "sfi_agent",
    "sfi_agent.embedded",
    "sfi_agent.hookspecs",
    "sfi_agent.testing",
}
EVERYTHING = {"engine", "session", "observe", "testing", "embedded", "evaluation", "cli"}
MAY_IMPORT = {
    "": {"observe"},  # the modules directly in sfi_agent/ log through it
    "observe": set[str](),
    "engine": {"observe"},
    "session": {"engine", "observe"},
    "testing": {"session"},  # feeds detectors the text pieces that a session would
    "embedded": set[str](),
    "evaluation": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
}


# ---------------------------------------------------------------- the standard library's selectors


@pytest.mark.parametrize("folder", ["policies", "selectors"])
def test_plugin_folders_are_no_packages_and_hold_one(folder: str) -> None:
    importable = {
        entry.name
        for entry in (ROOT / folder).iterdir()
        if entry.suffix == ".py" or (entry / "__init__.py").exists()
    }
    assert importable == {f"sfi_{folder}"}


def test_selectors_is_the_standard_library_here_and_in_a_child(
    child_python: Callable[..., str],
) -> None:
    program = """
        import asyncio, selectors, subprocess
        selectors.DefaultSelector().close()
        print(selectors.__file__)
    """
    for file in (selectors.__file__, child_python(program, cwd=ROOT)):
        assert Path(file or "").resolve().is_relative_to(STANDARD_LIBRARY)


def test_ruff_has_no_src_setting() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert "src" not in settings, "it switches A005, the guard for selectors/, off"
    assert "A005" in settings["lint"]["select"]


def test_every_test_folder_is_a_package_with_a_harmless_name() -> None:
    tests = ROOT / "tests"
    folders = {path.parent for path in tests.rglob("*.py")}
    for folder in folders:
        assert (folder / "__init__.py").exists(), folder
        if folder != tests:
            assert folder.name.startswith("test_"), folder
            assert folder.name not in sys.stdlib_module_names, folder


def test_import_mode_is_prepend(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("importmode") == "prepend"


def test_the_code_under_test_is_this_checkout() -> None:
    for name, folder in PACKAGES.items():
        assert Path(importlib.import_module(name).__file__ or "").parent == folder


def test_no_module_shadows_the_standard_library_at_a_path_root() -> None:
    for root in (ROOT, ROOT / "policies", ROOT / "selectors"):
        names = {path.stem for path in root.glob("*.py")} | {
            path.parent.name for path in root.glob("*/__init__.py")
        }
        assert not names & set(sys.stdlib_module_names), root


# ---------------------------------------------------------------- packaging


def test_every_package_is_typed_and_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = settings["tool"]["hatch"]["build"]
    listed = {Path(entry) for entry in build["targets"]["wheel"]["packages"]}
    assert listed == {folder.relative_to(ROOT) for folder in PACKAGES.values()}
    assert {"policies", "selectors", "."} == set(build["dev-mode-dirs"])
    for folder in PACKAGES.values():
        assert (folder / "py.typed").exists()


def test_ignored_data_files_of_the_packages_are_named_as_artifacts() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["hatch"]["build"]["artifacts"]
    checkpoint = ROOT / "sfi_agent" / "embedded" / "checkpoint"
    assert checkpoint.relative_to(ROOT).as_posix() + "/*" in patterns
    assert list(checkpoint.glob("*.safetensors")), "the embedded checkpoint has no weights"


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


# ---------------------------------------------------------------- imports point one way


def offenders(folder: Path, allowed: Callable[[Import], bool]) -> list[str]:
    """The imports below a folder that are not allowed, as "path:line module"."""
    return [
        f"{path.relative_to(ROOT)}:{found.line} {found.module} {', '.join(found.names)}"
        for path, tree in modules(folder)
        for found in imports(tree)
        if not allowed(found)
    ]


def only_public(*own_packages: str) -> Callable[[Import], bool]:
    """Imports of ours are the documented ones, and the package's own."""

    def allowed(found: Import) -> bool:
        top = found.module.split(".")[0]
        if found.module.startswith(".") or top in ("policies", "tests"):
            return False
        if top in own_packages or not top.startswith("sfi_"):
            return True
        if found.module == "sfi_agent":
            return set(found.names) <= {*sfi_agent.__all__, "testing", "hookspecs"}
        return found.module in PUBLIC_MODULES

    return allowed


def test_plugins_import_public_names_only() -> None:
    for name in ("sfi_policies", "sfi_selectors"):
        assert offenders(PACKAGES[name], only_public(name)) == []


def test_examples_import_public_names_only() -> None:
    allowed = only_public("sfi_example", "sfi_policies", "sfi_selectors")
    assert offenders(ROOT / "examples", allowed) == []


def part_of(module: str) -> str:
    """The part of sfi_agent that a module name lies in; "" for modules directly in it."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in MAY_IMPORT else ""


def test_the_core_imports_downwards_only() -> None:
    package = PACKAGES["sfi_agent"]
    present = {path.parent.name for path in package.glob("*/*.py")}
    assert present <= set(MAY_IMPORT), "say in MAY_IMPORT what the new part may import"
    found: list[str] = []
    for path, tree in modules(package):
        relative = path.relative_to(package)
        here = relative.parts[0] if len(relative.parts) > 1 else ""
        if relative == Path("__init__.py"):
            continue  # The public surface names what lies above it, resolved on first use.
        for item in imports(tree):
            if item.module.split(".")[0] in ("sfi_policies", "sfi_selectors"):
                found.append(f"{relative}:{item.line} imports a plugin: {item.module}")
            elif item.module.startswith("sfi_agent"):
                names = [item.module, *(f"{item.module}.{name}" for name in item.names)]
                parts = {part_of(name) for name in names} - {"", here}
                if parts - MAY_IMPORT[here]:
                    found.append(f"{relative}:{item.line} {item.module}: {sorted(parts)}")
    assert found == []


def test_modules_import_absolutely() -> None:
    for folder in PACKAGES.values():
        assert offenders(folder, lambda found: not found.module.startswith(".")) == []


# ---------------------------------------------------------------- habits of every module


def test_no_environment_variable_is_read() -> None:
    found: list[str] = []
    for folder in PACKAGES.values():
        for path, tree in modules(folder):
            for line in environment_reads(tree):
                found.append(f"{path.relative_to(ROOT)}:{line}")
    assert found == [], "settings come from the configuration, never from the environment"


def environment_reads(tree: ast.Module) -> Iterator[int]:
    """Lines that touch the process environment."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            if names & {alias.name for alias in node.names}:
                yield node.lineno


def test_every_module_says_what_it_is_and_postpones_annotations() -> None:
    for folder in PACKAGES.values():
        for path, tree in modules(folder):
            assert ast.get_docstring(tree), f"{path} has no docstring"
            future = [item for item in imports(tree) if item.module == "__future__"]
            assert future or len(tree.body) == 1, f"{path} lacks `annotations` from __future__"


def test_every_plugin_file_holds_one_public_class_and_its_settings() -> None:
    for name in ("sfi_policies", "sfi_selectors"):
        for path, tree in modules(PACKAGES[name]):
            if path.stem.startswith("_") or path.stem == "plugin":
                continue
            public = [
                node.name
                for node in tree.body
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            ]
            plugins = [kind for kind in public if not kind.endswith("Config")]
            settings = [kind for kind in public if kind.endswith("Config")]
            assert len(settings) == 1, path
            words = re.sub(r"(?<!^)(?=[A-Z])", "_", settings[0].removesuffix("Config")).lower()
            assert words == path.stem, path
            assert settings[0].removesuffix("Config") in plugins, path
