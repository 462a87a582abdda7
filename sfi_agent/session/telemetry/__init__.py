"""Spans of what sessions do."""
