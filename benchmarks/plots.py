# SPDX-License-Identifier: Apache-2.0
"""Pictures of what methods score for what they cost, made from the committed results.

    python benchmarks/plots.py

One picture for each learning benchmark that has results and step times (its `--times`): the score against the
parameters that are trained, and against the seconds of a training step. Bars are standard deviations over seeds. The
line joins the methods that no other method beats in both respects. Seconds compare within a picture only. One picture
more has every method in all sizes that were run (`learning_text.py --sizes`).
"""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

from harness.reading import FOLDER, results
from harness.size_curves import CURVES as SIZE_CURVES
from harness.size_curves import sizes

PICTURES = {
    "learning_text": ("Sentiment of review snippets, MiniLM", "test accuracy"),
    "learning_text_mixture": ("Four text tasks in one training set, MiniLM", "test accuracy"),
    "learning_causal": ("Sentiment by generation, SmolLM2-135M", "exact match"),
    "learning_vision_cifar10": ("CIFAR-10, 1,000 images, DINOv2-S", "test accuracy"),
    "learning_vision_mnist": ("MNIST, 1,000 images, DINOv2-S", "test accuracy"),
    "learning_experts": ("Digits on photos, several backbones", "test accuracy"),
}
NAMES = {
    "head": "head only",
    "full": "full fine-tuning",
    "lora": "LoRA r8",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "static": "deep prompts",
    "vpt-deep": "VPT-Deep",
    "vapt": "VAPT",
    "mept-sample": "MEPT by sample",
    "mept-centered": "MEPT by sample, centred",
    "mept-token": "MEPT by token",
    "static-inputs": "deep prompts, inputs' scale",
    "mept-token-inputs": "MEPT by token, inputs' scale",
    "mept-sample-inputs": "MEPT by sample, inputs' scale",
    "vpt-deep dinov2": "VPT-Deep on DINOv2-S",
    "vapt dinov2": "VAPT on DINOv2-S",
    "head concat": "head on all features",
    "vpt-deep ensemble": "mean of three VPT-Deep",
    "vapt ensemble": "mean of three VAPT",
    **{f"pmoe-{name}": f"pMoE, {name}" for name in ("token", "attention", "none")},
}
# Other sizes of a method, dispatchers that do as others do, and backbones that alone are no match are in the tables.
# Here they would crowd the rest.
LEFT_OUT = re.compile(r"-\d+$| (digits|photos)$|head (dinov2|ensemble)|pmoe-(mean|expert)")
# Blue is what this package brings, orange what is compared; both differ in lightness, too.
OURS, OTHERS = "#1f5fa8", "#d9822b"
BASELINES = ("head", "full", "lora", "prompt", "prefix")
# Where a name may stand: points away from its mark, and in which direction. Beyond `NEAR` a line leads to it.
NEAR = 8
DISTANCES = (NEAR, 14, 22, 32, 44)
DIRECTIONS = ((1, 0), (-1, 0), (0.5, 1), (0.5, -1), (-0.5, 1), (-0.5, -1), (0, 1), (0, -1))


@dataclass(frozen=True)
class Point:
    name: str
    cost: float
    score: float
    deviation: float
    colour: str


def points(summary: dict[str, dict[str, Any]], costs: dict[str, float]) -> list[Point]:
    return [
        Point(
            NAMES.get(method, method),
            costs[method],
            row["mean"],
            row["sd"] or 0.0,
            OTHERS if method.split()[0] in BASELINES else OURS,
        )
        for method, row in summary.items()
        if method in costs and not LEFT_OUT.search(method)
    ]


