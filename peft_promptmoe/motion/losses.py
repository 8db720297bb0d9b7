# SPDX-License-Identifier: Apache-2.0
"""Losses of flow and depth over the pixels with a known label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GAMMA = 0.8  # weight of a round relative to the next round
FOCUS = 0.85  # how much of the mean error (a wrong scale) the depth loss forgives
FLOOR = 1e-8  # added under the root: its gradient is infinite at zero


def valid_flow(target: Tensor, max_flow: float, mask: Tensor | None = None) -> Tensor:
    """Pixels that count in the flow loss: finite, shorter than `max_flow`, and not masked out.

    Args:
        target: (B, 2, H, W) true flow, NaN or infinite where unknown.
        max_flow: longest flow in pixels.
        mask: (B, H, W), True or above 0 where a pixel counts.

    Returns:
        (B, H, W) bool.
    """
    known = torch.isfinite(target).all(dim=1)
    known &= torch.where(known[:, None], target, 0.0).norm(dim=1) < max_flow
    return known if mask is None else known & (mask > 0)


def valid_depth(target: Tensor, min_depth: float, max_depth: float, mask: Tensor | None = None) -> Tensor:
    """Pixels that count in the depth loss: finite, from `min_depth` to `max_depth`, and not masked out.

    Args:
        target: (B, H, W) true depth, zero, NaN or infinite where unknown.
        min_depth: smallest depth that counts.
        max_depth: largest depth that counts.
        mask: (B, H, W), True or above 0 where a pixel counts.

    Returns:
        (B, H, W) bool.
    """
    known = torch.isfinite(target) & (target >= min_depth) & (target <= max_depth)
    return known if mask is None else known & (mask > 0)


def flow_loss(flows: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Flow loss: sum over the n rounds of `0.8^(n - 1 - i)` times the mean over valid pixels of |f_i - f|_1.

    Source: RAFT's sequence loss, in the form of ProtoFormer (arXiv 2406.01559).

    Args:
        flows: (B, 2, H, W) of each round, in order.
        target: (B, 2, H, W) true flow.
        valid: (B, H, W) bool. Without any valid pixel the loss is 0.
    """
    target = torch.where(valid[:, None], target, 0.0)
    pixels = valid.sum().clamp(min=1)
    errors = [torch.where(valid, (flow - target).abs().sum(dim=1), 0.0).sum() / pixels for flow in flows]
    return _by_round(errors)


def depth_loss(depths: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Depth loss: sum over the n rounds of `0.8^(n - 1 - i)` times `10 sqrt(mean g^2 - 0.85 mean(g)^2)`.

    g is the difference of the logarithms of predicted and true depth.

    Source: the scale-invariant loss of Eigen et al. (arXiv 1406.2283), in the form of ProtoFormer (arXiv 2406.01559).

    Args:
        depths: (B, H, W) positive depths of each round, in order.
        target: (B, H, W) true depth.
        valid: (B, H, W) bool. Without any valid pixel the loss is 0.
    """
    target = torch.where(valid, target, 1.0).log()
    pixels = valid.sum().clamp(min=1)
    errors = []
    for depth in depths:
        g = torch.where(valid, torch.where(valid, depth, 1.0).log() - target, 0.0)
        spread = g.square().sum() / pixels - FOCUS * (g.sum() / pixels).square()
        errors.append(10 * spread.clamp(min=FLOOR).sqrt())
    return torch.where(valid.any(), _by_round(errors), 0.0 * _by_round(errors))


def _by_round(errors: Sequence[Tensor]) -> Tensor:
    weighted = [GAMMA ** (len(errors) - 1 - i) * error for i, error in enumerate(errors)]
    return torch.stack(weighted).sum()
