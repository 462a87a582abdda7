"""Contract tests for plugins: what the built-ins keep, third parties can check with one call.

Importing this package does not import torch; the selector checks do when they run.
"""

from __future__ import annotations

from sfi_agent.testing.detector_contract import check_detector
from sfi_agent.testing.evidence import make_evidence
from sfi_agent.testing.selector_contract import check_selector

__all__ = ["check_detector", "check_selector", "make_evidence"]