def frontier(shown: list[Point]) -> list[Point]:
    """The points that no other beats in both respects, the cheapest first."""
    best: list[Point] = []
    for point in sorted(shown, key=lambda each: (each.cost, -each.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def draw(axes: Axes, shown: list[Point], label: str) -> None:
    for point in shown:
        axes.errorbar(
            point.cost, point.score, point.deviation, fmt="o", ms=5, color=point.colour, elinewidth=1, capsize=2
        )
    line = frontier(shown)
    axes.plot([each.cost for each in line], [each.score for each in line], color="0.75", lw=1, zorder=0)
    axes.margins(x=0.4, y=0.2)  # names need room
    axes.set_xlabel(label)
    axes.grid(color="0.93", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_points(axes: Axes, shown: list[Point], canvas: FigureCanvasAgg) -> None:
    """Write each point's name where it touches no other name, no mark and no bar, and stays within the panel."""
    marks = {point: mark(axes, point) for point in shown}
    names: list[Bbox] = []
    for point in sorted(shown, key=lambda each: each.score):
        others = [*names, *(mark for other, mark in marks.items() if other != point)]
        tried = []
        for distance, direction in product(DISTANCES, DIRECTIONS):
            text = _name(axes, point, distance, direction)
            text.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(text, canvas.get_renderer())  # without the line
            faults = sum(box.overlaps(other) for other in others) + 2 * (not _within(box, axes.bbox))
            if distance <= NEAR:  # without a line the name must be nearest to its own mark
                faults += min(marks, key=lambda each: _gap(box, marks[each])) != point
            tried.append((faults, text, box))
            if not faults:
                break
        _, chosen, box = min(tried, key=lambda each: each[0])
        names.append(box)
        for _, text, _ in tried:
            if text is not chosen:
                text.remove()


def _name(axes: Axes, point: Point, distance: int, direction: tuple[float, int]) -> Annotation:
    across, up = direction
    return axes.annotate(
        point.name,
        (point.cost, point.score),
        xytext=(distance * across, distance * up),
        textcoords="offset points",
        ha="left" if across > 0 else "right" if across < 0 else "center",
        va="bottom" if up > 0 else "top" if up < 0 else "center",
        fontsize=8,
        color=point.colour,
        path_effects=[withStroke(linewidth=2, foreground="white")],  # readable where it crosses a line
        arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        if distance > NEAR
        else None,
    )


def _gap(one: Bbox, other: Bbox) -> float:
    """Pixels between two boxes."""
    across = max(one.x0 - other.x1, other.x0 - one.x1, 0.0)
    up = max(one.y0 - other.y1, other.y0 - one.y1, 0.0)
    return math.hypot(across, up)


def _within(box: Bbox, panel: Bbox) -> bool:
    return panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1


def mark(axes: Axes, point: Point) -> Bbox:
    """What a point and its bar cover, in pixels, with a little air."""
    low, high = (axes.transData.transform((point.cost, point.score + s * point.deviation)) for s in (-1, 1))
    return Bbox.from_extents(low[0] - 5, low[1] - 5, high[0] + 5, high[1] + 5)


def seeds(summary: dict[str, dict[str, Any]]) -> str:
    """How many runs the points are means of."""
    counts = sorted({len(row["test"]) for method, row in summary.items() if not LEFT_OUT.search(method)})
    return f"mean of {' or '.join(map(str, counts))} seeds"


def explain(figure: Figure, left_out: list[str]) -> None:
    """Say below the panels what colours, bars and line mean, and what is not shown."""
    dots: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
    handles = [
        Line2D([], [], color=OURS, label="peft_promptmoe", **dots),
        Line2D([], [], color=OTHERS, label="other methods", **dots),
        Line2D([], [], color="0.4", marker="|", ls="", ms=12, label="standard deviation over seeds"),
        Line2D([], [], color="0.75", lw=1, label="no other method is better and cheaper"),
    ]
    note = f"Only in the table: {', '.join(NAMES.get(name, name) for name in left_out)}" if left_out else None
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    if note is not None:
        legend.set_title("\n".join(textwrap.wrap(note, 150)), prop={"size": 7})


def picture(name: str) -> None:
    title, score = PICTURES[name]
    found = results(name)
    summary = found["summary"]
    trained = {method: row["trainable"] for method, row in summary.items()}
    costs = {"trained parameters": trained, "seconds of a training step": found.get("step_seconds", {})}
    figure = Figure(figsize=(11, 5.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (label, cost) in zip(panels, costs.items(), strict=True):
        draw(axes, points(summary, cost), label)
    panels[0].set_xscale("log")
    panels[0].set_ylabel(score)
    panels[1].set_xlim(left=0)
    figure.suptitle(f"{title}, {seeds(summary)}", fontsize=10)
    explain(figure, [method for method in summary if LEFT_OUT.search(method)])
    canvas.draw()
    figure.set_layout_engine("none")  # names are placed by what is where, so nothing may move any more
    for axes, cost in zip(panels, costs.values(), strict=True):
        name_points(axes, points(summary, cost), canvas)
    canvas.draw()
    # A few colours are all there are, and a third of the bytes.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)
    image.save(FOLDER / f"{name}.png", optimize=True)


def size_picture(name: str) -> Path:
    """Draw the score of each method against the parameters that it trains, in every size that has results."""
    figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    found = sizes(name)
    for number, (curve, methods) in enumerate(SIZE_CURVES.items()):
        shown = [each for each in found if each.method in methods]
        if shown:
            axes.errorbar(
                [each.trained for each in shown],
                [each.score for each in shown],
                [each.deviation or 0.0 for each in shown],
                marker="osD^v<>P"[number],
                color=f"C{number}",
                ms=5,
                lw=1,
                elinewidth=1,
                capsize=2,
                label=curve,
            )
    axes.set(xscale="log", xlabel="trained parameters", ylabel=PICTURES[name][1])
    axes.set_title(f"{PICTURES[name][0]}: size against score; bars over seeds, where there are several", fontsize=9)
    axes.grid(color="0.93", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    path = FOLDER / f"{name}_sizes.png"
    figure.savefig(path)
    return path


def main() -> None:
    print(size_picture("learning_text"))
    for name in PICTURES:
        if results(name).get("summary") and results(name).get("step_seconds"):
            picture(name)
            print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
