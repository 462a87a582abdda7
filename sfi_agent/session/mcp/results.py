"""Results of MCP tools as the text that a model reads.

Content is taken by its `type`, so that nothing here needs the mcp package. What a text model cannot
read (images, audio, binary resources) is named with its kind and size, never left out.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["result_text"]

_NOTHING = "(The tool returned nothing.)"


def result_text(result: Any) -> str:
    """The text of a `CallToolResult`.

    Text parts come as they are, one per line, with the other parts in words between them.
    Structured content is given as JSON where there is no text; servers repeat it there otherwise.
    """
    parts = [_in_words(block) for block in result.content]
    has_text = any(getattr(block, "type", "") == "text" and block.text for block in result.content)
    if not has_text and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(part for part in parts if part) or _NOTHING


def _in_words(block: Any) -> str:
    kind = getattr(block, "type", type(block).__name__)
    if kind == "text":
        return str(block.text)
    if kind in ("image", "audio"):
        return f"[{kind}, {block.mime_type}, {_byte_count(block.data)} bytes: not shown]"
    if kind == "resource_link":
        details = [block.mime_type, f"{block.size} bytes" if block.size is not None else None]
        words = ", ".join(item for item in (f"link to {block.name}", *details) if item)
        more = f": {block.description}" if block.description else ""
        return f"[{words}, {block.uri}{more}]"
    if kind == "resource":
        return _resource_in_words(block.resource)
    return f"[content of the unknown kind {kind!r}: not shown]"


def _resource_in_words(resource: Any) -> str:
    head = ", ".join(item for item in ("resource", resource.mime_type, str(resource.uri)) if item)
    text = getattr(resource, "text", None)
    if text is not None:
        return f"[{head}]\n{text}"
    return f"[{head}, {_byte_count(resource.blob)} bytes: not shown]"


def _byte_count(base64_text: str) -> int:
    """How many bytes a base64 text stands for."""
    digits = base64_text.rstrip("=\r\n")
    return len(digits) * 3 // 4
