"""Reads and writes configuration files: plain mappings from YAML or JSON, nothing lost silently.

YAML is read by the rules of YAML 1.2: `no` and `on` are text, `1e-3` is a number, dates are text.
A key that occurs twice is an error, where common readers let the last one win.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sfi_agent.errors import ConfigError, explain

__all__ = ["read_mapping", "to_yaml", "write_mapping"]

_YAML_SUFFIXES = (".yaml", ".yml")
_ALLOWED_SUFFIXES = ".yaml, .yml, .json"
_LINE_WIDTH_CHARACTERS = 100


class _Loader(yaml.SafeLoader):
    """Safe loading by YAML 1.2 rules, refusing duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or YAML 1.2 would read as something other than text."""

    yaml_implicit_resolvers = {
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$"
    r"|\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)
for _tag, _pattern, _first_characters in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first_characters)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first_characters)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a .yaml, .yml or .json file holds.

    Raises:
        ConfigError: The file is missing, has another suffix, is not well formed, holds a key
            twice, or holds something other than a mapping.
    """
    is_yaml = _check_suffix(path, "read")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            explain(f"cannot read the configuration {path}", got=str(error))
        ) from error
    try:
        data = yaml.load(text, _Loader) if is_yaml else _parse_json(text)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())
        kind = "YAML" if is_yaml else "JSON"
        raise ConfigError(
            explain(
                f"cannot read the configuration {path}", got=cause, allowed=f"one {kind} mapping"
            )
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            explain(
                f"cannot read the configuration {path}",
                got="an empty file" if data is None else f"{type(data).__name__}: {data!r}"[:80],
                allowed="a mapping of settings; `{}` stands for all defaults",
            )
        )
    return data


def write_mapping(path: Path, data: dict[str, Any]) -> None:
    """Write a plain mapping as YAML or JSON, by the suffix of the path.

    Raises:
        ConfigError: The suffix is unknown, or the file cannot be written.
    """
    is_yaml = _check_suffix(path, "write")
    text = to_yaml(data) if is_yaml else json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            explain(f"cannot write the configuration {path}", got=str(error))
        ) from error


def to_yaml(data: dict[str, Any]) -> str:
    """A plain mapping as YAML, keys in their order, one line per section."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=_LINE_WIDTH_CHARACTERS,
    )


def _check_suffix(path: Path, verb: str) -> bool:
    suffix = path.suffix.lower()
    if suffix in _YAML_SUFFIXES:
        return True
    if suffix == ".json":
        return False
    raise ConfigError(
        explain(
            f"cannot {verb} the configuration {path}",
            got=f"the suffix {path.suffix!r}",
            allowed=_ALLOWED_SUFFIXES,
        )
    )


def _parse_json(text: str) -> object:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return mapping


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")
