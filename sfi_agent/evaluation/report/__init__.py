"""One self-contained HTML page from the results folder of an ablation."""

from __future__ import annotations

from sfi_agent.evaluation.report.write import write_report

__all__ = ["write_report"]
