# SPDX-License-Identifier: Apache-2.0
"""Run the Python blocks of pages, each page from top to bottom in a folder of its own; a process apart for the tests.

python run_pages.py RESULTS PAGE...    # writes {page: error or null} to RESULTS
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

import torch

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page: Path) -> str | None:
    """The error that a page ends in, with the block that raised it; None if all of it runs."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, code in enumerate(blocks(page), start=1):
            try:
                exec(compile(code, f"{page.name}, block {number}", "exec"), names)
            except Exception:
                return f"{code}\n{traceback.format_exc()}"
    return None


def run_all(results: Path, pages: list[Path]) -> None:
    found = {str(page): run(page) for page in pages}
    results.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]), [Path(page).resolve() for page in sys.argv[2:]])
