# SPDX-License-Identifier: Apache-2.0
"""Patch maps of all experts on one grid, for dense prediction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.patches import Grid
from .experts.features import encode
from .experts.towers import encoder_within
from .fusion import expert_features
from .shared import PMoEShared, shared_of


def patch_maps(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the last patch tokens of all experts on the base model's patch grid, for a head that predicts per pixel.

    Gradients reach the prompts. The base model's classifier is not used, so the base model may be an encoder without
    classifier.

    Args:
        model: a model with an active pMoE adapter.
        pixel_values: (B, channels, rows, columns) images as the base model gets them.

    Returns:
        (B, sum of D_k, H, W), the base model's channels first. Other patch grids are resized bilinearly.

    Raises:
        ValueError: no pMoE adapter is active.
    """
    shared = shared_of(model)
    working = shared.working_adapters()
    if len(working) != 1:
        raise ValueError(
            f"patch_maps needs exactly one active pMoE adapter, but {len(working)} are active. Use set_adapter()."
        )
    base, patches = shared.base()[0], shared.patches(None)
    encoder = encoder_within(base, [layer.site for layer in shared.layers_of(None, working[0])])
    if encoder is None:
        raise ValueError(
            f"patch_maps needs a base model of transformers or timm, and {type(base).__name__} is neither."
        )
    size: Any = tuple(pixel_values.shape[-2:])
    grid = patches.grid(size)
    _, tokens = encode(encoder, patches, pixel_values)
    maps = [tokens.transpose(1, 2).unflatten(2, grid)]
    for key, (_, tokens) in zip(
        shared.members[working[0]], expert_features(shared, working[0], pixel_values), strict=True
    ):
        maps.append(_on_grid(tokens, _grid_of(shared, key, size), grid).to(maps[0].dtype))
    return torch.cat(maps, dim=1)


def _grid_of(shared: PMoEShared, key: str, size: Grid) -> Grid:
    record = shared.experts[key].record
    return shared.patches(key).grid((record.size[0], record.size[1]) if record.size is not None else size)


def _on_grid(tokens: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Tokens (B, N, D) of one grid as a map (B, D, H, W) on another grid."""
    found = tokens.transpose(1, 2).unflatten(2, own)
    return found if own == grid else F.interpolate(found, size=grid, mode="bilinear", align_corners=False)
