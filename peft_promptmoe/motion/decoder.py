# SPDX-License-Identifier: Apache-2.0
"""Depth models that have a decoder: which modules belong to it, and what its output means."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES

from ..models.levels import put_out
from .record import Recorded

DecoderOutput = Literal["inverse", "depth"]

# The modules of a depth model's decoder, by the model_type of its config.
DECODERS = {"dpt": ("neck", "head"), "depth_anything": ("neck", "head"), "glpn": ("decoder", "head")}


def decoder_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the child modules that decode depth. Empty for a model without a depth decoder.

    Raises:
        ValueError: the model has a depth decoder that is not supported.
    """
    if type(model).__name__ not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES.values():
        return ()
    config: Any = model.config
    if config.model_type not in DECODERS:
        raise ValueError(
            f"{type(model).__name__} has a depth decoder that is not supported; those of {sorted(DECODERS)} are. "
            "Pass its backbone instead; it then gets a new head."
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

    The config of Depth Anything says it. GLPN is trained on metric depth, DPT on inverse depth. Some later DPT weights
    (`facebook/dpt-dinov2-*-nyu`, `-kitti`) are metric, but nothing in their files says so: set `decoder_output` then.
    """
    config: Any = model.config
    if config.model_type == "depth_anything":
        return "depth" if config.depth_estimation_type == "metric" else "inverse"
    return "depth" if config.model_type == "glpn" else "inverse"


def check_grid(model: nn.Module, pixels: Tensor, patch: tuple[int, int]) -> None:
    """Refuse images whose patches the model's decoder would put on a wrong grid.

    Raises:
        ValueError: the model is a DPT that assumes a square patch grid, and the image is not square.
    """
    config: Any = model.config
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    if config.model_type == "dpt" and getattr(model, "backbone", None) is None and rows != columns:
        raise ValueError(
            f"This DPT assumes a square patch grid, but the image has {rows} x {columns} patches. Resize or crop it "
            "to a square, or use a DPT with an AutoBackbone."
        )


class DepthScale(Recorded):
    """Turns the prediction of a depth decoder into depth.

    output="inverse": such decoders predict inverse depth up to a factor. Inverse depth is therefore
    `scale * prediction + 1 / max_depth` with one trained scale. The scale is 1 until the first training batch, which
    sets it so that the mean logarithms over the valid pixels agree. The factor may be a thousand, which training alone
    would not reach at an ordinary learning rate. output="depth": the prediction is the depth. In both cases depth is
    limited to [min_depth, max_depth].

    Args:
        output: what the decoder predicts, "inverse" or "depth".
        min_depth: smallest depth.
        max_depth: largest depth.

    Attributes:
        started: () the scale that the first batch has set, or 0 before it. A buffer, because FSDP discards what a
            forward pass writes into a parameter.
        log_scale: (1,) logarithm of what training has multiplied this scale by.
    """

    started: Tensor

    def __init__(self, output: DecoderOutput, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.output = output
        self.min_depth, self.max_depth = min_depth, max_depth
        if output == "inverse":
            self.log_scale = nn.Parameter(torch.zeros(1))  # FSDP takes no scalars
        else:  # under the same name, so that a file of the other kind is told by its settings
            self.register_buffer("log_scale", torch.zeros(1))
        self.register_buffer("started", torch.zeros(()))  # no bool, of which EMA could take no average

    def forward(self, predicted: Tensor, size: tuple[int, int]) -> Tensor:
        """Depth (B, rows, columns) at `size`, float32, from the decoder's prediction (B, h, w)."""
        predicted = F.interpolate(predicted[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        if self.output == "depth":
            return predicted.clamp(self.min_depth, self.max_depth)
        start = torch.where(self.started > 0, self.started.float(), 1.0)
        inverse = predicted.clamp(min=0) * (start * self.log_scale.float().exp()) + 1 / self.max_depth
        return 1 / inverse.clamp(max=1 / self.min_depth)

    @torch.no_grad()
    def start(self, predicted: Tensor, target: Tensor, valid: Tensor) -> None:
        """Set the scale from the first batch; later calls change nothing. All processes take the mean over all of
        them.

        Args:
            predicted: (B, h, w) prediction of the decoder.
            target: (B, H, W) true depth.
            valid: (B, H, W) bool, True where the target is known.

        Raises:
            RuntimeError: the scale is one of the copies of nn.DataParallel, which are thrown away.
        """
        if self.output == "depth":
            return
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel throws away the scale that the first batch sets for the depth decoder, and would "
                "set another one in every step. Start one process per device: torchrun --nproc-per-node 2 train.py."
            )
        size = (target.shape[-2], target.shape[-1])
        inverse = F.interpolate(predicted[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        valid = valid & (inverse > 0) & torch.isfinite(inverse)
        error = -torch.where(valid, target, 1.0).log() - torch.where(valid, inverse, 1.0).log()
        sums = torch.stack([torch.where(valid, error, 0.0).sum(), valid.sum().float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        limits = torch.finfo(self.started.dtype)
        found = (sums[0] / sums[1].clamp(min=1)).exp().clamp(limits.tiny, limits.max)
        self.started.copy_(torch.where((self.started == 0) & (sums[1] > 0), found, self.started))

    def extra_repr(self) -> str:
        return f"output={self.output!r}, depth {self.min_depth:g} to {self.max_depth:g}"
