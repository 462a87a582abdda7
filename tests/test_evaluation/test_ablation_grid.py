"""Grids: what they multiply out to, and everything that is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import ConfigError, SessionConfig
from sfi_agent.evaluation.ablation import AblationGrid
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.policies import expand
from sfi_agent.evaluation.ablation.reference import grid_reference
from sfi_agent.evaluation.ablation.units import case_keys, run_keys
from tests.source_tree import ROOT

TASK = {"name": "office_report_easy", "context_tokens": [700], "cases": 2}


def grid(**keys: Any) -> AblationGrid:
    return AblationGrid(**{"tasks": [TASK], **keys})


def names(made: AblationGrid) -> list[str]:
    return [policy.name for policy in expand(made).policies]


def refused(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        grid(**keys)
    return str(caught.value)


# ---------------------------------------------------------------- what a grid stands for


def test_axes_are_multiplied_in_the_order_of_the_grid() -> None:
    made = grid(
        boundaries={"sentences": ["punctuation"], "none": []},
        selectors=["per_head", {"name": "span", "radius_tokens": 4}],
        selected_tokens=[64, 128],
    )
    assert names(made) == [
        f"{boundaries} / {selector} / {budget}"
        for boundaries in ("sentences", "none")
        for selector in ("per_head", "span(radius_tokens=4)")
        for budget in (64, 128)
    ]
    last = expand(made).policies[-1].config
    assert last.boundaries == () and last.memory.selected_tokens == 128
    assert last.selector.flat() == {"name": "span", "radius_tokens": 4}


def test_axes_of_one_value_are_set_and_not_named() -> None:
    made = grid(selectors=["top_k"], selected_tokens=[64, 128], slow_steps=["observe"])
    assert names(made) == ["64", "128"]
    assert {policy.config.selector.name for policy in expand(made).policies} == {"top_k"}


def test_base_presets_and_dotted_axes() -> None:
    made = grid(
        base={"preset": "fast", "memory": {"recent_tokens": 32}},
        settings={"memory.dense_layers": [[], [0, 1]], "refresh.max_segment_tokens": [32]},
        presets=[
            "published",
            {"preset": "published", "label": "small", "memory": {"selected_tokens": 64}},
        ],
    )
    assert names(made) == ["dense_layers=[]", "dense_layers=[0, 1]", "published", "small"]
    first, second, published, small = expand(made).policies
    assert first.config.memory.recent_tokens == 32 and first.preset == "fast"
    assert second.config.memory.dense_layers == (0, 1)
    assert second.config.refresh.max_segment_tokens == 32
    assert second.settings == {"memory.dense_layers": [0, 1], "refresh.max_segment_tokens": 32}
    assert published.config == SessionConfig.preset("published")
    assert small.config == SessionConfig.preset("published", memory={"selected_tokens": 64})


def test_presets_alone_bring_no_base() -> None:
    assert names(grid(presets=["published"])) == ["published"]
    assert names(grid(base="fast", presets=["published"])) == ["fast", "published"]
    assert names(grid()) == ["base"]


def test_a_base_may_be_wrong_where_an_axis_mends_it() -> None:
    made = grid(
        base={"refresh": {"evidence_queries": 4, "min_segment_tokens": 99}},
        slow_steps=["rectify", "verify"],
        settings={"refresh.max_segment_tokens": [128]},
    )
    assert [policy.config.slow_step for policy in expand(made).policies] == ["rectify", "verify"]


def test_excluded_equal_and_contradictory_combinations_are_listed_with_reasons() -> None:
    made = grid(
        selectors=["per_head", "window"],
        slow_steps=["observe", "rectify"],
        settings={"refresh.evidence_queries": [1, 4]},
        exclude=[{"selectors": "window", "slow_steps": ["rectify"]}],
        presets=[{"preset": "fast"}, {"preset": "fast", "label": "again"}],
        invalid="skip",
    )
    found = {item.policy: item.reason for item in expand(made).skipped}
    assert "exclude rule 1" in found["window / rectify / evidence_queries=4"]
    assert "evidence_queries" in found["per_head / observe / evidence_queries=4"]
    assert found["again"] == "it is the same configuration as 'fast'"
    assert len(found) == 5 and len(names(made)) == 5


def test_exclude_takes_a_list_as_a_value_and_as_several_values() -> None:
    axes = {"settings": {"memory.dense_layers": [[], [0], [0, 1]]}}
    one = grid(**axes, exclude=[{"memory.dense_layers": [0]}])
    assert names(one) == ["dense_layers=[]", "dense_layers=[0, 1]"]
    two = grid(**axes, exclude=[{"memory.dense_layers": [[0], [0, 1]]}])
    assert [item.policy for item in expand(two).skipped] == [
        "dense_layers=[0]",
        "dense_layers=[0, 1]",
    ]


def test_a_grid_survives_its_file(tmp_path: Path) -> None:
    made = grid(
        title="Größe",
        boundaries=[["punctuation"], [{"name": "entropy", "threshold_nats": 0.3}, "structure"]],
        selectors=["per_head", {"name": "span", "radius_tokens": 4}],
        settings={"memory.dense_layers": [[], [0]]},
        presets=["published", {"preset": "fast", "label": "a"}],
        seeds=[0, 3],
    )
    for suffix in (".yaml", ".json"):
        path = made.save(tmp_path / f"grid{suffix}")
        again = AblationGrid.load(path)
        assert again == made and expand(again) == expand(made)


def test_the_example_grid_is_valid() -> None:
    made = AblationGrid.load(ROOT / "examples" / "ablation_grid.yaml")
    assert made.model == "embedded" and len(Plan.of(made).runs) >= 20


# ---------------------------------------------------------------- units


AXES = st.fixed_dictionaries(
    {},
    optional={
        "selectors": st.lists(
            st.sampled_from(["per_head", "top_k", "window", "span"]), min_size=1, unique=True
        ),
        "selected_tokens": st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
        "boundaries": st.lists(
            st.sampled_from(["punctuation", "never", "interval"]), min_size=1, unique=True
        ),
        "seeds": st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    },
)
TASKS = st.lists(
    st.tuples(
        st.sampled_from(["niah_single_1", "mt_kv", "office_report_easy"]),
        st.lists(st.integers(100, 9000), min_size=1, max_size=3, unique=True),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda task: task[0],
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(axes=AXES, tasks=TASKS)
def test_every_policy_meets_every_case_once(axes: dict[str, Any], tasks: list[Any]) -> None:
    made = AblationGrid(
        tasks=[{"name": n, "context_tokens": lengths, "cases": c} for n, lengths, c in tasks],
        **axes,
    )
    plan = Plan.of(made)
    sizes = [len(axes.get(name, "x")) for name in ("selectors", "selected_tokens", "boundaries")]
    assert len(plan.policies) - 1 == sizes[0] * sizes[1] * sizes[2]
    cases = case_keys(made)
    per_seed = sum(len(lengths) * count for _, lengths, count in tasks)
    assert len(set(cases)) == len(cases) == per_seed * len(made.seeds)
    runs = list(run_keys(cases, plan.names))
    assert len({run.id for run in runs}) == len(runs) == len(cases) * len(plan.policies)
    seeds = {(case.task, case.context_tokens, case.case_seed) for case in cases}
    assert len(seeds) == len(cases), "two cases of a task and length are the same"
    # First cases come first, so that an interrupt leaves something of everything.
    first = {(case.task, case.context_tokens) for case in cases[: sum(len(t[1]) for t in tasks)]}
    assert first == {(name, length) for name, lengths, _ in tasks for length in lengths}


def test_names_of_files_are_safe_whatever_the_policy_is_called() -> None:
    made = grid(presets=[{"preset": "fast", "label": "../..\\a:b* ü" + "x" * 60}])
    for run in Plan.of(made).runs:
        assert len(run.id) < 200 and set(run.id) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
        )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"selector": ["per_head"]}, "selector: unknown key"),
        ({"selectors": ["perhead"]}, "perhead"),
        ({"selectors": ["perhead"]}, "cumulative_mass"),
        ({"selectors": [{"name": "span", "radius": 3}]}, "radius_tokens"),
        ({"selectors": ["span", "span"]}, "twice"),
        ({"selectors": "span"}, "selectors"),
        ({"boundaries": {"a": ["punktuation"]}}, "boundaries.a.0.name"),
        ({"boundaries": {"dense": ["punctuation"]}}, "dense is the name of the reference"),
        ({"boundaries": {"": ["punctuation"]}}, "unusable name"),
        ({"boundaries": 3}, "a mapping of names to lists of detectors"),
        ({"boundaries": [["never"], ["never"]]}, "twice"),
        ({"selected_tokens": [-1]}, "selected_tokens.0"),
        ({"selected_tokens": [64, 64]}, "64 twice"),
        ({"slow_steps": ["look"]}, "observe, rectify, verify"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"seeds": []}, "seeds"),
        ({"dtype": "int8"}, "float32"),
        ({"invalid": "ignore"}, "error, skip"),
        ({"base": "quick"}, "published"),
        ({"base": {"memory": {"sink": 3}}}, "sink_tokens"),
        ({"base": {"mode": "dense"}}, "dense is always played"),
        ({"base": {"sampling": {"seed": 3}}}, "use seeds"),
        ({"base": {"label": "x"}}, "only entries of presets"),
        ({"base": 7}, "base"),
        ({"presets": ["quick"]}, "published"),
        ({"presets": [{"memory": {"selected_tokens": 3}}]}, "presets.0.preset: missing"),
        ({"presets": [{"preset": "fast", "label": "dense"}]}, "unusable name"),
        ({"presets": [{"preset": "fast", "label": "published"}, "published"]}, "two policies"),
        ({"settings": {"memory.sinks": [1]}}, "sink_tokens"),
        ({"settings": {"memory.sink_tokens": []}}, "memory.sink_tokens"),
        ({"settings": {"memory.sink_tokens": [1, -1]}}, "memory.sink_tokens[1]"),
        ({"settings": {"memory.selected_tokens": [1]}}, "use selected_tokens"),
        ({"settings": {"selector": [{"name": "span"}]}}, "use selectors"),
        ({"settings": {"mode": ["dense"]}}, "dense is always played"),
        ({"exclude": [{"selectors": "span"}]}, "is no axis of this grid"),
        ({"selectors": ["span", "page"], "exclude": [{"selectors": "window"}]}, "span, page"),
        ({"selectors": ["span", "page"], "exclude": [{"selectors": ["span", "page"]}]}, "left out"),
        ({"selectors": ["span", "page"], "exclude": [{}]}, "exclude.0"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"name": "niah", "context_tokens": [9]}]}, "niah_single_1"),
        ({"tasks": [{**TASK, "context_tokens": [0]}]}, "tasks.0.context_tokens.0"),
        ({"tasks": [{**TASK, "context_tokens": []}]}, "tasks.0.context_tokens"),
        ({"tasks": [{**TASK, "context_tokens": [700, 700]}]}, "700 twice"),
        ({"tasks": [{**TASK, "cases": 0}]}, "tasks.0.cases"),
        ({"tasks": [{**TASK, "protocol": "b"}]}, "dense_question, sparse_question"),
        ({"tasks": [{**TASK, "length": 3}]}, "context_tokens"),
        ({"tasks": [TASK, TASK]}, "occurs twice"),
        ({"traces": {"slow_steps": 1}}, "traces.slow_steps"),
        ({"traces": {"everything": True}}, "traces.everything"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_wrong_grids(keys: dict[str, Any], said: str) -> None:
    assert said in refused(**keys)


def test_every_problem_is_reported_at_once() -> None:
    message = refused(
        selectors=["span", "spam"],
        boundaries=[["punctuation", "dots"], ["commas"]],
        slow_steps=["look"],
        base={"memory": {"sink": 1}, "refresh": {"min": 1}},
        settings={"memory.recent_tokens": [0], "history.reserve": [1]},
        tasks=[{"name": "nothing", "context_tokens": [1]}],
        presets=["none"],
    )
    for part in ("spam", "dots", "commas", "look", "memory.sink", "refresh.min", "nothing"):
        assert part in message
    assert "memory.recent_tokens[0]" in message and "history.reserve" in message
    assert "'none'" in message


def test_contradictory_combinations_are_an_error_by_name_with_the_way_out() -> None:
    message = refused(
        slow_steps=["observe", "rectify"],
        selectors=["span", "page"],
        settings={"refresh.evidence_queries": [1, 4]},
    )
    assert "'span / observe / evidence_queries=4' and 1 more" in message
    assert "exclude" in message and "invalid: skip" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [", "cannot read the configuration"),
        ("[1, 2]", "a mapping of settings"),
        ("model: embedded\nmodel: other\n", "occurs twice"),
        ("model: embedded\n", "tasks"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        AblationGrid.load(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


# ---------------------------------------------------------------- the page


def test_the_page_has_the_table_of_the_keys() -> None:
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert grid_reference() in page, "paste `grid_reference()` into docs/ablations.md"


def test_the_example_of_the_page_is_the_example_file() -> None:
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "ablation_grid.yaml").read_text(encoding="utf-8")
    body = "\n".join(line for line in example.splitlines() if not line.startswith("#")).strip()
    assert f"```yaml\n{body}\n```" in page
    assert yaml.safe_load(body)["model"] == "embedded"
