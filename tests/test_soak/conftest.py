"""How long the soak test is.

pytest tests/test_soak --soak-operations=5000
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["SUMMARY", "pytest_addoption", "pytest_terminal_summary"]

SUMMARY = "soak_summary"
"""Name of the property in which a test says what it did."""
DEFAULT_OPERATIONS = 240


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-operations",
        type=int,
        default=DEFAULT_OPERATIONS,
        metavar="N",
        help="operations of the soak test of sessions, all models together; "
        f"{DEFAULT_OPERATIONS} by default, for which runs are short",
    )
    parser.addoption(
        "--soak-seed",
        type=int,
        default=0,
        metavar="N",
        help="where the soak test begins to draw operations; 0 by default",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was done, once somebody asked for more than the default."""
    if config.getoption("soak_operations") <= DEFAULT_OPERATIONS:
        return
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == SUMMARY:
                terminalreporter.write_line(value)
