"""The built-ins as plugins: their names, options, and what importing them costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sfi_policies
from sfi_agent import ConfigError, Settings, build_detector, load_plugins
from sfi_policies import plugin
from tests.tiny_tokenizers import byte_tokenizer

# The contract: names, options, defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "punctuation": {},
    "spacy": {"language": "en", "pipeline": None},
    "entropy": {"threshold_nats": 0.3, "threshold_sigmas": None, "when": "now"},
    "interval": {"every_tokens": 64},
    "random": {"probability": 0.05, "seed": None},
    "structure": {},
    "drift": {"minimum_mass": 0.05},
    "answer_start": {},
    "never": {},
}


def registered() -> dict[str, tuple[type[Settings], Any]]:
    found: dict[str, tuple[type[Settings], Any]] = {}

    def register(name: str, config: type[Settings], factory: Any) -> None:
        assert name not in found
        found[name] = (config, factory)

    plugin.sfi_register_boundary_detectors(register)
    return found


def test_hook_sfi_register_boundary_detectors() -> None:
    assert {name: config().model_dump() for name, (config, _) in registered().items()} == OPTIONS
    for config, factory in registered().values():
        assert issubclass(config, Settings)
        assert {config.__name__, factory.__name__} <= set(sfi_policies.__all__)


def test_they_enter_like_any_plugin() -> None:
    assert set(OPTIONS) <= set(load_plugins().detectors)
    for name in OPTIONS:
        detector = build_detector({"name": name}, byte_tokenizer())
        assert type(detector) is registered()[name][1]


def test_the_builder_fills_in_the_seed() -> None:
    tokenizer = byte_tokenizer()
    entry = {"name": "random", "probability": 0.5}
    given = build_detector({**entry, "seed": 9}, tokenizer)
    filled = build_detector(entry, tokenizer, default_seed=9)
    other = build_detector(entry, tokenizer, default_seed=8)
    from sfi_agent import TokenEvent

    events = [TokenEvent(1, position) for position in range(200)]
    answers = [[one.after_token(event) for event in events] for one in (given, filled, other)]
    assert answers[0] == answers[1] != answers[2]


def test_both_thresholds_are_refused_by_name() -> None:
    entry = {"name": "entropy", "threshold_nats": 0.3, "threshold_sigmas": 2.0}
    with pytest.raises(ConfigError, match="threshold_nats and threshold_sigmas"):
        build_detector(entry, None)


@pytest.mark.parametrize("name", ["punctuation", "spacy", "structure"])
def test_those_that_read_text_refuse_to_go_without_a_tokenizer(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*tokenizer"):
        build_detector({"name": name}, None)


@pytest.mark.parametrize("module", ["sfi_policies.plugin", "sfi_agent.testing.detector_contract"])
def test_imports_are_light(module: str) -> None:
    roots = {
        Path(sfi_policies.__file__).parents[1],
        Path(sys.modules["sfi_agent"].__path__[0]).parent,
    }
    heavy = ("torch", "transformers", "spacy", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert done.stdout.strip() == "[]"
