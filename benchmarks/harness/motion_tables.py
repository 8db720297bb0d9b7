# SPDX-License-Identifier: Apache-2.0
"""Tables of what is learned about motion and depth, from as many cells as there are."""

from __future__ import annotations

import statistics
from typing import Any

from .markdown import table
from .motion_methods import OWN, SHARED, TRANSFER
from .reading import NAMES, results

OWN_NAMES = {
    "bottleneck": "plain bottleneck adapter, blocks that are read",
    "bottleneck-all": "plain bottleneck adapter",
    "promotion": "ProMotion",
    "promotion-read": "ProMotion, blocks that are read",
    "lora": "LoRA r8, blocks that are read",
    "lora-all": "LoRA r8",
    "vapt": "VAPT, blocks that are read",
    "vapt-all": "VAPT",
    "vpt-deep": "VPT-Deep, blocks that are read",
    "vpt-deep-all": "VPT-Deep",
}
SCORES = {"flow": "epe", "depth": "abs_rel"}
SCALE_1 = "_scale_1"  # ends the name of what was run with `unit_scale=1`
# Whose groups are shown: of the unit, and without those parts that change them.
GROUPING = ("promotion", "promotion, not centred", "promotion, no margin loss", "promotion, no feedback")
NOISES = ("noise 5", "noise 10", "noise 25")
Cell = dict[str, Any]


def chosen(name: str, task: str) -> dict[str, tuple[int, list[Cell]]]:
    """By method, how many rates were tried with seed 0, and the cells of the one with the least development error.

    Methods that share a rate with another one have a single rate.
    """
    by_method: dict[str, dict[float, dict[int, Cell]]] = {}
    for cell in results(name).get("cells", {}).values():
        by_method.setdefault(cell["method"], {}).setdefault(cell["lr"], {})[cell["seed"]] = cell
    found = {}
    for method, rates in by_method.items():
        tried = {lr: seeds[0]["dev"][SCORES[task]] for lr, seeds in rates.items() if 0 in seeds}
        if tried:
            best = min(tried, key=lambda lr: tried[lr])
            found[method] = (len(tried), [rates[best][seed] for seed in sorted(rates[best])])
    return found


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def learning_motion(task: str) -> str:
    """Error of each method, the least first, with its spread over seeds; under image noise; and on real pairs."""
    score, found = SCORES[task], chosen(f"learning_motion_{task}", task)
    found = {method: cells for method, cells in found.items() if method not in TRANSFER}
    real = sorted({pair for _, cells in found.values() for cell in cells for pair in cell["real"]})
    headings = ["method", "seeds", "rates tried", "rate", "trained", "held-out pairs", "over seeds"]
    headings += [f"noise {noise.split()[1]}" for noise in NOISES] + real
    rows = []
    for method, (tried, cells) in sorted(found.items(), key=lambda each: _clean(each[1][1], score)):
        clean = [cell["test"][score] for cell in cells]
        shown = OWN_NAMES.get(method) or NAMES.get(method) or method.replace("promotion, ", "ProMotion, ")
        line = [shown, str(len(cells)), str(tried), f"{cells[0]['lr']:g}", f"{cells[0]['trainable']:,}", mean(clean)]
        line.append(f"± {statistics.stdev(clean):.3f}" if len(clean) > 1 else "")
        line += [mean([cell[noise][score] for cell in cells]) for noise in NOISES]
        line += [_real(cells, pair, score) for pair in real]
        rows.append(line)
    return table(headings, rows)


def unit_scale() -> str:
    """Error on the development pairs by place, scale and learning rate of ProMotion's units, on both tasks, seed 0."""
    found: dict[tuple[str, float, float], dict[str, str]] = {}
    for task, score in SCORES.items():
        for kind, scale in ((SCALE_1, 1.0), ("", 0.25)):
            for cell in results(f"learning_motion_{task}{kind}").get("cells", {}).values():
                if cell["method"] in ("promotion", "promotion-read") and cell["seed"] == 0:
                    place = "all" if cell["method"] == "promotion" else "that are read"
                    found.setdefault((place, scale, cell["lr"]), {})[task] = f"{cell['dev'][score]:.3f}"
    rows = [
        [place, f"{scale:g}", f"{lr:g}", *(scores.get(task, "") for task in SCORES)]
        for (place, scale, lr), scores in sorted(found.items())
    ]
    return table(["blocks with a unit", "`unit_scale`", "rate", "flow, px", "depth, AbsRel"], rows)


def motion_transfer() -> str:
    """Error on both tasks of units whose prototypes are trained, taken from the other task, or left as they start."""
    rows = []
    found = {task: chosen(f"learning_motion_{task}", task) for task in SCORES}
    for method in TRANSFER:
        shown = f"units behind blocks {', '.join(map(str, SHARED))}, trained" if method == OWN else method
        line = [shown]
        for task, score in SCORES.items():
            cells = found[task].get(method, (0, []))[1]
            clean = [cell["test"][score] for cell in cells]
            line += [mean(clean), f"± {statistics.stdev(clean):.3f}" if len(clean) > 1 else ""] if clean else ["", ""]
        rows.append(line)
    return table(["prototypes", "flow, px", "over seeds", "depth, AbsRel", "over seeds"], rows)


def motion_assignments() -> str:
    """How units group patches after training, by block: of ProMotion and of those parts left out that change it."""
    measures = {"entropy": "entropy of use", "margin": "margin", "nearest": "cosine to nearest", "between": "between"}
    rows = []
    for task in SCORES:
        found = chosen(f"learning_motion_{task}", task)
        for method in GROUPING:
            seen = [cell["assignment"] for cell in found.get(method, (0, []))[1]]
            if not seen:
                continue
            shown = OWN_NAMES.get(method, method.replace("promotion, ", "ProMotion, "))
            line = [f"{shown}, {task}"]
            for name in measures:
                by_block = zip(*(each[name] for each in seen), strict=True)
                line.append(" / ".join(f"{statistics.mean(values):.2f}" for values in by_block))
            rows.append(line)
    return table(["unit", *measures.values()], rows)


def _clean(cells: list[Cell], score: str) -> float:
    return statistics.mean(cell["test"][score] for cell in cells)


def _real(cells: list[Cell], pair: str, score: str) -> str:
    """A real depth is compared after median scaling, and its figures are called so."""
    values = [cell["real"][pair] for cell in cells if pair in cell["real"]]
    return mean([value.get(score, value.get(f"{score}_median_scaled")) for value in values]) if values else ""


def motion_levels() -> str:
    """What a frozen model knows of motion, block by block."""
    cells = results("motion_levels")["cells"]
    pairs = {"centred": "centred", "not centred": "not"}
    kinds = {"between": "cosine between", "margin": "margin", "entropy": "entropy"}
    rows = [
        [str(block), f"{error:.2f}"] + [f"{cells[name][kind][block]:.2f}" for kind in kinds for name in pairs]
        for block, error in enumerate(cells["matching"]["epe"])
    ]
    return table(
        ["block", "error of matching, px", *(f"{shown}, {of}" for shown in kinds.values() for of in pairs.values())],
        rows,
    )
