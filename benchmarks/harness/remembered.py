# SPDX-License-Identifier: Apache-2.0
"""Frozen blocks that run once for each image: what no method changes need not be computed in every step."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

Known = dict[bytes, Tensor]


class Remembered:
    """A frozen block's forward that keeps what it made of each image, by the content of its input.

    Exact up to how the block rounds an image among other batch mates.

    Args:
        forward: the block's own, of a tensor (B, N, D) to one of the same shape.
        known: what it has made so far, which blocks of equal weights may share.
    """

    def __init__(self, forward: Any, known: Known) -> None:
        self.forward, self.known = forward, known

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.requires_grad:
            raise RuntimeError("Something before this block trains, so its outputs cannot be remembered.")
        keys = [hashlib.blake2b(row.numpy().data, digest_size=16).digest() for row in x.contiguous()]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            with torch.no_grad():
                made = self.forward(x[new], *args, **kwargs)
            self.known |= {keys[index]: row.clone() for index, row in zip(new, made, strict=True)}
        return torch.stack([self.known[key] for key in keys])


def blocks_of(model: nn.Module) -> Any:
    """The blocks of the DINOv2 that `model` has inside."""
    return next(
        module.layer for module in model.modules() if isinstance(getattr(module, "layer", None), nn.ModuleList)
    )


def remember(model: nn.Module, count: int, known: list[Known]) -> None:
    """Let the first `count` blocks of a DINOv2 in `model` run once for each image; `known` has an entry per block.

    They must be frozen, as deterministic in training as in evaluation, and untouched by adapters but for units behind
    the last one: hooks run every time.
    """
    for block, of in zip(blocks_of(model)[:count], known, strict=False):
        if any(each.requires_grad for name, each in block.named_parameters() if "promotion_" not in name):
            raise ValueError("A block that trains cannot be remembered.")
        block.forward = Remembered(block.forward, of)
