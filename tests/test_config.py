"""SessionConfig: defaults, ranges, errors, round trips, presets; habits of all settings."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sfi_agent import ConfigError, PluginError, SessionConfig, Settings, SfiError, load_plugins
from sfi_agent.config_model import UNITS, merge_deeply
from sfi_agent.config_sections import MemorySettings
from sfi_agent.plugins import temporary_plugins
from sfi_agent.presets import PRESETS
from tests.fakes import LooseConfig, detector_plugin, selector_plugin

CONTRACT = """
mode: slow_fast            # or dense
slow_step: observe         # observe | rectify | verify
boundaries:                # any of them opens a slow step
  - {name: punctuation}
  - {name: entropy, threshold_nats: 0.3, when: now}
selector: {name: kl_fusion, alpha: 0.5}
memory: {sink_tokens: 4, selected_tokens: 2048, recent_tokens: 256, dense_layers: []}
refresh: {min_segment_tokens: 16, max_segment_tokens: 96, evidence_queries: 1,
          prefill_evidence_queries: 16, lag: 0}
sampling: {temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new_tokens: 512}
tools: {constrain_calls: false, decode_calls: exact, timeout_seconds: null}
history: {device: same, reserve_tokens: 0, reasoning: keep}
"""


@pytest.fixture(scope="module", autouse=True)
def fake_plugins() -> Iterator[None]:
    """Adds `fake_detector`, `fake_selector` and `loose` to what is registered."""
    plugins = {
        "fake_detectors": detector_plugin("fake_detector"),
        "fake_selectors": selector_plugin("fake_selector"),
        "fake_loose": selector_plugin("loose", config=LooseConfig),
    }
    with temporary_plugins(**plugins):
        yield


def refused(**keys: Any) -> str:
    """The message of the ConfigError that these keys raise."""
    with pytest.raises(ConfigError) as caught:
        SessionConfig(**keys)
    assert isinstance(caught.value, SfiError) and isinstance(caught.value, ValueError)
    return str(caught.value)


def test_the_contract_lists_every_key_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(CONTRACT)
    loaded = SessionConfig.load(path)
    stated = yaml.safe_load(CONTRACT)
    assert loaded.model_dump(mode="json") == stated
    default = SessionConfig().model_dump(mode="json")
    assert list(default) == list(stated)
    assert default.pop("boundaries") == [{"name": "punctuation"}]
    assert default.pop("selector") == {"name": "per_head"}
    assert default == {key: stated[key] for key in default}


# ---------------------------------------------------------------- values out of range


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("memory", "sink_tokens", -1, "integer >= 0 (tokens)"),
        ("memory", "selected_tokens", -1, "integer >= 0 (tokens)"),
        ("memory", "recent_tokens", 0, "integer >= 1 (tokens)"),
        ("memory", "sink_tokens", 4.0, "integer >= 0 (tokens)"),
        ("memory", "sink_tokens", "4", "integer >= 0 (tokens)"),
        ("memory", "sink_tokens", True, "integer >= 0 (tokens)"),
        ("memory", "dense_layers", 3, "a list, each integer >= 0 (layers)"),
        ("memory", "dense_layers", [0, 0], "distinct layers"),
        ("refresh", "min_segment_tokens", 0, "integer >= 1 (tokens)"),
        ("refresh", "max_segment_tokens", 0, "integer >= 1 (tokens)"),
        ("refresh", "evidence_queries", 0, "integer >= 1 (queries)"),
        ("refresh", "prefill_evidence_queries", 0, "integer >= 1 (queries)"),
        ("sampling", "temperature", -0.1, "number >= 0"),
        ("sampling", "temperature", float("inf"), "number >= 0"),
        ("sampling", "temperature", float("nan"), "number >= 0"),
        ("sampling", "top_p", 0.0, "number > 0 and <= 1 (probability)"),
        ("sampling", "top_p", 1.1, "number > 0 and <= 1 (probability)"),
        ("sampling", "top_k", -1, "integer >= 0 (tokens)"),
        ("sampling", "seed", -1, "integer >= 0"),
        ("sampling", "max_new_tokens", 0, "integer >= 1 (tokens)"),
        ("history", "reserve_tokens", -1, "integer >= 0 (tokens)"),
        ("history", "device", "disk", "same, cpu"),
        ("tools", "constrain_calls", 1, "true or false"),
        ("tools", "timeout_seconds", 0.0, "number > 0 or null (seconds)"),
    ],
)
def test_a_wrong_value_names_field_value_and_range(
    section: str, key: str, value: object, allowed: str
) -> None:
    message = refused(**{section: {key: value}})
    (line,) = message.splitlines()[1:]
    assert f"{section}.{key}" in line
    assert repr(value) in line
    assert allowed in line


def test_an_element_of_a_list_is_named_by_its_place() -> None:
    assert "memory.dense_layers.1 is not valid; got -2" in refused(memory={"dense_layers": [0, -2]})


def test_what_becomes_of_reasoning_is_one_of_two() -> None:
    for reasoning in ("keep", "template"):
        config = SessionConfig(history={"reasoning": reasoning})
        assert config.history.reasoning == reasoning
    assert "history.reasoning" in refused(history={"reasoning": "drop"})


def test_a_time_for_tools_is_a_number_of_seconds() -> None:
    assert SessionConfig(tools={"timeout_seconds": 5}).tools.timeout_seconds == 5.0
    assert SessionConfig(tools={"timeout_seconds": 0.25}).tools.timeout_seconds == 0.25
    for wrong in ("5", True, float("inf")):
        assert "tools.timeout_seconds" in refused(tools={"timeout_seconds": wrong})


def test_relations_name_both_fields() -> None:
    message = refused(refresh={"min_segment_tokens": 9, "max_segment_tokens": 8})
    assert "min_segment_tokens" in message and "max_segment_tokens" in message
    assert "9 and 8" in message
    message = refused(refresh={"evidence_queries": 2})
    assert "refresh.evidence_queries" in message and "slow_step" in message


def test_small_values_are_valid() -> None:
    config = SessionConfig(
        memory={"sink_tokens": 0, "selected_tokens": 0, "recent_tokens": 1},
        refresh={"min_segment_tokens": 1, "max_segment_tokens": 1},
        boundaries=[],
        sampling={"max_new_tokens": 1},
    )
    assert config.memory.recent_tokens == 1
    assert config.boundaries == ()


def test_all_problems_are_reported_at_once_one_per_line() -> None:
    message = refused(mode="slow", memory={"sink_tokens": -1, "sinks": 3}, selector={"name": "x"})
    head, *lines = message.splitlines()
    assert head == "SessionConfig is not valid (4 problems):"
    assert len(lines) == 4
    assert "mode is not valid; got 'slow'; allowed: slow_fast, dense." in lines[0]


def test_an_unknown_key_shows_the_known_ones_and_the_likely_one() -> None:
    message = refused(memory={"recnt_tokens": 3})
    assert "memory.recnt_tokens: unknown key" in message
    assert "sink_tokens, selected_tokens, recent_tokens, dense_layers" in message
    assert "'recent_tokens'" in message
    assert "samplng: unknown key" in refused(samplng={})


def test_sections_raise_the_same_error_on_their_own() -> None:
    with pytest.raises(ConfigError, match="recent_tokens is not valid; got 0"):
        MemorySettings(recent_tokens=0)
    with pytest.raises(ConfigError, match="top_p"):
        SessionConfig.model_validate({"sampling": {"top_p": 2.0}})
    with pytest.raises(ConfigError, match="top_p"):
        SessionConfig.model_validate_json('{"sampling": {"top_p": 2.0}}')
    with pytest.raises(ConfigError, match="mode"):
        SessionConfig().model_copy(update={"mode": "fast"})


# ---------------------------------------------------------------- plugin entries


def test_an_unknown_plugin_lists_the_known_ones_with_their_origin() -> None:
    message = refused(selector={"name": "per_heads"})
    assert "selector.name: no selector has this name; got 'per_heads'" in message
    for name, registered in load_plugins().selectors.items():
        assert f"{name} ({registered.origin})" in message
    assert "per_head (built-in)" in message and "fake_selector (in memory)" in message
    assert "Perhaps 'per_head' was meant" in message
    assert "punctuation (built-in)" in refused(boundaries=[{"name": "commas"}])


def test_options_are_checked_by_the_model_of_the_plugin() -> None:
    message = refused(boundaries=[{"name": "never"}, {"name": "fake_detector", "strength": 2}])
    assert "boundaries.1.fake_detector.strength is not valid; got 2" in message
    assert "number >= 0 and <= 1" in message
    message = refused(selector={"name": "fake_selector", "windw_tokens": 1})
    assert "selector.fake_selector.windw_tokens: unknown key" in message
    assert "'window_tokens'" in message
    # Relations between options of a built-in, reported in the plugin's own words.
    both = {"name": "entropy", "threshold_nats": 0.1, "threshold_sigmas": 2.0}
    message = refused(boundaries=[both])
    assert "threshold_nats" in message and "threshold_sigmas" in message


@pytest.mark.parametrize("entry", ["punctuation", 3, None, ["punctuation"], {"nam": "x"}, {1: 2}])
def test_an_entry_is_a_mapping_with_a_name(entry: Any) -> None:
    message = refused(boundaries=[entry])
    assert "boundaries.0" in message and "{name: punctuation}" in message
    message = refused(selector=entry)
    assert "selector" in message and "{name: per_head}" in message


def test_shorthand_is_refused_with_the_long_form() -> None:
    assert "Write {name: window}" in refused(selector="window")
    assert "boundaries is not valid; got 'punctuation'" in refused(boundaries="punctuation")
    assert "boundaries is not valid" in refused(boundaries={"name": "punctuation"})


def test_options_are_plain_data() -> None:
    message = refused(selector={"name": "fake_selector", "words": {object()}})
    assert "not plain data" in message
    assert "not plain data" in refused(selector={"name": "fake_selector", "strength": float("nan")})


def test_entries_compare_by_the_options_in_force_and_dump_what_was_given() -> None:
    short = SessionConfig(boundaries=[{"name": "entropy"}])
    long = SessionConfig(boundaries=[{"when": "now", "name": "entropy", "threshold_nats": 0.3}])
    assert short == long and hash(short) == hash(long)
    assert short != SessionConfig(boundaries=[{"name": "entropy", "threshold_nats": 0.2}])
    assert short.model_dump()["boundaries"] == ({"name": "entropy"},)
    assert long.model_dump()["boundaries"] == (
        {"name": "entropy", "threshold_nats": 0.3, "when": "now"},
    )
    for config in (short, long):
        (resolved,) = config.resolved()["boundaries"]
        assert resolved["threshold_nats"] == 0.3 and resolved["when"] == "now"
    assert list(SessionConfig().resolved()) == list(SessionConfig().model_dump())
    replaced = SessionConfig(boundaries=[{"name": "entropy", "threshold_sigmas": 3}])
    assert replaced.boundaries[0].flat() == {"name": "entropy", "threshold_sigmas": 3.0}


def test_entries_can_be_passed_on_and_cannot_be_changed() -> None:
    first = SessionConfig(selector={"name": "loose", "values": [3]})
    first.selector.options["values"].append(4)
    assert first.selector.options == {"values": [3]}
    assert SessionConfig(selector=first.selector).selector == first.selector
    with pytest.raises(AttributeError):
        first.selector.name = "other"  # type: ignore[misc]
    # An entry of one kind is not one of the other.
    assert "boundaries.0" in refused(boundaries=[first.selector])


def test_a_broken_plugin_is_not_blamed_on_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(**_: object) -> None:
        raise PluginError("plugin 'x' (x 1.0) cannot be loaded", plugin="x", distribution="x 1.0")

    monkeypatch.setattr("sfi_agent.plugin_options.load_plugins", broken)
    with pytest.raises(PluginError, match="x 1.0"):
        SessionConfig()


# ---------------------------------------------------------------- plain data


def test_configurations_are_frozen_hashable_and_copyable() -> None:
    config = SessionConfig(memory={"dense_layers": [1, 0]}, selector={"name": "loose"})
    assert config.memory.dense_layers == (1, 0)
    for twin in (
        SessionConfig(**config.model_dump()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        config.model_copy(),
        config.model_copy(deep=True),
        config.model_copy(update={"mode": "slow_fast"}),
    ):
        assert twin == config and hash(twin) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.mode = "dense"  # type: ignore[misc]
    from sfi_agent.config_sections import (  # the names that `repr` uses
        HistorySettings,
        RefreshSettings,
        SamplingSettings,
        ToolSettings,
    )

    names = (SessionConfig, MemorySettings, RefreshSettings, SamplingSettings)
    scope = {kind.__name__: kind for kind in (*names, ToolSettings, HistorySettings)}
    assert eval(repr(config), scope) == config


words = st.text(max_size=6) | st.sampled_from(
    ["no", "1e5", "0x1f", "1_000", "~", "on", "2024-01-01"]
)
entries = st.fixed_dictionaries(
    {"name": st.just("fake_detector")},
    optional={
        "strength": st.floats(0.0, 1.0),
        "window_tokens": st.integers(1, 10**12),
        "words": st.lists(words, max_size=3),
        "when": st.sampled_from(["now", "next"]),
        "label": st.none() | words,
    },
)
configurations = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["slow_fast", "dense"]),
        "boundaries": st.lists(entries, max_size=3),
        "selector": st.fixed_dictionaries(
            {"name": st.just("loose")}, optional={"values": st.lists(st.integers(), max_size=3)}
        ),
        "memory": st.fixed_dictionaries(
            {},
            optional={
                "selected_tokens": st.integers(0, 10**6),
                "dense_layers": st.lists(st.integers(0, 99), unique=True, max_size=4),
            },
        ),
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0.0, 1e9),
                "top_p": st.floats(0.0, 1.0, exclude_min=True),
                "seed": st.integers(0, 2**63 - 1),
            },
        ),
    },
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(keys=configurations)
def test_yaml_json_and_python_give_the_same_object(
    keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = SessionConfig(**keys)
    folder = tmp_path_factory.mktemp("round_trip", numbered=True)
    for suffix in (".yaml", ".yml", ".json"):
        path = folder / f"config{suffix}"
        assert config.save(path) == path
        loaded = SessionConfig.load(path)
        assert loaded == config and hash(loaded) == hash(config)
        assert loaded.model_dump() == config.model_dump()
    assert SessionConfig.model_validate_json(config.model_dump_json()) == config
    assert SessionConfig(**json.loads(config.model_dump_json())) == config
    for key, value in keys.items():
        dumped = config.model_dump(mode="json")[key]
        assert dumped == (merge_deeply(dumped, value) if isinstance(value, dict) else value)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "mode: dense\nmode: slow_fast\n", "'mode' occurs twice"),
        ("a.json", '{"mode": "dense", "mode": "dense"}', "'mode' occurs twice"),
        ("a.json", '{"memory": {"a": 1, "a": 1}}', "'a' occurs twice"),
        ("a.json", '{"sampling": {"temperature": NaN}}', "NaN"),
        ("a.yaml", "sampling: {temperature: .nan}", "sampling.temperature"),
        ("a.yaml", "", "an empty file"),
        ("a.yaml", "- 1", "a mapping of settings"),
        ("a.json", "3", "a mapping of settings"),
        ("a.yaml", "a: [", "one YAML mapping"),
        ("a.yaml", "a: &a [*a]", "a: unknown key"),
        ("a.yaml", "3: 4", "the key 3 is not text"),
        ("a.yaml", "a: !!python/object:os.system {}", "one YAML mapping"),
        ("a.json", "{", "one JSON mapping"),
        ("a.toml", "", ".yaml, .yml, .json"),
        ("a.yaml", "memory: {sink_tokens: 010}", "memory.sink_tokens is not valid; got '010'"),
        ("a.yaml", "memory: {sink_tokens: 1:30}", "memory.sink_tokens is not valid; got '1:30'"),
        ("a.yaml", "tools: {constrain_calls: no}", "tools.constrain_calls is not valid; got 'no'"),
    ],
)
def test_files_that_do_not_hold_a_configuration(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        SessionConfig.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_and_unwritable_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone.yaml"):
        SessionConfig.load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="no_folder"):
        SessionConfig().save(tmp_path / "no_folder" / "a.yaml")
    with pytest.raises(ConfigError, match=r"allowed: \.yaml, \.yml, \.json"):
        SessionConfig().save(tmp_path / "a.txt")
    (tmp_path / "latin.yaml").write_bytes(b"mode: \xff")
    with pytest.raises(ConfigError, match="latin.yaml"):
        SessionConfig.load(tmp_path / "latin.yaml")


def test_yaml_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sampling: {temperature: 1e-3, top_p: .5}\nboundaries: []\n")
    sampling = SessionConfig.load(path).sampling
    assert (sampling.temperature, sampling.top_p) == (0.001, 0.5)


# ---------------------------------------------------------------- presets


def test_presets_of_the_contract() -> None:
    text = [{"name": "punctuation"}, {"name": "structure"}]
    start = [*text, {"name": "answer_start"}]
    unsure, slightly = entropy(0.3, "now"), entropy(0.05, "now")
    rows: dict[str, tuple[Any, ...]] = {
        "published": ("observe", text[:1], "kl_fusion", 4, 4096, 256, 16, 96, ()),
        "fast": ("observe", start, "question", 4, 1024, 256, 4, 128, ()),
        "balanced": ("rectify", [*start, unsure], "question", 4, 2048, 256, 4, 96, ()),
        "faithful": ("rectify", [*start, slightly], "question", 4, 2048, 256, 4, 64, (0, 1)),
        "exact": ("verify", [*text, unsure], "question", 4, 2048, 256, 4, 32, ()),
    }
    for name, row in rows.items():
        config = SessionConfig.preset(name)
        memory, refresh = config.memory, config.refresh
        assert (
            config.slow_step,
            [entry.flat() for entry in config.boundaries],
            config.selector.name,
            memory.sink_tokens,
            memory.selected_tokens,
            memory.recent_tokens,
            refresh.min_segment_tokens,
            refresh.max_segment_tokens,
            memory.dense_layers,
        ) == row
    assert set(PRESETS) == set(rows)


def entropy(threshold_nats: float, when: str) -> dict[str, Any]:
    return {"name": "entropy", "threshold_nats": threshold_nats, "when": when}


def test_preset_overrides_merge_deeply_and_are_validated() -> None:
    config = SessionConfig.preset("faithful", memory={"selected_tokens": 512}, mode="dense")
    assert config.memory == MemorySettings(selected_tokens=512, dense_layers=(0, 1))
    assert config.refresh.min_segment_tokens == 4
    replaced = SessionConfig.preset("published", selector={"name": "window"}, boundaries=[])
    assert replaced.selector.flat() == {"name": "window"} and replaced.boundaries == ()
    whole = SessionConfig.preset("faithful", memory=MemorySettings(sink_tokens=1))
    assert whole.memory == MemorySettings(sink_tokens=1)
    with pytest.raises(ConfigError, match="memory.selected_token: unknown key"):
        SessionConfig.preset("fast", memory={"selected_token": 1})
    with pytest.raises(ConfigError, match="memory is not valid; got 5"):
        SessionConfig.preset("fast", memory=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name: missing"):
        SessionConfig.preset("published", selector={"alpha": 0.1})
    assert SessionConfig.preset("balanced", slow_step="observe").slow_step == "observe"


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="published, fast, balanced, faithful, exact"):
        SessionConfig.preset("faithfull")


def test_replace_merges_like_preset() -> None:
    config = SessionConfig.preset("published").replace(
        memory={"selected_tokens": 9}, selector={"name": "random", "seed": 3}
    )
    assert (config.memory.selected_tokens, config.memory.sink_tokens) == (9, 4)
    assert config.selector.flat() == {"name": "random", "seed": 3}
    with pytest.raises(ConfigError):
        config.replace(mode="fast")  # type: ignore[arg-type]


# ---------------------------------------------------------------- every settings model


def settings_models() -> list[type[BaseModel]]:
    """The core's models and the options models of the built-ins."""
    registry = load_plugins()
    entries = [*registry.detectors.values(), *registry.selectors.values()]
    found = [entry.config_model for entry in entries if entry.origin == "built-in"]
    sections = [SessionConfig.model_fields[name].annotation for name in SessionConfig.model_fields]
    found += [kind for kind in sections if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [SessionConfig, *found]


def test_every_settings_model_keeps_the_habits() -> None:
    models = settings_models()
    assert len(models) > 15
    for model in models:
        assert issubclass(model, Settings), model
        expected = {
            "frozen": True,
            "extra": "forbid",
            "strict": True,
            "validate_default": True,
            "allow_inf_nan": False,
        }
        assert {key: model.model_config.get(key) for key in expected} == expected, model
        model()
        for name, field in model.model_fields.items():
            where = f"{model.__name__}.{name}"
            extra = field.json_schema_extra
            assert not field.is_required(), where
            assert isinstance(extra, dict) and extra.get("unit") in UNITS, (where, extra)
            text = field.description or ""
            assert text[:1].isupper() or text.startswith(str(field.default)), where
            assert text.endswith(".") and len(text.split()) >= 4, where


def test_settings_refuse_change() -> None:
    for model in settings_models():
        built = model()
        for name in model.model_fields:
            with pytest.raises(ValueError, match="frozen"):
                setattr(built, name, None)
