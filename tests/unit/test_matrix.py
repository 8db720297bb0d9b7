# SPDX-License-Identifier: Apache-2.0
"""The matrix of the contract and the list of seeded faults are those of the tests there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matrix import page
from rows import COLUMNS, HEAD_COLUMNS, HEAD_ROWS, ROWS

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import FAULTS

ROOT = Path(__file__).parents[2]
ALL = {(row.number, str(column)): [("passed", False)] for row in ROWS for column in COLUMNS}
ALL |= {(number, str(column)): [("passed", False)] for number in HEAD_ROWS for column in HEAD_COLUMNS}


def test_the_committed_matrix_is_that_of_the_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["--matrix", str(tmp_path / "matrix.md"), "tests/contract", "tests/parity"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    committed = (ROOT / "CONTRACT.md").read_text(encoding="utf-8")
    assert committed == (tmp_path / "matrix.md").read_text(encoding="utf-8"), "run `make matrix`"
    assert "**" not in committed


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
    text = page(ALL | {(2, "VAPT deit"): outcomes})
    line = next(line for line in text.split("## VAPT")[1].splitlines() if line.startswith("| 2. "))
    column = text.split("## VAPT")[1].splitlines()[2].split(" | ").index("deit")
    assert line.removesuffix(" |").split(" | ")[column] == says
    assert ("0 fail" in text) == ("**" not in says)


def test_every_seeded_fault_still_fits_and_was_caught() -> None:
    rows = [line.split(" | ") for line in (ROOT / "tests" / "FAULTS.md").read_text(encoding="utf-8").splitlines()[6:]]
    assert [row[0].removeprefix("| ") for row in rows] == [fault.name for fault in FAULTS]
    for row, fault in zip(rows, FAULTS, strict=True):
        test, _, function = row[2].removesuffix(" |").strip("`").partition("::")
        assert f"def {function.split('[')[0]}(" in (ROOT / test).read_text(encoding="utf-8"), fault.name
        text = (ROOT / "peft_promptmoe" / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.right) == 1, f"{fault.name}: fit tests/faults.py to the code and run `make faults`"
