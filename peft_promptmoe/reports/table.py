# SPDX-License-Identifier: Apache-2.0
"""HTML tables of the reports, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


class Share(float):
    """A number from 0 to 1, shown with a bar of this length behind it."""


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Make an HTML table. Floats get three digits, and a `Share` gets a bar behind it.

    Args:
        caption: text above the table.
        columns: headings of the columns.
        rows: values, one per column. None: an empty cell.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    above = f'<caption style="caption-side: top; text-align: left">{escape(caption)}</caption>'
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, Share):
        full = round(100 * min(max(value, 0.0), 1.0))
        # Half transparent, so that the text is readable on light and dark pages.
        bar = f"linear-gradient(90deg, rgba(33, 145, 140, 0.5) {full}%, transparent {full}%)"
        return f'<td style="text-align: right; background: {bar}">{value:.3f}</td>'
    if isinstance(value, float):
        return f'<td style="text-align: right">{value:.3f}</td>'
    if isinstance(value, int):
        return f'<td style="text-align: right">{value:,}</td>'
    return f'<td style="text-align: left">{escape(str(value if value is not None else ""))}</td>'
