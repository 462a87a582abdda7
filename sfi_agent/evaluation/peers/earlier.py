"""Results of an earlier comparison: what another environment computed need not be played again.

Presets change often and presses do not. An earlier file serves as long as weights, numbers,
prompts, sizes and versions are the same ones; if any of them is not, that is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.peers.exchange import ArmRun, run_from_json

__all__ = ["Earlier", "read_earlier"]

_SAME = ("weights", "dtype", "device", "kept_tokens")
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Earlier:
    """What is taken over from an earlier comparison; without arguments nothing.

    Attributes:
        arms: Arms that need not be played.
        runs: Theirs, on the cases of the comparison under way.
        versions: Of their environments, by name.
        path: The file.
    """

    arms: frozenset[str] = frozenset()
    runs: tuple[ArmRun, ...] = ()
    versions: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    path: Path = Path()

    def merged_versions(
        self, now: Mapping[str, Mapping[str, str | None]]
    ) -> dict[str, Mapping[str, str | None]]:
        """Versions of the environments in use and of those whose results are taken over.

        Raises:
            InputError: An environment has other versions than then.
        """
        changed = [
            name for name in now if name in self.versions and now[name] != self.versions[name]
        ]
        if changed:
            raise _other_conditions(self.path, [f"versions in the environment {changed[0]!r}"])
        return {**self.versions, **now}


def read_earlier(path: Path, now: Mapping[str, Any]) -> Earlier:
    """What an earlier output can spare the comparison under way.

    Args:
        path: What `Comparison.save` wrote.
        now: What it will write of the comparison under way: weights, dtype, device, kept tokens,
            arms and prompts.

    Raises:
        InputError: The file is no such output, or was made under other conditions.
    """
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        arms = {name: arm for name, arm in now["arms"].items() if name in then["arms"]}
        different = [name for name in _SAME if then[name] != now[name]]
        different += [f"arm {name}" for name, arm in arms.items() if then["arms"][name] != arm]
        digests = {prompt["case"]: prompt["sha256"] for prompt in then["prompts"]}
        wanted = {prompt["case"]: prompt["sha256"] for prompt in now["prompts"]}
        different += [f"case {case}" for case in wanted if digests.get(case) != wanted[case]]
        runs = _runs(then["turns"], set(arms), set(wanted))
        environments = {arm["environment"] for arm in arms.values()}
        versions = {name: then["versions"][name] for name in environments}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            explain(
                f"Taking results from {str(path)!r}",
                got=f"{type(error).__name__}: {error}",
                allowed="a JSON file that an earlier comparison wrote",
            )
        ) from error
    if different:
        raise _other_conditions(path, different)
    return Earlier(frozenset(arms), runs, versions, path)


def _other_conditions(path: Path, different: list[str]) -> InputError:
    return InputError(
        explain(
            f"Taking results from {str(path)!r}",
            got=f"an earlier comparison with other {', '.join(different[:_SHOWN])}",
            remedy="Play everything again, or repeat the options of the earlier comparison",
        )
    )


def _runs(turns: list[dict[str, Any]], arms: set[str], cases: set[str]) -> tuple[ArmRun, ...]:
    played: dict[tuple[str, str], list[Any]] = {}
    for turn in turns:
        if turn["arm"] in arms and turn["case"] in cases:
            played.setdefault((turn["arm"], turn["case"]), []).append(turn["what"])
    return tuple(
        run_from_json({"arm": arm, "case": case, "turns": what})
        for (arm, case), what in played.items()
    )
