"""The browser that pages are looked at in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.test_evaluation.browser import Browser, open_browser


@pytest.fixture(scope="module")
def open_window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the tests of a module."""
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def browser(open_window: Browser) -> Iterator[Browser]:
    """The browser; a test ends without a complaint of it and without a request elsewhere."""
    open_window.complaints.clear()
    open_window.requests.clear()
    yield open_window
    assert open_window.complaints == []
    elsewhere = [
        address for address in open_window.requests if not address.startswith(("file:", "data:"))
    ]
    assert [address for address in elsewhere if address != "about:blank"] == []
