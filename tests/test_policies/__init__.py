"""Tests of the built-in boundary detectors."""
