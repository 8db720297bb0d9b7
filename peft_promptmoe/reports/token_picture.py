# SPDX-License-Identifier: Apache-2.0
"""Picture and animation of which expert each token of a text chose. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from .pictures import LABELS, Picture, distinct, thin

WIDTH = 9.0  # inches
LINE = 74  # characters of text in a line
REST = 2500  # milliseconds that the last layer is shown
COLOURS = 128  # in the palette of a file
FADED = 0.55  # opacity behind letters, so that they can be read on any colour


def lines_of(tokens: Sequence[str], width: int = LINE) -> list[tuple[int, int]]:
    """(line, column) of every token. Lines are broken between tokens.

    Args:
        tokens: texts of the tokens.
        width: characters per line. A longer token gets its own line.
    """
    places, line, column = [], 0, 0
    for token in tokens:
        if column and column + len(token) > width:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(token)
    return places


def shown(token: str) -> str:
    """A token in readable form: the space marks of byte-level and sentencepiece vocabularies become spaces."""
    text = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\u21b5").replace("\n", "\u21b5")
    return text.replace("$", r"\$") or " "


class Frames:
    """A picture of text and map, with the map filled up to a layer."""

    def __init__(self, layers: Sequence[int], tokens: Sequence[str], experts: Tensor, count: int) -> None:
        self.layers, self.experts = layers, experts.numpy()
        self.colours = [to_rgba(colour) for colour in distinct(count)]
        texts = [shown(token) for token in tokens]
        places = lines_of(texts)
        lines = places[-1][0] + 1
        deep = min(max(0.085 * len(layers), 0.8), 4.0)
        self.figure = Picture(figsize=(WIDTH, 1.5 + 0.27 * lines + deep), layout="constrained")
        above, below = self.figure.subplots(2, 1, height_ratios=[0.27 * lines, deep])
        self.heading = self.figure.suptitle(" ", fontsize=10)
        self.words = _write(above, texts, places, lines)
        self.image = _map(below, layers, len(tokens), self.colours)
        keys = [Patch(color=colour, label=f"expert {number}") for number, colour in enumerate(self.colours)]
        style = {"ncols": min(count, 8), "fontsize": 8, "frameon": False}
        self.figure.legend(handles=keys[:LABELS], loc="outside lower center", **style)

    def show(self, number: int) -> None:
        """Fill the map up to a layer, and colour the text by that layer's experts."""
        filled = np.ma.masked_all(self.experts.shape, dtype=int)
        filled[: number + 1] = self.experts[: number + 1]
        self.image.set_data(filled)
        for word, expert in zip(self.words, self.experts[number], strict=True):
            word.get_bbox_patch().set_facecolor((*self.colours[expert][:3], FADED))
        self.heading.set_text(
            f"Layer {self.layers[number]}: the expert that each token chose (text), and layers up to it (map)"
        )


def _write(axes: Axes, texts: Sequence[str], places: Sequence[tuple[int, int]], lines: int) -> list[Any]:
    axes.set_xlim(0, LINE)
    axes.set_ylim(lines, 0)
    axes.axis("off")
    size = 72 * (WIDTH - 0.4) / LINE / 0.602  # a letter of DejaVu Sans Mono is as wide as 0.602 of its size
    words = []
    for text, (line, column) in zip(texts, places, strict=True):
        frame = {"boxstyle": "square,pad=0.12", "edgecolor": "none", "facecolor": "none"}
        words.append(axes.text(column, line + 0.5, text, family="monospace", fontsize=size, va="center", bbox=frame))
    return words


def _map(axes: Axes, layers: Sequence[int], tokens: int, colours: Sequence[Any]) -> Any:
    empty = np.ma.masked_all((len(layers), tokens), dtype=int)
    image = axes.imshow(
        empty, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto", interpolation="nearest"
    )
    thin(axes.yaxis, layers, 10)
    thin(axes.xaxis, range(tokens))
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xlabel("token", fontsize=9)
    return image


def draw_tokens(layers: Sequence[int], tokens: Sequence[str], experts: Tensor, count: int) -> Picture:
    """Draw the text and the map of all layers.

    Args:
        layers: numbers of the layers.
        tokens: tokens of the text.
        experts: (L, T) chosen experts.
        count: number of experts.
    """
    frames = Frames(layers, tokens, experts, count)
    frames.show(len(layers) - 1)
    return frames.figure


def write_animation(
    path: str | os.PathLike[str],
    layers: Sequence[int],
    tokens: Sequence[str],
    experts: Tensor,
    count: int,
    seconds: float,
) -> None:
    """Write an animation with one frame per layer. The last one is shown longer."""
    frames = Frames(layers, tokens, experts, count)
    canvas = FigureCanvasAgg(frames.figure)
    images = []
    for number in range(len(layers)):
        frames.show(number)
        canvas.draw()
        images.append(np.array(canvas.buffer_rgba())[..., :3].copy())
    first, *others = with_palette(images)
    each = round(1000 * seconds)
    durations = [each] * len(others) + [max(each, REST)]
    kind = "PNG" if Path(path).suffix.lower() in {".png", ".apng"} else "GIF"
    first.save(path, kind, save_all=True, append_images=others, duration=durations, loop=0)


def with_palette(images: Sequence[np.ndarray[Any, Any]]) -> list[Image.Image]:
    """Images with one common palette: their most frequent colours. Other colours become the nearest of these.

    Pillow's own palette would change the colours of plain areas, which stand for experts here.

    Args:
        images: (height, width, 3), uint8.
    """
    packed = np.stack([image.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]) for image in images])
    values, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    channels = np.stack([values >> shift & 255 for shift in (16, 8, 0)], axis=1)
    kept = channels[np.argsort(-counts, kind="stable")[:COLOURS]]
    nearest = np.square(channels[:, None] - kept[None]).sum(axis=-1).argmin(axis=1).astype(np.uint8)
    found = [Image.fromarray(frame) for frame in nearest[places].reshape(packed.shape)]
    for frame in found:
        frame.putpalette(kept.astype(np.uint8).tobytes())
    return found
