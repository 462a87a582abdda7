"""Takes the pictures of docs/pictures from the page of a results folder.

python -m tests.test_evaluation.report_pictures RESULTS [--policy NAME]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from sfi_agent.evaluation.report import write_report
from tests.source_tree import ROOT
from tests.test_evaluation.browser import open_browser

PICTURES = ROOT / "docs" / "pictures"
WIDTH, HEIGHT = 880, 1400
PARTS = {
    "report_accuracy.png": ("#accuracy", False),
    "report_selection.png": ("#history", False),
}
"""File name, part of the page, whether in dark colours."""


def main() -> None:
    """Write the page anew and picture its parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.test_evaluation.report_pictures")
    parser.add_argument("results", type=Path, help="folder of an ablation")
    parser.add_argument("--policy", default="", help="policy whose run is shown")
    options = parser.parse_args()
    page = write_report(options.results).resolve().as_uri()
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        for name, (part, dark) in PARTS.items():
            state = urlencode({"policy": options.policy}) if options.policy else ""
            browser.show(f"{page}#{state}", width=WIDTH, height=HEIGHT, dark=dark)
            (PICTURES / name).write_bytes(browser.picture(part, small=True))
            print(f"{PICTURES / name}: {(PICTURES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
