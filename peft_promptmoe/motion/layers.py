# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the heads for flow and depth: padding, resizing, merging of levels, sampling, upsampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images padded to whole patches, at the right and at the bottom, by repeating their border."""
    rows, columns = (-length % size for length, size in zip(pixels.shape[-2:], patch, strict=True))
    return F.pad(pixels, (0, columns, 0, rows), mode="replicate") if rows or columns else pixels


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, rows, columns) resized to another size, bilinearly."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Flow resized to another size. Its values are scaled like the axes."""
    ratio = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])
    return resize(flow, size) * ratio[:, None, None]


def cell_grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """Coordinates (x, y) of all cells, (2, rows, columns). Cell centres are at integers."""
    y, x = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([x, y])


def sample(maps: Tensor, positions: Tensor) -> Tensor:
    """Read maps at positions, bilinearly. Outside the map, the nearest border cell is read.

    Args:
        maps: (B, C, rows, columns).
        positions: (B, 2, P, Q) coordinates (x, y) in cells. Cell centres are at integers.

    Returns:
        (B, C, P, Q)
    """
    rows, columns = maps.shape[-2:]
    x = positions[:, 0] * (2 / max(columns - 1, 1)) - 1
    y = positions[:, 1] * (2 / max(rows - 1, 1)) - 1
    return F.grid_sample(maps, torch.stack([x, y], dim=-1), align_corners=True, padding_mode="border")


def convex_upsample(coarse: Tensor, logits: Tensor, stride: tuple[int, int]) -> Tensor:
    """Upsample: every fine pixel is a weighted mean of the 3 x 3 cells around its own cell (RAFT, arXiv 2003.12039).

    Args:
        coarse: (B, C, rows, columns).
        logits: (B, 9 * s_r * s_c, rows, columns). A softmax over the nine cells gives the weights.
        stride: (s_r, s_c) size of a cell in pixels.

    Returns:
        (B, C, rows * s_r, columns * s_c)
    """
    batch, channels, rows, columns = coarse.shape
    weights = logits.view(batch, 1, 9, *stride, rows, columns).softmax(dim=2)
    around = F.unfold(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), 3).view(batch, channels, 9, 1, 1, rows, columns)
    fine = (weights * around).sum(dim=2)  # (B, C, s_r, s_c, rows, columns)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, rows * stride[0], columns * stride[1])


class Reduce(nn.Module):
    """Merges the maps of several levels: a norm for each level, then one linear layer over all channels.

    Args:
        widths: channels of each level's map.
        channels: channels of the result.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.linear = nn.Linear(sum(widths), channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, channels, H, W) from maps (B, D_l, H_l, W_l). All levels are resized to the grid of the first."""
        size = maps[0].shape[-2:]
        maps = [m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear", antialias=True) for m in maps]
        rows = [norm(m.permute(0, 2, 3, 1)) for norm, m in zip(self.norms, maps, strict=True)]
        return self.linear(torch.cat(rows, dim=-1)).permute(0, 3, 1, 2)


class ConvexUpsampling(nn.Module):
    """Convex upsampling with weights computed from a hidden map.

    Args:
        hidden: channels of the hidden map.
        stride: size of a cell in pixels, (rows, columns).
    """

    def __init__(self, hidden: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.weights = nn.Sequential(nn.Conv2d(hidden, 64, 1), nn.GELU(), nn.Conv2d(64, 9 * stride[0] * stride[1], 1))

    def forward(self, coarse: Tensor, hidden: Tensor) -> Tensor:
        """(B, C, rows * s_r, columns * s_c), float32, from `coarse` (B, C, rows, columns)."""
        return convex_upsample(coarse.float(), self.weights(hidden).float(), self.stride)
