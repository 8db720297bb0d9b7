# SPDX-License-Identifier: Apache-2.0
"""Tables as markdown."""

from __future__ import annotations


def table(headings: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def deviation(value: float | None) -> str:
    """A standard deviation; empty where there is none."""
    return "" if value is None else f"± {value:.3f}"
