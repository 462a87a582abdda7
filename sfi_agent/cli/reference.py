"""Writes the generated parts of the reference pages from the code they describe.

    python -m sfi_agent.cli.reference            # rewrite docs/configuration.md and docs/hooks.md
    python -m sfi_agent.cli.reference --check    # change nothing; fail when a page is out of date

A page keeps its prose; only the text between `<!-- generated: NAME -->` and `<!-- end -->` is
replaced. What is listed are the core and the built-in plugins, whatever else is installed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sfi_agent import hookspecs, protocols
from sfi_agent.config import SessionConfig
from sfi_agent.plugins import PluginLoader, Registered, Registry
from sfi_agent.presets import PRESETS, Preset
from sfi_agent.problems import describe_allowed, field_schema

__all__ = ["PAGES", "main", "regenerated"]

_BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EVENTS = ("StepEvent", "TokenEvent", "Boundary", "Evidence", "Selection", "Ranking")


def regenerated(page: str) -> str:
    """The page with every generated block written anew.

    Raises:
        KeyError: The page names a block that nothing generates.
    """

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_BLOCKS[match['name']]().strip()}\n\n{match[3]}"

    return _BLOCK.sub(replace, page)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the pages; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sfi_agent.cli.reference")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    options = parser.parse_args(arguments)
    outdated = 0
    for name in PAGES:
        path = options.docs / name
        old = path.read_text(encoding="utf-8")
        new = regenerated(old)
        if old == new:
            continue
        outdated += 1
        if options.check:
            print(f"{path} is out of date; run `make docs`", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path} rewritten")
    return 1 if options.check and outdated else 0


def _default_yaml() -> str:
    return f"```yaml\n{SessionConfig().to_yaml()}```"


def _core_keys() -> str:
    top: list[str] = []
    sections: list[str] = []
    for name, field in SessionConfig.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            sections += [f"### {name}", "", field.description or "", "", _options_table(annotation)]
        else:
            top.append(_option_row(SessionConfig, name))
    return "\n".join([*_TABLE_HEAD, *top, "", *sections])


_TABLE_HEAD = ("| key | allowed | default | meaning |", "|---|---|---|---|")


def _options_table(model: type[BaseModel]) -> str:
    rows = [_option_row(model, name) for name in model.model_fields]
    return "\n".join([*_TABLE_HEAD, *rows, ""]) if rows else "No options.\n"


def _option_row(model: type[BaseModel], name: str) -> str:
    fragment = field_schema(model, name)
    default = fragment.get("default")
    allowed = describe_allowed(fragment)
    if name in ("boundaries", "selector"):
        allowed = f"name and options of {'detectors' if name == 'boundaries' else 'a selector'}"
    meaning = " ".join(str(fragment.get("description", "")).split())
    cells = (f"`{name}`", allowed, f"`{_plain(default)}`", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _presets() -> str:
    head = "| preset | for | slow_step | boundaries | selector | sink / selected / recent | "
    rows = [head + "segment | dense layers |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*rows, *(_preset_row(preset) for preset in PRESETS.values())])


def _preset_row(preset: Preset) -> str:
    memory, refresh = preset.settings["memory"], preset.settings["refresh"]
    entries = [
        " ".join(str(value) for value in entry.values()) for entry in preset.settings["boundaries"]
    ]
    cells = (
        f"`{preset.name}`",
        preset.summary,
        preset.slow_step,
        ", ".join(entries),
        preset.settings["selector"]["name"],
        f"{memory['sink_tokens']} / {memory['selected_tokens']} / {memory['recent_tokens']}",
        f"{refresh['min_segment_tokens']}-{refresh['max_segment_tokens']}",
        ", ".join(str(layer) for layer in memory["dense_layers"]) or "none",
    )
    return "| " + " | ".join(cells) + " |"


def _built_ins() -> Registry:
    loader = PluginLoader(load_entry_points=False)
    registry = loader.load()
    if loader.errors:
        raise loader.errors[0]
    return registry


def _plugin_options(entries: Mapping[str, Registered]) -> str:
    parts: list[str] = []
    for entry in entries.values():
        documented = entry.factory if inspect.isclass(entry.factory) else entry.config_model
        summary = (inspect.getdoc(documented) or "").split("\n\n")[0]
        parts += [f"### {entry.name}", "", " ".join(summary.split()), ""]
        parts.append(_options_table(entry.config_model))
    return "\n".join(parts)


def _hooks() -> str:
    hooks = (hookspecs.sfi_register_boundary_detectors, hookspecs.sfi_register_selectors)
    parts: list[str] = []
    for hook in hooks:
        parts += [f"### {hook.__name__}", "", _python(_signature(hook)), "", *_docstring(hook)]
    return "\n".join(parts)


def _protocol(protocol: type[Any]) -> str:
    parts = [f"### {protocol.__name__}", "", *_docstring(protocol)]
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.fget is not None:
            text = f"{name}: {inspect.signature(member.fget).return_annotation}"
            parts += [_python(text), "", *_docstring(member.fget)]
        elif inspect.isfunction(member):
            parts += [_python(_signature(member)), "", *_docstring(member)]
    return "\n".join(parts)


def _protocols() -> str:
    return "\n".join(_protocol(kind) for kind in (protocols.BoundaryDetector, protocols.Selector))


def _records() -> str:
    parts: list[str] = []
    for name in _EVENTS:
        record = getattr(protocols, name)
        fields = (f"    {key}: {kind}" for key, kind in record.__annotations__.items())
        parts += [f"### {name}", "", _python("\n".join([f"class {name}:", *fields])), ""]
        parts += _docstring(record)
    return "\n".join(parts)


def _signature(function: Callable[..., Any]) -> str:
    text = str(inspect.signature(function)).replace("'", "")
    return f"def {function.__name__}{text}"


def _python(text: str) -> str:
    return f"```text\n{text}\n```"


def _docstring(documented: object) -> Iterable[str]:
    text = inspect.getdoc(documented) or ""
    summary, _, details = text.partition("\n\n")
    yield " ".join(summary.split())
    yield ""
    if details:
        yield f"```text\n{details}\n```"
        yield ""


_BLOCKS: Mapping[str, Callable[[], str]] = {
    "boundaries": lambda: _plugin_options(_built_ins().detectors),
    "core_keys": _core_keys,
    "default_yaml": _default_yaml,
    "hooks": _hooks,
    "presets": _presets,
    "protocols": _protocols,
    "records": _records,
    "selectors": lambda: _plugin_options(_built_ins().selectors),
}
PAGES = ("configuration.md", "hooks.md")


if __name__ == "__main__":
    raise SystemExit(main())
