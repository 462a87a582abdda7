"""Puts the page together: its head as plain HTML, its data as JSON, its scripts and styles inline.

A content security policy in the page names the hashes of the one script and the one style sheet,
so a browser runs nothing else and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from sfi_agent.evaluation.report.folder_format import Results

__all__ = ["embedded_json", "page_html", "visible_text"]

_SCRIPTS = (
    *("basics.js", "data.js", "state.js", "marks.js", "filters.js", "plot.js", "accuracy.js"),
    *(
        "along.js",
        "table.js",
        "reasons.js",
        "heat.js",
        "recall.js",
        "history.js",
        "trace.js",
        "tokens.js",
    ),
    *("summary.js", "start.js"),
)
_SHOWN = 40


def page_html(results: Results, data: dict[str, Any], traces: Sequence[dict[str, Any]]) -> str:
    """The whole page as text.

    Args:
        results: What its head says.
        data: From `page_data`.
        traces: From `trace_data`.
    """
    style = _asset("page.css")
    scripts = "\n".join(_asset(name) for name in _SCRIPTS)
    script = f'(function () {{\n"use strict";\n{scripts}\n}})();\n'
    blocks = [_data_block("data", data)]
    blocks += [_data_block(f"trace-{number}", trace) for number, trace in enumerate(traces)]
    parts = {
        "policy": _security_policy(style, script),
        "title": visible_text(results.title or f"Ablation on {results.model.name}"),
        "style": style,
        "script": script,
        "head": _head(results),
        "facts": _facts(results),
        "notices": _notices(results),
        "foot": _foot(results),
        "data": "\n".join(blocks),
    }
    # One pass, so that nothing inserted is read as a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def embedded_json(value: object) -> str:
    """JSON that can stand inside a script element: pure ASCII, without `<`, `>` and `&`.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible_text(text: str) -> str:
    """Text for HTML: escaped, and what would not be seen or would turn its surroundings, named."""
    shown = "".join(
        character if character in " \n" or _is_plain(character) else f"<U+{ord(character):04X}>"
        for character in text
    )
    return html.escape(shown)


def _is_plain(character: str) -> bool:
    directional = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return character.isprintable() and character not in directional


def _asset(name: str) -> str:
    folder = resources.files("sfi_agent.evaluation.report") / "assets"
    return (folder / name).read_text(encoding="utf-8")


def _data_block(name: str, value: object) -> str:
    return f'<script type="application/json" id="{name}">{embedded_json(value)}</script>'


def _security_policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _head(results: Results) -> str:
    title = results.title or f"Ablation on {results.model.name}"
    slow_fast = sum(policy.mode == "slow_fast" for policy in results.policies)
    tasks = sorted({row.task for row in results.rows})
    lengths = sorted({row.context_tokens for row in results.rows})
    sentence = (
        f"{slow_fast} slow-fast {_noun(slow_fast, 'policy', 'policies')}, "
        f"{len(tasks)} {_noun(len(tasks), 'task', 'tasks')} at "
        f"{_listed(f'{length:,}' for length in lengths)} tokens of context, "
        f"{results.finished_runs:,} runs."
    )
    return (
        '<p class="kicker">sfi-agent ablation</p>\n'
        f"<h1>{visible_text(title)}</h1>\n"
        f'<p class="lede">{visible_text(sentence)} A fast step reads a small memory, a slow step '
        "the whole history; this page shows what each policy keeps of dense decoding, and how "
        "often it has to look at everything.</p>"
    )


def _facts(results: Results) -> str:
    model = results.model
    shape = [
        (model.layers, "layers"),
        (model.query_heads, "query heads"),
        (model.kv_heads, "KV heads"),
        (model.head_dim, "head dim"),
        (model.parameters, "parameters"),
    ]
    where = [part for part in (model.class_name, model.dtype, model.device) if part]
    entries = [
        ("Model", ", ".join([model.name, *where])),
        ("Shape", ", ".join(f"{value:,} {noun}" for value, noun in shape if value is not None)),
        ("Versions", ", ".join(f"{name} {text}" for name, text in results.versions.items())),
        ("Written", results.created),
        (
            "Runs",
            f"{results.finished_runs:,} of {results.planned_runs:,} finished, "
            f"{results.failed_runs:,} failed, {len(results.skipped):,} "
            f"{_noun(len(results.skipped), 'combination', 'combinations')} skipped",
        ),
        ("Generation", "" if results.seconds is None else f"{results.seconds:,.1f} s in all runs"),
    ]
    items = "".join(
        f"<dt>{name}</dt><dd>{visible_text(text or 'not recorded')}</dd>" for name, text in entries
    )
    command = (
        f'<pre class="command">{visible_text(results.command)}</pre>'
        if results.command
        else '<p class="small">Started from Python: no command line was recorded.</p>'
    )
    return f'<dl class="facts">{items}</dl>\n<h3 class="gap">Command</h3>\n{command}'


def _notices(results: Results) -> str:
    blocks = []
    if not results.complete:
        open_runs = results.planned_runs - results.finished_runs - results.failed_runs
        text = (
            f"Not complete: {open_runs:,} of {results.planned_runs:,} planned runs are still to "
            "come. Everything below is about the finished ones."
        )
        blocks.append(("notice", f"<p>{text}</p>"))
    failed = [
        f"{run.policy} on {run.task} at {run.context_tokens:,} tokens"
        + (f", case {run.case}" if run.case is not None else "")
        + f": {run.error}: {run.message}"
        for run in results.failed
    ]
    skipped = [f"{entry.policy}: {entry.reason}" for entry in results.skipped]
    if failed:
        blocks.append(("notice", _listing(failed, "failed run", "failed runs")))
    if skipped:
        listing = _listing(skipped, "skipped combination", "skipped combinations")
        blocks.append(("notice calm", listing))
    blocks += [("notice calm", f"<p>{visible_text(note)}</p>") for note in results.notes]
    return "\n".join(f'<div class="{kind}">{block}</div>' for kind, block in blocks)


def _listing(lines: Sequence[str], one: str, many: str) -> str:
    items = "".join(f"<li>{visible_text(line)}</li>" for line in lines[:_SHOWN])
    more = len(lines) - _SHOWN
    rest = f"<li>and {more:,} more in results.json</li>" if more > 0 else ""
    is_open = " open" if len(lines) <= 4 else ""
    title = f"{len(lines):,} {_noun(len(lines), one, many)}"
    return f"<details{is_open}><summary>{title}</summary><ul>{items}{rest}</ul></details>"


def _foot(results: Results) -> str:
    version = results.versions.get("sfi_agent", "")
    return (
        f"Written by sfi-agent {visible_text(version)}. Everything shown comes from results.json, "
        "traces/ and recall.json beside this file; runs/ holds every case. This page loads nothing "
        "from anywhere."
    )


def _noun(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _listed(items: Iterable[str]) -> str:
    words = list(items)
    if not words:
        return "no"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
