"""Measurements: benchmarks of steps and evaluation of policies."""
