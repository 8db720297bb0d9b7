# SPDX-License-Identifier: Apache-2.0
"""Pictures of the reports. Needs matplotlib: the reports import this module only when a picture is drawn."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

SCREEN = (12.0, 6.5)  # largest size of a map in inches, so that it fits a page or screen
LABELS = 24  # most labels along an axis
PANELS_ABREAST = 5
CARRIED, PATCHES = "0.55", "0.8"  # greys of the parts that belong to no expert

Path = str | os.PathLike[str]


class Picture(Figure):
    """A matplotlib figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def draw_load(layers: Sequence[int], load: Tensor, entropy: Tensor, over: str) -> Picture:
    """Draw a heat map of the load (layers by experts), with the entropy of each layer's load beside it."""
    depth, experts = load.shape
    height = min(0.3 * depth, SCREEN[1])
    figure = Picture(figsize=(min(2.6 + 0.6 * experts, SCREEN[0]), 1.9 + height), layout="constrained")
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=[max(experts, 3), 1.2])
    image = axes.imshow(load.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
    thin(axes.xaxis, range(experts))
    thin(axes.yaxis, layers)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    side.barh(range(depth), entropy.tolist(), height=0.9, color="0.6")
    side.set_xlim(0.0, 1.0)
    side.set_xticks([0.0, 1.0], ["0", "1"])
    side.set_xlabel("entropy\n(1: even)")
    side.tick_params(axis="y", labelleft=False, left=False)
    figure.colorbar(image, ax=[axes, side], label="share of choices")
    figure.suptitle(f"Expert load by layer\n{over}", fontsize=10)
    return figure


def draw_pathways(
    layers: Sequence[int], ways: Tensor, names: Sequence[str], counts: Sequence[str], heading: str
) -> Picture:
    """Draw one heat map (layers by experts) per class.

    Args:
        layers: numbers of the layers.
        ways: (C, L, E) shares.
        names: names of the classes.
        counts: for each class, the number of samples in words.
        heading: heading of the picture.
    """
    count, depth, experts = ways.shape
    columns = min(count, PANELS_ABREAST)
    rows = math.ceil(count / columns)
    each = (min(1.0 + 0.3 * experts, SCREEN[0] / columns), min(0.9 + 0.22 * depth, max(1.8, SCREEN[1] / rows)))
    figure = Picture(figsize=(max(1.4 + each[0] * columns, 4.0), 0.9 + each[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for number, axes in enumerate(grid.flat[:count]):
        image = axes.imshow(
            ways[number].numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest"
        )
        title = textwrap.shorten(names[number], 28, placeholder="...")
        axes.set_title(f"{title}\n{counts[number]}" if title else counts[number], fontsize=8)
        thin(axes.xaxis, range(experts), 10)
        thin(axes.yaxis, layers)
    figure.supxlabel("expert", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    figure.colorbar(image, ax=grid, label="share of the class's choices")
    figure.suptitle(heading, fontsize=10)
    return figure


def draw_dispatch(
    experts: Sequence[str], blocks: Sequence[tuple[int, int]], shares: Tensor, decided: Tensor | None, over: str
) -> Picture:
    """Draw what the prompts of every block are made of: one panel per expert, one bar per block."""
    count = len(experts)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    most = max(sum(expert == number for expert, _ in blocks) for number in range(count))
    groups = [*(f"prompts of {name}" for name in experts), "carried prompts", "patches"][: shares.shape[1]]
    colours = [*distinct(count), CARRIED, PATCHES]
    legend = 0.25 * math.ceil(len(groups) / columns)
    width = min(1.6 + 0.22 * most, SCREEN[0] / columns)
    figure = Picture(figsize=(max(width * columns, 5.0), 1.0 + 2.6 * rows + legend), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for number, axes in enumerate(grid.flat[:count]):
        own = [place for place, (expert, _) in enumerate(blocks) if expert == number]
        bottom = np.zeros(len(own))
        for group, colour, share in zip(groups, colours, shares[own].T.numpy(), strict=False):
            axes.bar(range(len(own)), share, bottom=bottom, color=colour, label=group, width=0.9)
            bottom = bottom + share
        title = textwrap.shorten(experts[number], 34, placeholder="...")
        if decided is not None:
            title += f"\ndecides {float(decided[number]):.0%} of the images"
        axes.set_title(title, fontsize=9)
        thin(axes.xaxis, [blocks[place][1] for place in own], 12)
        axes.set_xlabel("block")
    for row in grid:
        row[0].set_ylabel("share")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(f"What the prompts of each block are made of\n{over}", fontsize=10)
    return figure


def draw_maps(
    layers: Sequence[int], maps: Sequence[Tensor], used: Sequence[int], prototypes: int, images: Sequence[int]
) -> Picture:
    """Draw the nearest prototype of each patch: one row of panels per image.

    Args:
        layers: numbers of the blocks.
        maps: for every block, (B, rows, columns) number of each patch's nearest prototype.
        used: for every block, how many prototypes are nearest to some patch.
        prototypes: number of prototypes.
        images: numbers of the images in the batch.
    """
    columns = min(len(layers), PANELS_ABREAST)
    deep = math.ceil(len(layers) / columns)
    size = (max(1.9 * columns + 1.2, 4.2), 2.1 * deep * len(images) + 0.7)
    figure = Picture(figsize=size, layout="constrained")
    grid = figure.subplots(deep * len(images), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    colours = colormaps["tab20" if prototypes <= 20 else "turbo"].resampled(prototypes)
    shown: Any = None
    for row, number in enumerate(images):
        for place, layer in enumerate(layers):
            axes = grid[row * deep + place // columns][place % columns]
            shown = axes.imshow(
                maps[place][number].numpy(), cmap=colours, vmin=-0.5, vmax=prototypes - 0.5, interpolation="nearest"
            )
            axes.set_title(f"image {number}, block {layer}\n{used[place]} of {prototypes} used", fontsize=8)
    step = max(1, math.ceil(prototypes / 20))
    figure.colorbar(shown, ax=grid, label="nearest prototype", ticks=range(0, prototypes, step))
    figure.suptitle(
        f"Prototypes of patches: {len(images)} of the last batch's {maps[0].shape[0]} images\n"
        f"(used: by some patch of the batch)",
        fontsize=10,
    )
    return figure


def finish(figure: Picture, path: Path | None) -> Picture:
    """Return the figure, after writing it to an image file if there is a path."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def thin(axis: Any, labels: Sequence[Any], most: int = LABELS) -> None:
    """Label an axis. If there are too many labels, label every few places, always with the first."""
    step = math.ceil(len(labels) / most)
    places = range(0, len(labels), max(step, 1))
    axis.set_ticks(places, [str(labels[place]) for place in places], fontsize=8)


def distinct(count: int) -> list[Any]:
    if count <= 10:
        return [colormaps["tab10"](number) for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]
