# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that writes the matrix of the contract from the run: `pytest ... --matrix CONTRACT.md`.

A cell says how many tests hold it. With `--collect-only` the matrix says what a run would find if all were green.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from rows import COLUMNS, HEAD_COLUMNS, HEAD_ROWS, METHOD_NAMES, ROWS, Cell, Column, Row, cells_of

PROPERTY = "contract"
CANNOT = "-"
Found = dict[tuple[int, str], list[tuple[str, bool]]]  # outcomes by row and column, and whether by a refusal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the matrix of the contract to this file")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--matrix")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(Path(file), collect_only=config.getoption("--collect-only")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        function = getattr(item, "originalname", None)
        if callspec is not None and function is not None:
            cells = cells_of(item.path.stem, function, callspec.params)
            if cells:
                item.user_properties.append((PROPERTY, [tuple(cell) for cell in cells]))  # workers send plain tuples


class Matrix:
    """Collects outcomes by row and column, and writes them when all is done."""

    def __init__(self, file: Path, collect_only: bool = False) -> None:
        self.file, self.collect_only = file, collect_only
        self.found: Found = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items if self.collect_only else ():
            self._take(item.user_properties, "passed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self._take(report.user_properties, report.outcome)

    def _take(self, properties: list[tuple[str, Any]], outcome: str) -> None:
        for name, cells in properties:
            for found in cells if name == PROPERTY else ():
                cell = Cell(*found)
                self.found[cell.row, cell.column].append((outcome, cell.refused))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.file.write_text(page(self.found), encoding="utf-8")


def cell(row: Row, column: Column, found: Found) -> str:
    """What a cell says: the number of tests that hold it, or why there are none."""
    outcomes = found.get((row.number, str(column)), [])
    for outcome, says in (("failed", "**fails**"), ("skipped", "**skipped**")):
        if any(found == outcome for found, _ in outcomes):
            return says
    if outcomes:
        return f"{'R' if all(refused for _, refused in outcomes) else ''}{len(outcomes)}"
    return CANNOT if row.exempt(column) else "**empty**"


def page(found: Found) -> str:
    """The whole file."""
    cells = {(row.number, column): cell(row, column, found) for row in ROWS for column in COLUMNS}
    head_rows = [row for row in ROWS if row.number in HEAD_ROWS]
    cells |= {(row.number, column): cell(row, column, found) for row in head_rows for column in HEAD_COLUMNS}
    shown = list(cells.values())
    refusals, exempt = sum(each.startswith("R") for each in shown), shown.count(CANNOT)
    green = sum(each.isdigit() for each in shown)
    tests = sum(len(outcomes) for outcomes in found.values())
    lines = [
        "# The contract",
        "",
        "What the package guarantees, for each method on each architecture. A number says how many tests check the",
        "guarantee of its row on the architecture of its column. With R, these tests check that one clear error is",
        "raised. A dash means that the guarantee does not apply; the reasons are at the end.",
        "",
        f"{len(shown)} cells: {green} pass, {refusals} assert a refusal (R), {exempt} do not apply (-), "
        f"{len(shown) - green - refusals - exempt} fail, are skipped or are empty. {tests:,} tests.",
        "",
        "`make matrix` runs the tests and writes this page. The tests of each row are named in",
        "[rows.py](tests/contract/rows.py), the architectures in [cases.py](tests/contract/cases.py).",
    ]
    for method, name in METHOD_NAMES.items():
        columns = [column for column in COLUMNS if column.method == method]
        lines += _table(name, [str(column).removeprefix(f"{name} ") for column in columns], columns, ROWS, cells)
    lines += _table(
        "Heads of several layers", [str(column) for column in HEAD_COLUMNS], HEAD_COLUMNS, head_rows, cells
    )
    reasons = sorted({(row.number, reason) for row in ROWS for column in COLUMNS if (reason := row.exempt(column))})
    lines += ["", "## Why some guarantees do not apply", ""]
    lines += [f"- Row {number}: {reason}." for number, reason in reasons]
    return "\n".join(lines) + "\n"


def _table(
    title: str, names: list[str], columns: list[Column], rows: list[Row], cells: dict[tuple[int, Column], str]
) -> list[str]:
    lines = ["", f"## {title}", "", f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in rows:
        values = " | ".join(cells[row.number, column] for column in columns)
        lines.append(f"| {row.number}. {row.behaviour} | {values} |")
    return lines
