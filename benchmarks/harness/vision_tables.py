# SPDX-License-Identifier: Apache-2.0
"""Tables of what was learned on images: with few of them, and by VAPT in other sizes."""

from __future__ import annotations

from .markdown import deviation, table
from .reading import NAMES, results

# By the name of a method: what it is, its prompts, the blocks whose prompts are static.
OF_VAPT = {
    **{f"vapt-{prompts}" if prompts != 10 else "vapt": ("VAPT", prompts, "1") for prompts in (5, 10, 20, 50)},
    **{f"vapt-static-{blocks}": ("VAPT", 10, str(blocks)) for blocks in (0, 2)},
    "vapt-official": ("VAPT, official recipe", 10, "1"),
    **{
        f"vpt-deep-{prompts}" if prompts != 10 else "vpt-deep": ("VPT-Deep", prompts, "all")
        for prompts in (5, 10, 20, 50)
    },
}


def low_data(name: str) -> str:
    """Accuracy by number of training images."""
    curves = results(name)["low_data"]
    numbers = sorted({int(number) for curve in curves.values() for number in curve})
    rows = [
        [NAMES.get(method, method)]
        + [f"{curve[str(n)]['mean']:.3f} {deviation(curve[str(n)]['sd'])}" if str(n) in curve else "" for n in numbers]
        for method, curve in curves.items()
    ]
    return table(["method", *(f"{number} images" for number in numbers)], rows)


def of_vapt(name: str) -> str:
    """VAPT and VPT-Deep in all their sizes, the best first."""
    found = {
        method: row for file in (name, f"{name}_vapt") for method, row in results(file).get("summary", {}).items()
    }
    rows = []
    for method, row in sorted(found.items(), key=lambda item: -item[1]["mean"]):
        if method in OF_VAPT:
            what, prompts, static = OF_VAPT[method]
            line = [what, str(prompts), static, f"{row['trainable']:,}"]
            rows.append([*line, f"{row['mean']:.3f}", deviation(row["sd"]), f"{row['lr']:g}"])
    headings = ["method", "prompts", "static blocks", "trained", "test accuracy", "over seeds", "rate"]
    return table(headings, rows)
