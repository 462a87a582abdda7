"""Chat templates with habits that make continuing a conversation hard, written for the tests.

Each is ChatML with one oddity, so that a failure names what was not seen.
"""

from __future__ import annotations

__all__ = ["ODD", "ODD_SPECIAL_TOKENS", "chatml"]

ODD_SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|tool|>", "<|system|>")

_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
_CALLS = """{%- for call in m.tool_calls or [] -%}
{{ '\\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{%- endfor -%}"""
_SYSTEM = "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"


def chatml(
    content: str = "{{ m.content }}",
    *,
    head: str = "<|im_start|>{{ m.role }}\n",
    close: str = "<|im_end|>\n",
    before: str = "",
    tools: str = _TOOLS,
    each: str = "",
    mark: str = "",
    opening: str = "<|im_start|>assistant\n",
) -> str:
    """ChatML with Hermes calls, some part of it changed.

    Args:
        content: How a message's text is written.
        head: What stands before it.
        close: What stands behind it.
        before: At the very beginning.
        tools: How tools are described.
        each: Statements at the beginning of every message.
        mark: Text in front of a message's text.
        opening: How the model's turn begins.
    """
    loop = f"{{% for m in messages %}}{each}{head}{mark}{content}{_CALLS}{close}{{% endfor %}}"
    return f"{before}{tools}{loop}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


def _remembers(name: str, when: str, value: str) -> dict[str, str]:
    """Statements that keep something of a message for later."""
    return {
        "before": f"{{% set ns = namespace({name}='') %}}",
        "each": f"{{% if {when} %}}{{% set ns.{name} = {value} %}}{{% endif %}}",
    }


_NO_SYSTEM = {"each": "{% if m.role != 'system' %}", "close": "<|im_end|>\n{% endif %}"}
_ROLES = "<|{{ m.role }}|>\n"

ODD: dict[str, str] = {
    "trims": chatml("{{ m.content | trim }}"),
    "writes the date": chatml(before="Today: {{ strftime_now('%d %B %Y') }}\n"),
    "dates user messages": chatml(mark="{{ strftime_now('[%Y] ') if m.role == 'user' }}"),
    "counts messages": chatml(head="<|im_start|>{{ m.role }} {{ loop.index }}\n"),
    "marks even messages": chatml(mark="{{ 'even ' if loop.index0 % 2 }}"),
    "counts users": chatml(
        before="{% set ns = namespace(n=0) %}",
        each="{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endif %}",
        mark="{{ ns.n }} ",
    ),
    "counts at the end": chatml(opening="<|im_start|>assistant {{ messages | length }}\n"),
    "marks the last message": chatml(mark="{{ 'now: ' if loop.last }}"),
    "no line break behind the last": chatml(
        close="<|im_end|>{{ '\n' if not loop.last }}", opening="{{ '\n' }}<|im_start|>assistant\n"
    ),
    "system in the first question": chatml(
        before=_SYSTEM,
        **_NO_SYSTEM,
        mark="{{ sys + '\n\n' if loop.index0 < 2 and m.role == 'user' }}",
    ),
    "system in the last question": chatml(
        before=_SYSTEM, **_NO_SYSTEM, mark="{{ sys + '\n\n' if loop.last and m.role == 'user' }}"
    ),
    "tools in the last question": chatml(
        tools="{% set users = messages | selectattr('role', 'equalto', 'user') | list %}",
        mark="{{ tools | tojson(indent=2) if tools and m == users[-1] }}",
    ),
    "merges roles": chatml(
        before="{% set ns = namespace(role='') %}",
        head="{% if m.role == ns.role %}\n\n{% else %}{{ '<|im_end|>\n' if ns.role }}"
        "<|im_start|>{{ m.role }}\n{% endif %}{% set ns.role = m.role %}",
        close="",
        opening="<|im_end|>\n<|im_start|>assistant\n",
    ),
    "opens thoughts": chatml(opening="<|im_start|>assistant\n<think>\n"),
    "shows thoughts of the last": chatml(
        mark="{% if m.reasoning_content and loop.last %}"
        "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    ),
    "empty thoughts everywhere": chatml(
        mark="{% if m.role == 'assistant' %}"
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    ),
    "no generation prompt": chatml(opening=""),
    "refuses two in a row": chatml(
        before="{% set ns = namespace(n=0) %}",
        each="{% if m.role in ['user', 'assistant'] and not m.tool_calls %}"
        "{% if (m.role == 'user') != (ns.n % 2 == 0) %}"
        "{{ raise_exception('alternate') }}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endif %}",
    ),
    "a switch in the first message": chatml(
        opening="<|im_start|>assistant\n{{ 'short: ' if '/short' in messages[0].content }}"
    ),
    "a switch in any message": chatml(
        **_remembers("on", "'/short' in m.content", "'short: '"),
        opening="<|im_start|>assistant\n{{ ns.on }}",
    ),
    "says the task again": chatml(
        opening="<|im_start|>system\nTask: {{ messages[0].content }}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "says the question again": chatml(
        **_remembers("said", "m.role == 'user'", "m.content"),
        opening="<|im_start|>system\nNow: {{ ns.said }}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "says the answer again": chatml(
        **_remembers("said", "m.role == 'assistant'", "m.content"),
        opening="<|im_start|>system\nYou: {{ ns.said }}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "says the call again": chatml(
        **_remembers("said", "m.tool_calls", "m.tool_calls[0].function.arguments | tojson"),
        mark="{{ 'for ' + ns.said if m.role == 'tool' }}",
    ),
    "names results": chatml(mark="{{ m.name + ': ' if m.role == 'tool' }}"),
    "no stop token": chatml(head=_ROLES, close="", opening="<|assistant|>\n"),
    "a line break instead of a stop token": chatml(
        head=_ROLES, close="{{ '\n' }}", opening="<|assistant|>\n"
    ),
    "stop tokens behind answers only": chatml(
        head=_ROLES,
        close="{{ '<|im_end|>' if m.role == 'assistant' }}\n",
        opening="<|assistant|>\n",
    ),
    "a line break before the close": chatml(close="{{ '\n' }}<|im_end|>\n"),
    "wraps answers": chatml(
        "{{ '<a>' + m.content + '</a>' if m.role == 'assistant' else m.content }}"
    ),
    "forgets old results": chatml(
        before="{% set last = messages | length - 5 %}",
        content="{{ m.content if m.role != 'tool' or loop.index0 > last else '(gone)' }}",
    ),
    "wants a system message": chatml(
        before="{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    ),
    "a system message of its own": chatml(
        before="{% if messages[0].role != 'system' %}"
        "<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}"
    ),
    "joins lines": chatml("{{ m.content | replace('\n', ' ') }}"),
    "capitals": chatml("{{ m.content | capitalize }}"),
    "cuts texts": chatml("{{ m.content[:20] }}"),
    "a start token at every question": chatml(mark="{{ '<|endoftext|>' if m.role == 'user' }}"),
}
"""Templates by their habit."""
