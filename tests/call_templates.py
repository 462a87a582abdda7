"""Chat templates in the manner of families whose call formats need one, for the tests of this
project. They show how a call is written and little else; none is that of a published checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CALL_TEMPLATES", "CallTemplate"]

_FRAME = """\
{{%- for tool in tools or [] -%}}{{{{ tool | tojson }}}}{{%- endfor -%}}
{{%- for message in messages -%}}
<|im_start|>{{{{ message.role }}}}
{{{{ message.content or '' }}}}
{{%- if message.tool_calls -%}}
{calls}
{{%- endif -%}}
<|im_end|>
{{% endfor -%}}
{{%- if add_generation_prompt -%}}
<|im_start|>assistant
{{% endif -%}}
"""


@dataclass(frozen=True)
class CallTemplate:
    """A template and what its tokenizer needs.

    Attributes:
        source: The template.
        call_format: What is to be found in it.
        special: Special tokens.
        markup: Added tokens that are not special.
        typed: Whether values are written with their types (JSON), so that no schema is needed.
    """

    source: str
    call_format: str
    special: tuple[str, ...] = ()
    markup: tuple[str, ...] = ()
    typed: bool = True


def _template(calls: str, call_format: str, *special: str, typed: bool = True) -> CallTemplate:
    return CallTemplate(_FRAME.format(calls=calls), call_format, special, typed=typed)


CALL_TEMPLATES: dict[str, CallTemplate] = {
    "kimi": _template(
        "<|tool_calls_section_begin|>"
        "{%- for call in message.tool_calls -%}"
        "<|tool_call_begin|>functions.{{ call.function.name }}:{{ loop.index0 }}"
        "<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>"
        "{%- endfor -%}<|tool_calls_section_end|>",
        "kimi",
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    "deepseek 3.1": _template(
        "<｜tool▁calls▁begin｜>"
        "{%- for call in message.tool_calls -%}"
        "<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>"
        "{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>"
        "{%- endfor -%}<｜tool▁calls▁end｜>",
        "deepseek",
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    "deepseek 3.2": _template(
        "<｜DSML｜function_calls>\n"
        "{%- for call in message.tool_calls %}\n"
        '<｜DSML｜invoke name="{{ call.function.name }}">\n'
        "{%- for key, value in call.function.arguments.items() %}\n"
        '<｜DSML｜parameter name="{{ key }}" string="{{ value is string | string | lower }}">'
        "{{ value if value is string else value | tojson }}</｜DSML｜parameter>"
        "{%- endfor %}\n</｜DSML｜invoke>"
        "{%- endfor %}\n</｜DSML｜function_calls>",
        "invoke",
    ),
    "minimax": _template(
        "<minimax:tool_call>"
        "{%- for call in message.tool_calls %}\n"
        '<invoke name="{{ call.function.name }}">'
        "{%- for key, value in call.function.arguments.items() %}\n"
        '<parameter name="{{ key }}">{{ value if value is string else value | tojson }}</parameter>'
        "{%- endfor %}\n</invoke>"
        "{%- endfor %}\n</minimax:tool_call>",
        "invoke",
        typed=False,
    ),
    "cohere with tools": _template(
        "<|START_ACTION|>[\n"
        "{%- for call in message.tool_calls %}\n"
        '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.function.name }}", '
        '"parameters": {{ call.function.arguments | tojson }}}{{ "," if not loop.last }}'
        "{%- endfor %}\n]<|END_ACTION|>",
        "cohere",
        *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    "mistral, named": _template(
        "{%- for call in message.tool_calls -%}"
        "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
        "{%- endfor -%}",
        "mistral",
        *("[TOOL_CALLS]", "[ARGS]"),
    ),
    "mistral, list": _template(
        "[TOOL_CALLS][{%- for call in message.tool_calls -%}"
        '{"name": "{{ call.function.name }}", "arguments": '
        '{{ call.function.arguments | tojson }}}{{ ", " if not loop.last }}'
        "{%- endfor -%}]",
        "mistral",
        "[TOOL_CALLS]",
    ),
    "braces": _template(
        "{%- macro written(value) -%}"
        '{%- if value is string -%}<|"|>{{ value }}<|"|>'
        "{%- elif value is mapping -%}{{ '{' }}"
        "{%- for key, item in value | dictsort -%}"
        "{{ key }}:{{ written(item) }}{{ ',' if not loop.last }}{%- endfor -%}{{ '}' }}"
        "{%- elif value is iterable -%}["
        "{%- for item in value -%}{{ written(item) }}{{ ',' if not loop.last }}{%- endfor -%}]"
        "{%- else -%}{{ value | tojson }}{%- endif -%}"
        "{%- endmacro -%}"
        "{%- for call in message.tool_calls -%}"
        "<|tool_call>call:{{ call.function.name }}{{ written(call.function.arguments) }}"
        "<tool_call|>{%- endfor -%}",
        "gemma",
        *("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    "Python": _template(
        "<|tool_call_start|>["
        "{%- for call in message.tool_calls -%}{{ call.function.name }}("
        "{%- for key, value in call.function.arguments.items() -%}"
        "{{ key }}={{ value | tojson }}{{ ', ' if not loop.last }}{%- endfor -%}"
        "){{ ', ' if not loop.last }}{%- endfor -%}]<|tool_call_end|>",
        "pythonic",
        *("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "JSON behind a tag": _template(
        "<|tool_call|>[{%- for call in message.tool_calls -%}"
        '{"name": "{{ call.function.name }}", "arguments": '
        '{{ call.function.arguments | tojson }}}{{ ", " if not loop.last }}'
        "{%- endfor -%}]",
        "tagged_json",
        "<|tool_call|>",
    ),
    "JSON between tags": _template(
        "{%- for call in message.tool_calls -%}"
        '<function_call>{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}</function_call>"
        "{%- endfor -%}",
        "tagged_json",
    ),
}
"""By a name for the test reports."""
