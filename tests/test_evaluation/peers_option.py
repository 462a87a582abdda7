"""A pytest plugin with the option that turns the tests with the real kvpress on.

pytest -p tests.test_evaluation.peers_option --kvpress-python DIR/bin/python
"""

from __future__ import annotations

import pytest

__all__ = ["pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kvpress-python",
        help="Python of an environment made with python -m sfi_agent.evaluation.peers "
        "--make-environment DIR",
    )
