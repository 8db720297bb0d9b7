# SPDX-License-Identifier: Apache-2.0
"""The committed matrix of the contract is that of the tests there are, and a cell says what went wrong in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import page
from rows import COLUMNS, ROWS

ROOT = Path(__file__).parents[2]
RUN = re.compile(r"\nThis run took \d+ minutes?\.\n")
ALL = {(row.number, str(column)): [("passed", False)] for row in ROWS for column in COLUMNS}
COUNTS = re.compile(r"(\d+) cells: (\d+) green, (\d+) refusals .*?(\d+) that cannot be .*?([\d,]+) tests\.", re.DOTALL)


def test_the_committed_matrix_is_that_of_the_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["--matrix", str(tmp_path / "matrix.md"), "tests/contract", "tests/parity"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    committed = (ROOT / "CONTRACT.md").read_text(encoding="utf-8")
    assert RUN.sub("", committed) == (tmp_path / "matrix.md").read_text(encoding="utf-8"), "run `make matrix`"
    assert "**" not in committed


def test_the_readme_says_what_the_matrix_says() -> None:
    said, found = (COUNTS.search((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "CONTRACT.md"))
    assert said is not None and found is not None and said.groups() == found.groups()


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ([("passed", False), ("failed", False)], "**fails**"),
        ([("passed", False), ("skipped", False)], "**skipped**"),
        ([], "**empty**"),
        ([("passed", True), ("passed", True)], "R2"),
        ([("passed", False), ("passed", True)], "2"),
    ],
)
def test_a_cell_says_how_it_went(outcomes: list[tuple[str, bool]], says: str) -> None:
    text = page(ALL | {(2, "VAPT deit"): outcomes}, None)
    line = next(line for line in text.split("## VAPT")[1].splitlines() if line.startswith("| 2. "))
    column = text.split("## VAPT")[1].splitlines()[2].split(" | ").index("deit")
    assert line.removesuffix(" |").split(" | ")[column] == says
    assert ("0 that fail" in text) == ("**" not in says)
