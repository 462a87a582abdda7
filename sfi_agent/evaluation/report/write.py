"""Writes the page beside the results it shows."""

from __future__ import annotations

import os
from pathlib import Path

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.report.folder import read_folder
from sfi_agent.evaluation.report.page import page_html
from sfi_agent.evaluation.report.page_data import Limits, page_data, trace_data

__all__ = ["write_report"]

PAGE = "report.html"


def write_report(directory: Path, *, limits: Limits | None = None) -> Path:
    """Make `report.html` from a results folder; a page that is there is replaced as a whole.

    The page is one file: no scripts, fonts or pictures from elsewhere. It takes its numbers from
    `results.json`, its token views from `traces/` and its heat map from `recall.json`; what is not
    there is shown as missing.

    Args:
        directory: The folder that an ablation wrote.
        limits: How much the page may carry of long histories; the defaults keep it under some
            20 MB for a dozen traces.

    Returns:
        Path of the page.

    Raises:
        InputError: The folder is missing, half-written, damaged or not an ablation's, or the page
            cannot be written there.
    """
    folder = read_folder(directory)
    text = page_html(
        folder.results, page_data(folder), trace_data(folder.traces, limits or Limits())
    )
    page = directory / PAGE
    try:
        _replace(page, text)
    except OSError as error:
        raise InputError(
            explain(
                f"Write the report to {page}",
                got=str(error),
                remedy="Make the folder writable and write the report again",
            )
        ) from error
    return page


def _replace(page: Path, text: str) -> None:
    part = page.with_name(f".{page.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(page)
    finally:
        part.unlink(missing_ok=True)
