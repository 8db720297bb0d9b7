# SPDX-License-Identifier: Apache-2.0
"""Depth models that bring a decoder of their own: which parts are the decoder, and what its output means."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES

from ..models.levels import put_out

DecoderOutput = Literal["inverse", "depth"]

# The parts of a depth model that decode, by its config's model_type.
DECODERS = {"dpt": ("neck", "head"), "depth_anything": ("neck", "head"), "glpn": ("decoder", "head")}


def decoder_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the children that decode depth; none for a model without a decoder.

    Raises:
        ValueError: a depth model whose decoder is not known here.
    """
    if type(model).__name__ not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES.values():
        return ()
    config: Any = model.config
    if config.model_type not in DECODERS:
        raise ValueError(
            f"{type(model).__name__} has a depth decoder that is not supported; those of {sorted(DECODERS)} are. Give "
            "its backbone instead, on which a new head is put."
        )
    return DECODERS[config.model_type]


def decoder_reads(model: nn.Module) -> list[int]:
    """Numbers of the blocks whose maps a depth model's decoder reads; none where it reads stages of several blocks."""
    config: Any = model.config
    if config.model_type == "dpt" and getattr(model, "backbone", None) is None:
        return list(config.backbone_out_indices)
    return put_out(model)


def predicted_by(model: nn.Module) -> DecoderOutput:
    """What a depth model predicts: "depth", or "inverse" depth up to a factor.

    Depth Anything says it in its config. GLPN is trained on metric depth, DPT on inverse depth; some later weights of
    DPT (`facebook/dpt-dinov2-*-nyu`, `-kitti`) are metric, which nothing in their files says.
    """
    config: Any = model.config
    if config.model_type == "depth_anything":
        return "depth" if config.depth_estimation_type == "metric" else "inverse"
    return "depth" if config.model_type == "glpn" else "inverse"


def check_grid(model: nn.Module, pixels: Tensor, patch: tuple[int, int]) -> None:
    """Refuse images whose patches the model's decoder would put on a wrong grid.

    Raises:
        ValueError: a DPT that guesses a square grid from the number of patches, and an image that is not square.
    """
    config: Any = model.config
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    if config.model_type == "dpt" and getattr(model, "backbone", None) is None and rows != columns:
        raise ValueError(
            f"This DPT takes every image for a square one, and here are {rows} x {columns} patches. Resize or crop to "
            "a square, or use a DPT on an AutoBackbone."
        )


class DepthScale(nn.Module):
    """Depth from what a model's own decoder predicts.

    Inverse depth is `scale * prediction + 1 / max_depth`, with one learned scale, as such decoders know depth up to a
    factor only. The scale starts from the first training batch (mean logarithms over its valid pixels agree), because
    the factor may be a thousand, which no ordinary learning rate reaches; until then it is 1. Metric depth is
    taken as it is. Both are kept between `min_depth` and `max_depth`.

    Args:
        output: "inverse" or "depth".
        min_depth: least depth.
        max_depth: largest depth.
    """

    started: Tensor

    def __init__(self, output: DecoderOutput, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.output = output
        self.min_depth, self.max_depth = min_depth, max_depth
        if output == "inverse":
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.register_buffer("started", torch.tensor(False))

    def forward(self, predicted: Tensor, size: tuple[int, int]) -> Tensor:
        """Depth (B, rows, columns) of `size`, float32, of what the decoder predicts, (B, h, w)."""
        predicted = F.interpolate(predicted[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        if self.output == "depth":
            return predicted.clamp(self.min_depth, self.max_depth)
        inverse = predicted.clamp(min=0) * self.log_scale.float().exp() + 1 / self.max_depth
        return 1 / inverse.clamp(max=1 / self.min_depth)

    @torch.no_grad()
    def start(self, predicted: Tensor, target: Tensor, valid: Tensor) -> None:
        """Set the scale by a first batch; later ones change nothing. All processes agree on the mean of theirs.

        Args:
            predicted: (B, h, w) of the decoder.
            target: (B, H, W) true depth.
            valid: (B, H, W) of bool.
        """
        if self.output == "depth":
            return
        size = (target.shape[-2], target.shape[-1])
        inverse = F.interpolate(predicted[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        valid = valid & (inverse > 0) & torch.isfinite(inverse)
        error = -torch.where(valid, target, 1.0).log() - torch.where(valid, inverse, 1.0).log()
        sums = torch.stack([torch.where(valid, error, 0.0).sum(), valid.sum().float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        found = (sums[0] / sums[1].clamp(min=1)).to(self.log_scale.dtype)
        now = ~self.started & (sums[1] > 0)
        self.log_scale.copy_(torch.where(now, found, self.log_scale))
        self.started |= now

    def extra_repr(self) -> str:
        return f"output={self.output!r}, depth {self.min_depth:g} to {self.max_depth:g}"
