"""Builds the wheel and tries it where nothing of this checkout is: content, demo, tests, plugins.

python -m tests.wheel_job --torch torch==2.13.0
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tests.source_tree import PACKAGES, ROOT

CHECKPOINT = "sfi_agent/embedded/checkpoint"
DATA_FOLDERS = (CHECKPOINT, "sfi_agent/evaluation/report/assets")
REQUIRED_FILES = {
    "sfi_agent/py.typed",
    "sfi_policies/py.typed",
    "sfi_selectors/py.typed",
    "sfi_agent/engine/cpu_rows.c",
    f"{CHECKPOINT}/config.json",
    f"{CHECKPOINT}/generation_config.json",
    f"{CHECKPOINT}/tokenizer.json",
    f"{CHECKPOINT}/tokenizer_config.json",
}
METADATA_FILES = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
# Tests of the installed package that need nothing but themselves and these helpers.
TESTS = ("test_public_names.py", "test_config.py", "test_plugins.py")
HELPERS = ("__init__.py", "conftest.py", "distributions.py", "fakes.py")
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis")
EXAMPLE = ROOT / "examples" / "third_party_selector"


def main() -> None:
    """Run the whole job; raises or exits with a message on the first thing that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel_job")
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sfi-wheel-") as folder:
        outside = Path(folder)
        wheel = build(outside)
        check_content(wheel)
        environment = Environment(outside / "venv")
        environment.install(*shlex.split(options.torch))
        environment.install(str(wheel))
        environment.check_origin()
        say("demo from the wheel")
        environment.run("sfi-agent", "demo", cwd=outside)
        run_tests(environment, outside)
        check_third_party(environment, outside)
    say("the wheel is fine")


class Environment:
    """A fresh virtual environment outside the checkout."""

    def __init__(self, folder: Path) -> None:
        say("fresh environment")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.folder = folder
        self._variables = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }

    def install(self, *requirements: str) -> None:
        """Install with pip, quietly."""
        started = time.monotonic()
        pip = ("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        self.run(*pip, *requirements, cwd=self.folder)
        names = " ".join(Path(name).name for name in requirements)
        say(f"installed {names} in {time.monotonic() - started:.0f} s")

    def run(self, program: str, *arguments: str, cwd: Path) -> None:
        """Run a program of this environment; its output is shown."""
        command = [str(self.folder / "bin" / program), *arguments]
        subprocess.run(command, check=True, cwd=cwd, env=self._variables)

    def read(self, program: str, *arguments: str, cwd: Path) -> str:
        """Run a program of this environment and return what it printed."""
        command = [str(self.folder / "bin" / program), *arguments]
        done = subprocess.run(
            command, check=True, cwd=cwd, env=self._variables, text=True, stdout=subprocess.PIPE
        )
        return done.stdout

    def check_origin(self) -> None:
        """All three packages must come from this environment, not from the checkout."""
        program = (
            "import json, sfi_agent, sfi_policies, sfi_selectors as s;"
            "print(json.dumps([sfi_agent.__file__, sfi_policies.__file__, s.__file__]))"
        )
        files = json.loads(self.read("python", "-c", program, cwd=self.folder))
        for file in files:
            require(Path(file).is_relative_to(self.folder), f"{file} is not the installed one")


def build(outside: Path) -> Path:
    """Build the source distribution, and the wheel from it; the wheel's path."""
    say("building")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(outside / "dist")]
    subprocess.run([*command, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = (outside / "dist").glob("*.whl")
    require(len(list((outside / "dist").glob("*.tar.gz"))) == 1, "there is no sdist")
    return wheel


def check_content(wheel: Path) -> None:
    """The wheel holds every module of the checkout, the data files by name, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    found_metadata = {name.split("/", 1)[1] for name in metadata}
    require(found_metadata == METADATA_FILES, f"metadata files: {sorted(found_metadata)}")
    modules = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    # Ignore files can drop data from a wheel without a word, so it is compared with the checkout.
    data = {
        f"{folder}/{path.name}"
        for folder in DATA_FOLDERS
        for path in (ROOT / folder).glob("*")
        if path.is_file()
    }
    for folder, suffix in zip(DATA_FOLDERS, (".safetensors", ".html"), strict=True):
        has_one = any(name.startswith(folder) and name.endswith(suffix) for name in data)
        require(has_one, f"{folder} has no {suffix} file")
    expected = modules | REQUIRED_FILES | data
    found = names - metadata
    require(expected <= found, f"missing in the wheel: {sorted(expected - found)}")
    require(found <= expected, f"unexpected in the wheel: {sorted(found - expected)}")
    say(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def run_tests(environment: Environment, outside: Path) -> None:
    """Run the tests that concern the installed package, away from the checkout."""
    environment.install(*TEST_TOOLS)
    folder = outside / "suite"
    (folder / "tests").mkdir(parents=True)
    for name in (*TESTS, *HELPERS):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    settings = "[pytest]\nfilterwarnings = error\ntimeout = 120\nmarkers = gpu: needs CUDA\n"
    (folder / "pytest.ini").write_text(settings)
    environment.run("python", "-m", "pytest", "-q", "tests", cwd=folder)


def check_third_party(environment: Environment, outside: Path) -> None:
    """Install the example distribution beside the wheel and see it listed."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    target = outside / "example"
    subprocess.run(
        [*command, "--outdir", str(target), str(EXAMPLE)], check=True, stdout=subprocess.DEVNULL
    )
    (wheel,) = target.glob("*.whl")
    environment.install("--no-deps", str(wheel))
    listing = environment.read("sfi-agent", "plugins", "--json", cwd=outside)
    json.loads(listing)
    for expected in ("keyword", "fading", "sfi-example-plugins", "0.3.0"):
        require(expected in listing, f"`sfi-agent plugins` does not list {expected}")
    say("the third-party distribution is listed")


def require(condition: bool, message: str) -> None:
    """Stop the job with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"wheel job: {message}")


def say(text: str) -> None:
    """One line of progress."""
    print(f"wheel job: {text}", flush=True)


if __name__ == "__main__":
    main()
