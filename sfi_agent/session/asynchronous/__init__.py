"""Calls from event loops: one thread takes the steps of all, readers get their events."""
