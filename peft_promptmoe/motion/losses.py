# SPDX-License-Identifier: Apache-2.0
"""Losses of flow and depth over the pixels whose true value is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GAMMA = 0.8  # weight of a round beside the next one's
FOCUS = 0.85  # share of the mean error, the scale, that the depth loss forgives
FLOOR = 1e-8  # under the root, whose gradient has no limit at zero


def valid_flow(target: Tensor, max_flow: float, mask: Tensor | None = None) -> Tensor:
    """Pixels whose flow counts: finite, shorter than `max_flow`, and not masked out.

    Args:
        target: (B, 2, H, W); NaN or infinite where unknown.
        max_flow: in pixels of `target`.
        mask: (B, H, W), true where it counts.

    Returns:
        (B, H, W) of bool.
    """
    known = torch.isfinite(target).all(dim=1)
    known &= torch.where(known[:, None], target, 0.0).norm(dim=1) < max_flow
    return known if mask is None else known & mask.bool()


def valid_depth(target: Tensor, min_depth: float, max_depth: float, mask: Tensor | None = None) -> Tensor:
    """Pixels whose depth counts: finite, from `min_depth` to `max_depth`, and not masked out.

    Args:
        target: (B, H, W); zero, NaN or infinite where unknown.
        mask: (B, H, W), true where it counts.

    Returns:
        (B, H, W) of bool.
    """
    known = torch.isfinite(target) & (target >= min_depth) & (target <= max_depth)
    return known if mask is None else known & mask.bool()


def flow_loss(flows: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Sum over rounds of `0.8^(n - 1 - i)` times the mean over valid pixels of |f_i - f|_1; 0 where none is valid.

    Source: RAFT's sequence loss, in the form of ProtoFormer (arXiv 2406.01559).

    Args:
        flows: (B, 2, H, W) of each round, the last one last.
        target: (B, 2, H, W).
        valid: (B, H, W) of bool.
    """
    target = torch.where(valid[:, None], target, 0.0)
    pixels = valid.sum().clamp(min=1)
    errors = [torch.where(valid, (flow - target).abs().sum(dim=1), 0.0).sum() / pixels for flow in flows]
    return _by_round(errors)


def depth_loss(depths: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
    """Sum over rounds of `0.8^(n - 1 - i)` times `10 sqrt(mean g^2 - 0.85 mean(g)^2)`, g the difference of logarithms.

    Source: the scale-invariant loss of Eigen et al. (arXiv 1406.2283), in the form of ProtoFormer (arXiv 2406.01559).

    Args:
        depths: (B, H, W) of each round, the last one last, positive.
        target: (B, H, W).
        valid: (B, H, W) of bool; 0 is returned where none is.
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
