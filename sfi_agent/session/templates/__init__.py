"""Chat templates: rendering, continuing a chat without rendering it again, and reports."""
