# SPDX-License-Identifier: Apache-2.0
"""The drawings of README and docs, each for light and for dark pages.

python docs/pictures/draw.py             # draws them
python docs/pictures/draw.py --measure   # first trains README's quick start anew, whose routing one of them shows
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "routing.json"
EXPERTS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


@dataclass(frozen=True)
class Theme:
    name: str
    ink: str
    frozen: str
    soft: str
    map: str


LIGHT = Theme("light", "#1f2328", "#dbe4ef", "#8b949e", "Blues")
DARK = Theme("dark", "#e6edf3", "#2b3a4d", "#8b949e", "Blues_r")


def box(
    axes: Axes, at: tuple[float, float], size: tuple[float, float], colour: str, text: str = "", ink: str = ""
) -> None:
    """A rounded box with its text in the middle; `at` is its lower left corner."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(at, *size, boxstyle=style, facecolor=colour, edgecolor="none"))
    if text:
        middle = at[0] + size[0] / 2, at[1] + size[1] / 2
        axes.text(*middle, text, ha="center", va="center", fontsize=9, color=ink)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    shape = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=shape | {"connectionstyle": f"arc3,rad={bend}"})


def row(axes: Axes, at: tuple[float, float], count: int, colour: str, width: float = 0.34) -> None:
    """Token rows, side by side."""
    for number in range(count):
        box(axes, (at[0] + number * (width + 0.06), at[1]), (width, 0.34), colour)


def note(axes: Axes, at: tuple[float, float], text: str, theme: Theme, side: str = "center") -> None:
    axes.text(*at, text, ha=side, va="center", fontsize=8.5, color=theme.ink)


