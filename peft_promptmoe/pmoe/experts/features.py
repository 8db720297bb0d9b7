# SPDX-License-Identifier: Apache-2.0
"""Runs a frozen encoder on images: pixel format, feature and patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.inspection import parameter_names
from ...models.patches import Grid, Patches

# Models that were trained to be read at the pooled output, not at the last hidden state.
POOLED = ("clip_vision_model", "siglip_vision_model")


def fit_pixels(
    pixels: Tensor,
    incoming: tuple[Sequence[float], Sequence[float]] | None,
    wanted: tuple[Sequence[float], Sequence[float]] | None,
    size: Grid | None,
) -> Tensor:
    """Convert pixels to the normalisation and size of another model.

    Args:
        pixels: (B, channels, rows, columns).
        incoming: (mean, std) of their normalisation. None: unknown.
        wanted: (mean, std) of the normalisation they should have. If one of the two is unknown, values stay unchanged.
        size: (rows, columns) to resize to, bilinearly with antialiasing. None: no resizing.
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
        encoder: a vision transformer of transformers without head, or one of timm.
        patches: its patch embedding.
        pixels: (B, channels, rows, columns).

    Returns:
        Feature (B, D): in timm what the model's own head would read; in transformers the class token or, without one,
        the mean of the patches. Last patch tokens (B, N, D).
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
