"""A distribution of its own, really installed, extends the package through its entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.source_tree import ROOT

EXAMPLE = ROOT / "examples" / "third_party_selector"


def install(source: Path, target: Path) -> None:
    """Build and install a distribution into a folder, as pip does it, without an index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [*command, *options, str(source)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example distribution is installed."""
    target = tmp_path_factory.mktemp("site")
    install(EXAMPLE, target)
    return target


def test_it_is_listed_and_configurations_can_name_it(
    site: Path, child_python: Callable[..., str]
) -> None:
    program = """
        import json, sys
        from sfi_agent import ConfigError, SessionConfig, load_plugins
        registry = load_plugins()
        config = SessionConfig(
            boundaries=[{"name": "keyword", "words": ["so"]}, {"name": "punctuation"}],
            selector={"name": "fading", "half_life_tokens": 2048},
        )
        same = SessionConfig.model_validate_json(config.model_dump_json())
        try:
            SessionConfig(selector={"name": "fadin"})
        except ConfigError as error:
            message = str(error)
        print(json.dumps({
            "origins": [registry.detectors["keyword"].origin, registry.selectors["fading"].origin],
            "built_in": registry.selectors["top_k"].origin,
            "plugin": registry.selectors["fading"].owner.plugin,
            "dump": config.model_dump(mode="json")["selector"],
            "same": same == config,
            "message": message,
            "torch": "torch" in sys.modules,
        }))
    """
    told = json.loads(child_python(program, site))
    assert told["origins"] == ["sfi-example-plugins 0.3.0"] * 2
    assert told["built_in"] == "built-in"
    assert told["plugin"] == "sfi_example"
    assert told["dump"] == {"name": "fading", "half_life_tokens": 2048.0}
    assert told["same"] and not told["torch"]
    assert "fading (sfi-example-plugins 0.3.0)" in told["message"]


def test_its_own_tests_pass_against_this_package(
    site: Path, tmp_path: Path, child_environment: Callable[..., dict[str, str]]
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir"]
    done = subprocess.run(
        [*command, str(tmp_path), str(EXAMPLE / "tests")],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env=child_environment(site),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_a_broken_release_of_it_is_named(tmp_path: Path, child_python: Callable[..., str]) -> None:
    source = tmp_path / "source"
    (source / "sfi_example").mkdir(parents=True)
    project = (EXAMPLE / "pyproject.toml").read_text().replace('"0.3.0"', '"0.4.0"')
    (source / "pyproject.toml").write_text(project)
    (source / "README.md").write_text("broken\n")
    (source / "sfi_example" / "__init__.py").write_text("")
    (source / "sfi_example" / "plugin.py").write_text("from sfi_agent import no_such_name\n")
    install(source, tmp_path / "site")
    program = """
        import json
        from sfi_agent import PluginError, SessionConfig
        from sfi_agent.plugins import collect_plugin_errors
        try:
            SessionConfig()
        except PluginError as error:
            told = [error.plugin, error.distribution, str(error), type(error.__cause__).__name__]
        registry, errors = collect_plugin_errors()
        print(json.dumps([*told, len(errors), "top_k" in registry.selectors]))
    """
    plugin, distribution, message, cause, count, survives = json.loads(
        child_python(program, tmp_path / "site")
    )
    assert plugin == "sfi_example"
    assert distribution == "sfi-example-plugins 0.4.0"
    assert "no_such_name" in message and cause == "ImportError"
    assert count == 1 and survives