def canvas(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")


def routed_layer(axes: Axes, theme: Theme) -> None:
    """A frozen layer, its router, and the rows of the chosen expert in its attention."""
    canvas(axes, 9.4, 5.0)
    box(axes, (3.2, 3.55), (5.9, 0.9), theme.frozen, "frozen attention of the layer", theme.ink)
    row(axes, (3.4, 2.6), 3, EXPERTS[1])
    row(axes, (4.8, 2.6), 10, theme.soft)
    for x in (4.0, 6.8):
        arrow(axes, (x, 3.0), (x, 3.5), theme.ink)
    note(axes, (4.0, 2.35), "prompt rows", theme)
    note(axes, (6.8, 2.35), "keys and values of the text", theme)
    row(axes, (4.8, 0.75), 10, theme.soft)
    note(axes, (6.8, 0.45), "the layer's input", theme)
    arrow(axes, (6.8, 1.15), (6.8, 2.15), theme.ink)
    box(axes, (3.3, 0.65), (1.1, 0.6), EXPERTS[3], "router", "#ffffff")
    arrow(axes, (4.78, 0.93), (4.45, 0.93), theme.ink)
    for number, colour in enumerate(EXPERTS):
        y = 1.5 + 0.72 * number
        row(axes, (0.35, y), 3, colour)
        note(axes, (0.2, y + 0.17), str(number), theme)
    note(axes, (0.95, 4.45), "prompt experts", theme)
    arrow(axes, (3.25, 1.0), (1.62, 2.3), EXPERTS[3], -0.2)
    arrow(axes, (1.65, 2.45), (3.3, 2.78), EXPERTS[1], -0.1)
    note(axes, (2.2, 0.95), "chooses", theme)


def routing_map(figure: Figure, grid: list[Axes], theme: Theme) -> None:
    """Which expert took which class in the quick start, as it was measured."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    for axes, name, share in zip(grid, found["classes"], found["share"], strict=True):
        image = axes.imshow(share, vmin=0, vmax=1, cmap=theme.map, aspect="auto")
        axes.set_title(f"{name}, {found['texts'] // 2} texts", fontsize=9)
        axes.set_xticks(range(len(share[0])))
        axes.set_xlabel("expert", fontsize=9)
    grid[0].set_ylabel("layer", fontsize=9)
    grid[1].set_yticks([])
    bar = figure.colorbar(image, ax=grid, label="share of the class's texts", shrink=0.9)
    bar.outline.set_visible(False)


def overview(theme: Theme) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, first, second = figure.subplots(1, 3, width_ratios=[3.2, 1, 1])
    routed_layer(left, theme)
    routing_map(figure, [first, second], theme)
    return figure


def mept(theme: Theme) -> Figure:
    figure = Figure(figsize=(6.6, 3.5), layout="constrained")
    routed_layer(figure.subplots(), theme)
    return figure


def vapt(theme: Theme) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    canvas(axes, 10.4, 4.6)
    for line in range(4):
        row(axes, (0.3, 1.2 + 0.42 * line), 4, theme.soft)
    note(axes, (1.1, 0.8), "patches", theme)
    box(axes, (2.7, 1.6), (1.7, 0.8), EXPERTS[0], "convolution", "#ffffff")
    box(axes, (4.9, 1.6), (1.7, 0.8), EXPERTS[0], "token-wise\nprojector", "#ffffff")
    box(axes, (7.1, 1.6), (1.7, 0.8), EXPERTS[3], "feature\nprojector", "#ffffff")
    note(axes, (7.95, 1.2), "shared by all blocks", theme)
    for x in (2.0, 4.45, 6.65):
        arrow(axes, (x, 2.0), (x + 0.4, 2.0), theme.ink)
    row(axes, (7.25, 2.9), 4, EXPERTS[1])
    arrow(axes, (8.0, 2.45), (8.0, 2.85), theme.ink)
    note(axes, (9.0, 3.07), "prompts", theme, "left")
    box(
        axes,
        (0.3, 3.6),
        (9.0, 0.8),
        theme.frozen,
        "frozen attention of the block, over patches and prompts",
        theme.ink,
    )
    arrow(axes, (8.0, 3.28), (8.0, 3.56), theme.ink)
    arrow(axes, (1.1, 2.9), (1.1, 3.56), theme.ink)
    return figure


def pmoe(theme: Theme) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    canvas(axes, 10.4, 4.6)
    box(axes, (0.2, 1.8), (1.1, 1.0), theme.soft, "image", "#ffffff")
    for number, (y, name) in enumerate(((3.2, "base model"), (0.5, "further backbone"))):
        arrow(axes, (1.35, 2.3), (2.0, y + 0.4), theme.ink)
        for block in range(3):
            box(axes, (2.1 + 2.1 * block, y), (1.4, 0.8), theme.frozen, "frozen\nblock", theme.ink)
            row(axes, (3.6 + 2.1 * block, y + 0.23), 1, EXPERTS[number])
        note(axes, (4.9, y + (1.05 if number == 0 else -0.25)), name, theme)
        arrow(axes, (8.2, y + 0.4), (8.75, 2.3), theme.ink)
    for block in range(2):
        x = 3.77 + 2.1 * block
        box(axes, (x - 0.75, 2.0), (1.5, 0.6), EXPERTS[3], "dispatcher", "#ffffff")
        arrow(axes, (x, 3.4), (x, 2.65), theme.ink)
        arrow(axes, (x, 1.1), (x, 1.95), theme.ink)
        for y in (3.3, 1.25):
            arrow(axes, (x + 0.4, 2.6 if y > 2 else 2.0), (x + 0.75, y), EXPERTS[3])
    box(axes, (8.8, 1.8), (1.3, 1.0), EXPERTS[1], "class", "#ffffff")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train README's quick start and keep its routing")
    if parser.parse_args().measure:
        from measure import measured_routing

        MEASURED.write_text(json.dumps(measured_routing(), indent=1) + "\n", encoding="utf-8")
    for theme in (LIGHT, DARK):
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
        # Text as paths looks the same everywhere; a fixed salt gives the same file twice.
        with rc_context(colours | {"axes.edgecolor": theme.soft, "svg.hashsalt": "peft_promptmoe"}):
            for draw in (overview, mept, vapt, pmoe):
                path = HERE / f"{draw.__name__}-{theme.name}.svg"
                draw(theme).savefig(path, transparent=True, metadata={"Date": None})
                print(path)


if __name__ == "__main__":
    main()
