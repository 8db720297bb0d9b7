# SPDX-License-Identifier: Apache-2.0
"""The figures in the READMEs are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_made_from_the_results() -> None:
    for readme, table in (("README.md", "front"), ("benchmarks/README.md", "learning_text")):
        assert re.search(rf"<!-- table: {table} -->\n\| ", (ROOT / readme).read_text(encoding="utf-8"))
    script = ROOT / "benchmarks" / "readme_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
