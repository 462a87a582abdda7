"""How tool calls are decoded: exactly, and held to their format and schemas."""
