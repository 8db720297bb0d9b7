# SPDX-License-Identifier: Apache-2.0
"""A trial run of a backbone: the sizes of the maps that it returns, and of the images that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..engine.eval_mode import eval_mode
from ..models.patches import Grid
from .decoder import decoder_parts
from .reader import Reader, fixed_size, timm_part

PROBE = 16  # patches along a side of the image that shapes are measured with
UNFIT = (RuntimeError, ValueError, IndexError, AssertionError)  # what libraries raise for an image of a wrong size


@torch.no_grad()
def measure(reader: Reader, backbone: nn.Module, first: nn.Conv2d) -> None:
    """Run the backbone on empty images, and fill in widths, strides, and which sizes of images it takes.

    Args:
        reader: reader of the backbone, whose patch size becomes that of the coarsest map.
        backbone: the backbone.
        first: its first convolution.
    """

    def run(size: Grid) -> Any:
        # Two images: a backbone that runs them together is told by the number of its tokens.
        pixels = torch.zeros(2, first.in_channels, *size, device=first.weight.device, dtype=first.weight.dtype)
        with eval_mode(backbone):
            return reader.read(backbone, pixels)

    size, maps = _first_fit(run, _trial_sizes(reader, backbone))
    for level, found in maps.items():
        reader.widths[level] = found.shape[1]
        rows, columns = (length // cells for length, cells in zip(size, found.shape[-2:], strict=True))
        reader.strides[level] = (rows, columns)
    coarsest = [max(stride[axis] for stride in reader.strides.values()) for axis in (0, 1)]
    windows = _windows(backbone)
    rows, columns = (max(pair) * windows for pair in zip(reader.patch, coarsest, strict=True))
    reader.patch = rows, columns
    # Models with a decoder take any size, but some only square images, which `check_grid` says.
    if reader.interpolates or fixed_size(backbone) is not None or decoder_parts(backbone):
        return
    if _attempt(run, (size[0] + rows, size[1] - columns if size[1] > columns else size[1])) is None:
        more = math.lcm(rows, columns)
        reader.square = size[0] == size[1] and _attempt(run, (size[0] + more, size[1] + more)) is not None
        reader.only = None if reader.square else size


def _first_fit(run: Callable[[Grid], Any], sizes: Sequence[Grid]) -> tuple[Grid, Any]:
    """The first size with which `run` does not fail, and what it returns. With the last one it may fail."""
    for size in sizes[:-1]:
        if (found := _attempt(run, size)) is not None:
            return size, found
    return sizes[-1], run(sizes[-1])


def _attempt(run: Callable[[Grid], Any], size: Grid) -> Any:
    """What `run` returns, None if the backbone does not take images of this size."""
    try:
        return run(size)
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of sizes
        raise
    except UNFIT:
        return None


def _trial_sizes(reader: Reader, backbone: nn.Module) -> list[Grid]:
    """Image sizes for the trial run: a small one, then the backbone's own, which it is sure to take."""
    windows = _windows(backbone)
    cells = -(-PROBE // windows) * windows
    small = (cells * reader.patch[0], cells * reader.patch[1]) if reader.patch != (1, 1) else (224, 224)
    if reader.kind == "timm":
        model = timm_part(backbone)
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if own is not None and not getattr(model, "dynamic_img_size", False):
            return [tuple(own)]
        trained = getattr(model, "pretrained_cfg", {}).get("input_size")
        return [small] if trained is None else [small, tuple(trained[-2:])]
    config: Any = backbone.config
    configs = [c for c in (getattr(config, "backbone_config", None), config) if c is not None]
    own = next((found for c in configs if (found := getattr(c, "image_size", None)) is not None), None)
    if own is None or reader.interpolates:
        return [small]
    return [small, (own, own) if isinstance(own, int) else tuple(own[-2:])]


def _windows(backbone: Any) -> int:
    """Number of windows along a side of the image in backbones whose patch grid must divide into them (LW-DETR)."""
    config = getattr(backbone, "config", None)
    return int(getattr(config, "num_windows_side", getattr(config, "num_windows", 1)))
