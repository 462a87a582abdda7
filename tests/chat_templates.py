"""Chat templates in the manner of known model families, written for the tests of this project.

Each shows one habit of its family that matters for appending to a history; none is the template
of a published checkpoint.
"""

from __future__ import annotations

_TOOLS_IN_SYSTEM = """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif -%}
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
"""

_HERMES_CALLS = """\
{%- for call in message.tool_calls or [] -%}
{{ '\\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
"""

_HERMES_RESULT = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
<|im_start|>user
{%- endif -%}
{{ '\\n' }}<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
<|im_end|>
{% endif -%}
"""

CHATML = (
    _TOOLS_IN_SYSTEM
    + """\
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ message.content or '' }}"""
    + _HERMES_CALLS
    + """\
<|im_end|>
{% elif message.role == 'tool' -%}
"""
    + _HERMES_RESULT
    + """\
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
)
"""ChatML with Hermes tool calls, in the manner of Qwen2.5: nothing depends on what follows."""

CHATML_THINKING = (
    _TOOLS_IN_SYSTEM
    + """\
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{% if loop.index0 > last.user and (loop.last or message.reasoning_content) -%}
<think>
{{ message.reasoning_content or '' }}
</think>

{% endif -%}
{{ message.content or '' }}"""
    + _HERMES_CALLS
    + """\
<|im_end|>
{% elif message.role == 'tool' -%}
"""
    + _HERMES_RESULT
    + """\
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
)
"""In the manner of Qwen3: thoughts before the last user message are dropped, so history changes."""

LLAMA = """\
{{- bos_token -}}
{%- set first = namespace(user=true) -%}
{%- for message in messages -%}
{%- if message.role == 'user' and tools and first.user -%}
{%- set first.user = false -%}
<|start_header_id|>user<|end_header_id|>

Functions you may call, as {"name": ..., "parameters": ...}:
{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}
{{ message.content | trim }}<|eot_id|>
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}
{{ raise_exception('only one call per turn') }}
{%- endif -%}
{%- set function = message.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ function.name }}", "parameters": {{ function.arguments | tojson }}}<|eot_id|>
{%- elif message.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
"""In the manner of Llama 3.1: a call hides the text, tools stand in the first user message."""

LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)

MISTRAL = """\
{{- bos_token -}}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]
{%- elif message.role == 'user' -%}
{%- if tools and message == users[-1] -%}
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls -%}
{{ message.content or '' }}[TOOL_CALLS][
{%- for call in message.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('ids have 9 characters') }}{%- endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, \
"id": "{{ call.id }}"}{{ ', ' if not loop.last }}
{%- endfor -%}
]</s>
{%- elif message.role == 'tool' -%}
[TOOL_RESULTS]{"content": {{ message.content | tojson }}, \
"call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else -%}
{{ message.content }}</s>
{%- endif -%}
{%- endfor -%}
"""
"""In the manner of Mistral: the generation prompt is empty and call ids have nine characters."""

MISTRAL_SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- elif (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate user/assistant/user') }}
{%- endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}
<start_of_turn>model
{% endif -%}
"""
"""In the manner of Gemma: no system role, no tools, strict alternation."""

GEMMA_SPECIAL_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>")

DROPS_TOOL_MESSAGES = """\
{%- for tool in tools or [] -%}
{{ tool | tojson }}
{% endfor -%}
{%- for message in messages -%}
{%- if message.role in ['system', 'user', 'assistant'] -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""Renders tools but leaves tool results out without a word."""

CHANGES_THE_STOP = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- if loop.last and message.role == 'assistant' -%}<|endoftext|>{%- else -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""In the manner of gpt-oss: the model ends its turn with another token than history has there."""

CHANGES_THE_CLOSE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- if loop.last and message.role == 'assistant' -%}{{ '\\n' }}<|endoftext|>
{%- else -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""Ends the last assistant message otherwise than an earlier one."""

ARGUMENTS_AS_TEXT = """\
{%- for tool in tools or [] -%}
{{ tool.function.name }}
{%- endfor -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ call.function.name + '(' + call.function.arguments + ')' }}</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""In the manner of DeepSeek: call arguments must be JSON text, a mapping raises."""

ROLE_OPENS_NEXT_TURN = """\
[gMASK]
{%- for tool in tools or [] -%}
{{ '\\n' }}{{ tool | tojson }}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
{{ '\\n' }}<tool_response>{{ message.content }}</tool_response>
{%- else -%}
<|{{ message.role }}|>
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{ '\\n' }}<tool_call>{"name": "{{ call.function.name }}", \
"arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""
"""In the manner of GLM: no end-of-turn token; the model stops on the next role token."""

ROLE_SPECIAL_TOKENS = ("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

NO_CONTROL_TOKENS = """\
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}
assistant:
{%- endif -%}
"""
"""Plain text without a single control token: neighbours could merge, so nothing is provable."""
