# SPDX-License-Identifier: Apache-2.0
"""What the size of rows at the start does to what is learnt, on development splits."""

from .markdown import table
from .reading import NAMES, results


def start_table() -> str:
    """One line for each task, method and seed, one column for each size and rate."""
    cells = results("start_scale")["cells"].values()
    columns = sorted({(cell["start_scale"], cell["lr"]) for cell in cells})
    rows: dict[tuple[str, str, int], dict[tuple[str, float], float]] = {}
    for cell in cells:
        line = rows.setdefault((cell["task"], cell["method"], cell["seed"]), {})
        line[cell["start_scale"], cell["lr"]] = cell["accuracy"]
    lines = [
        [task, NAMES[method], str(seed), *(f"{found[each]:.3f}" if each in found else "" for each in columns)]
        for (task, method, seed), found in sorted(rows.items())
    ]
    return table(["task", "method", "seed", *(f"`{scale}`, {lr:g}" for scale, lr in columns)], lines)
