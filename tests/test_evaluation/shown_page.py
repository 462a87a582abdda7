"""A written page for tests in a browser: where it is, what it was made from, what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from sfi_agent.evaluation.report import write_report
from tests.test_evaluation.browser import Browser

__all__ = ["Page", "click", "count", "texts"]


class Page:
    """A written page and the data it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = write_report(folder)
        self.results = self.read("results.json")
        self.policies = [policy["name"] for policy in self.results["policies"]]

    def read(self, name: str) -> Any:
        """One file of the folder."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def address(self, **state: Any) -> str:
        """Where the page is found with a state chosen."""
        return f"file://{quote(str(self.file))}#{urlencode(state)}"


def count(browser: Browser, selector: str) -> int:
    """How many elements match."""
    found: int = browser.value(f"document.querySelectorAll({json.dumps(selector)}).length")
    return found


def texts(browser: Browser, selector: str) -> list[str]:
    """The texts of all elements that match."""
    found: list[str] = browser.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)"
    )
    return found


def click(browser: Browser, selector: str) -> None:
    """Click an element, by its own handler."""
    browser.value(
        f"document.querySelector({json.dumps(selector)})"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
