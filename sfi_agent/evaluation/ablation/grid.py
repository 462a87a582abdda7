"""The grid of an ablation: what a user writes, validated as a whole before anything runs.

Plain data. A grid says which policies (a base, axes crossed over it, and further presets) meet
which tasks, context lengths and seeds; `policies.py` multiplies it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sfi_agent.config_files import read_mapping, write_mapping
from sfi_agent.config_model import ConfigModel
from sfi_agent.errors import ConfigError
from sfi_agent.evaluation.ablation.entries import (
    BoundarySet,
    PolicyMapping,
    as_boundary_sets,
    as_policy,
    as_selectors,
    check_base,
    check_preset,
    check_settings,
)
from sfi_agent.evaluation.ablation.grid_sections import Distinct, TaskEntry, TraceSettings
from sfi_agent.evaluation.ablation.policies import expand
from sfi_agent.plugin_options import SelectorEntry
from sfi_agent.problems import Problem, problems_error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FIRST_CASE_SEED", "AblationGrid"]

FIRST_CASE_SEED = 200_000
"""Case seeds begin where the logs that the embedded model has not seen begin."""
_LARGEST_SEED = 99_999


Axis = Annotated[tuple[Any, ...], Field(min_length=1, strict=False), Distinct]


class AblationGrid(ConfigModel):
    """Policies x tasks x context lengths x seeds. Frozen plain data.

    Policies are the product of all axes over the base, plus `presets`. Mode dense is always
    played, as the reference; it is not part of a grid.

    Raises:
        ConfigError: A key, plugin, preset or task is unknown, a value out of range, or a
            combination cannot run; every problem is listed.
        PluginError: An installed plugin is broken.
    """

    title: str = Field(
        default="",
        max_length=200,
        description="Heading of the report.",
        json_schema_extra={"unit": "text"},
    )
    model: str = Field(
        default="embedded",
        min_length=1,
        description="A checkpoint directory, a Hugging Face Hub id, or embedded.",
        json_schema_extra={"unit": "name"},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number type; auto takes the checkpoint's own (the embedded model: float32).",
        json_schema_extra={"unit": "choice"},
    )
    device: str = Field(
        default="auto",
        description="auto (CUDA where there is one), cpu, cuda or cuda:N.",
        json_schema_extra={"unit": "choice"},
    )
    tasks: tuple[TaskEntry, ...] = Field(
        min_length=1,
        strict=False,
        description="Tasks with their lengths and numbers of cases.",
        json_schema_extra={"unit": "entries"},
    )
    base: Annotated[PolicyMapping, AfterValidator(check_base), BeforeValidator(as_policy)] = Field(
        default={},
        description="What all combinations of the axes start from: the name of a preset, or keys "
        "of a session's configuration, with the key preset where they change one.",
        json_schema_extra={"unit": "entries"},
    )
    boundaries: Annotated[tuple[BoundarySet, ...], BeforeValidator(as_boundary_sets), Distinct] = (
        Field(
            default=(),
            description="Axis: sets of boundary detectors, as a mapping of names to lists of "
            "entries, or as a list of such lists.",
            json_schema_extra={"unit": "entries"},
        )
    )
    selectors: Annotated[tuple[SelectorEntry, ...], BeforeValidator(as_selectors), Distinct] = (
        Field(
            default=(),
            description="Axis: selectors, as names or as entries with options.",
            json_schema_extra={"unit": "entries"},
        )
    )
    selected_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Distinct] = Field(
        default=(),
        strict=False,
        description="Axis: budgets (memory.selected_tokens).",
        json_schema_extra={"unit": "tokens"},
    )
    slow_steps: Annotated[
        tuple[Literal["observe", "rectify", "verify"], ...], Field(strict=False), Distinct
    ] = Field(
        default=(),
        description="Axis: kinds of slow step.",
        json_schema_extra={"unit": "choice"},
    )
    settings: Annotated[dict[str, Axis], AfterValidator(check_settings)] = Field(
        default={},
        description="Further axes: dotted keys of a session's configuration, such as "
        "memory.dense_layers, each with a list of values.",
        json_schema_extra={"unit": "entries"},
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=_LARGEST_SEED)], ...], Distinct] = Field(
        default=(0,),
        min_length=1,
        strict=False,
        description="Each seed brings other cases and other sampling noise (sampling.seed).",
        json_schema_extra={"unit": "seed"},
    )
    presets: Annotated[
        tuple[
            Annotated[PolicyMapping, AfterValidator(check_preset), BeforeValidator(as_policy)], ...
        ],
        Distinct,
    ] = Field(
        default=(),
        strict=False,
        description="Further policies beside the product: names of presets, or mappings with "
        "preset, changes to it, and label (its name in the results).",
        json_schema_extra={"unit": "entries"},
    )
    exclude: tuple[Annotated[dict[str, Any], Field(min_length=1)], ...] = Field(
        default=(),
        strict=False,
        description="Combinations to leave out: mappings of axes to a value or a list of values; "
        "a combination that has one of the values for each axis named is listed as skipped.",
        json_schema_extra={"unit": "entries"},
    )
    invalid: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to combinations that contradict themselves: error refuses the "
        "grid, skip lists them as skipped with the reason.",
        json_schema_extra={"unit": "choice"},
    )
    traces: TraceSettings = Field(
        default=TraceSettings(),
        description="What is recorded of a few runs in detail.",
        json_schema_extra={"unit": "entries"},
    )

    if TYPE_CHECKING:
        # Keys may be given in the short forms of files, which the annotations do not say.
        def __init__(self, /, **keys: Any) -> None: ...

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> Self:
        keys = [entry.key for entry in self.tasks]
        problems = [
            Problem(
                f"tasks.{index}",
                f"{', '.join(key)} occurs twice",
                remedy="put all context lengths into one entry",
            )
            for index, key in enumerate(keys)
            if key in keys[:index]
        ]
        if problems:
            raise problems_error(problems)
        return self

    @model_validator(mode="after")
    def _policies_are_valid(self) -> Self:
        expand(self)
        return self

    @classmethod
    def load(cls, path: str | Path) -> AblationGrid:
        """Read a .yaml, .yml or .json file.

        Raises:
            ConfigError: The file cannot be read, or what it says is not valid.
        """
        source = Path(path)
        data: Mapping[str, Any] = read_mapping(source)
        try:
            return cls.model_validate(data)
        except ConfigError as error:
            raise ConfigError(f"In {source}: {error}") from error

    def save(self, path: Path) -> Path:
        """Write a .yaml, .yml or .json file that `load` reads back equal.

        Raises:
            ConfigError: The suffix is unknown, or the file cannot be written.
        """
        write_mapping(path, self.as_json())
        return path

    def as_json(self) -> dict[str, Any]:
        """The grid as plain data, every default written out."""
        data = self.model_dump(mode="json")
        data["boundaries"] = {
            item.name: [entry.flat() for entry in item.entries] for item in self.boundaries
        }
        return data
