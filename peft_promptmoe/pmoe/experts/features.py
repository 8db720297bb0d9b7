# SPDX-License-Identifier: Apache-2.0
"""Running a frozen encoder on images: its pixel format, its feature and its patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.inspection import parameter_names
from ...models.patches import Grid, Patches

# Their last hidden state is not what was trained to be read; the pooled output is.
POOLED = ("clip_vision_model", "siglip_vision_model")


def fit_pixels(
    pixels: Tensor,
    incoming: tuple[Sequence[float], Sequence[float]] | None,
    wanted: tuple[Sequence[float], Sequence[float]] | None,
    size: Grid | None,
) -> Tensor:
    """Pixels as another model wants them.

    Args:
        pixels: (B, channels, rows, columns).
        incoming: mean and spread by which they are normalised; None if unknown.
        wanted: mean and spread by which they should be. Where either is unknown the values stay as they are.
        size: rows and columns to resize to, bilinear with antialiasing; None for as they come.
    """
    if incoming is not None and wanted is not None and tuple(map(list, incoming)) != tuple(map(list, wanted)):
        mean, std, new_mean, new_std = (
            torch.tensor(list(values), dtype=pixels.dtype, device=pixels.device)[:, None, None]
            for values in (*incoming, *wanted)
        )
        pixels = (pixels * std + mean - new_mean) / new_std
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
    return pixels


def encode(encoder: Any, patches: Patches, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Run an encoder.

    Args:
        encoder: a bare vision transformer of transformers, or one of timm.
        patches: how it makes tokens.
        pixels: (B, channels, rows, columns).

    Returns:
        (B, D) its feature: what its own head would read in timm; in transformers the class token or, without one, the
        mean of the patches. (B, N, D) its last patch tokens.
    """
    if hasattr(encoder, "forward_features"):
        tokens = encoder.forward_features(pixels)
        return encoder.forward_head(tokens, pre_logits=True), tokens[:, patches.prefix :]
    arguments: dict[str, Any] = {}
    names = parameter_names(encoder)
    if "interpolate_pos_encoding" in names and patches.image_size not in (None, tuple(pixels.shape[-2:])):
        arguments["interpolate_pos_encoding"] = True
    if "noise" in names:  # ViT-MAE puts patches into the order of this noise
        rows, columns = patches.grid((pixels.shape[-2], pixels.shape[-1]))
        arguments["noise"] = torch.arange(rows * columns, device=pixels.device).expand(pixels.shape[0], -1)
    output = encoder(pixel_values=pixels, return_dict=True, **arguments)
    hidden = output.last_hidden_state
    if encoder.config.model_type in POOLED and output.pooler_output is not None:
        feature = output.pooler_output
    else:
        feature = hidden[:, 0] if patches.prefix else hidden.mean(dim=1)
    return feature, hidden[:, patches.prefix :]
