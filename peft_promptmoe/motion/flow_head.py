# SPDX-License-Identifier: Apache-2.0
"""Head that computes optical flow from the feature maps of two frames: match all cells, then refine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvexUpsampling, Reduce, cell_grid, sample
from .record import Recorded

HIDDEN, UPDATE, RADIUS = 64, 96, 2


def correlate(one: Tensor, two: Tensor) -> Tensor:
    """Cosine similarity of every cell of frame 1 with every cell of frame 2.

    Args:
        one: (B, C, H, W) map of frame 1.
        two: (B, C, H, W) map of frame 2.

    Returns:
        (B, H * W, H * W)
    """
    one, two = F.normalize(one.flatten(2), dim=1), F.normalize(two.flatten(2), dim=1)
    return torch.einsum("bcn,bcm->bnm", one, two)


def expected_flow(scores: Tensor, grid: Tensor) -> Tensor:
    """Flow to the expected position in frame 2 under a softmax over its cells.

    Args:
        scores: (B, H * W, H * W), one row per cell of frame 1.
        grid: (2, H, W) coordinates of the cells.

    Returns:
        Flow (B, 2, H, W), in cells.
    """
    target = torch.einsum("bnm,cm->bcn", scores.softmax(dim=-1), grid.flatten(1))
    return target.unflatten(2, grid.shape[1:]) - grid


def look_up(correlation: Tensor, targets: Tensor, radius: int = RADIUS) -> Tensor:
    """For every cell of frame 1, read the correlation in a window around its current position in frame 2.

    Args:
        correlation: (B, H * W, H * W) from `correlate`.
        targets: (B, 2, H, W) positions in frame 2, in cells.
        radius: half the side of the window, in cells.

    Returns:
        (B, (2 * radius + 1)^2, H, W), the window row by row.
    """
    batch, _, rows, columns = targets.shape
    steps = torch.arange(-radius, radius + 1, device=targets.device, dtype=targets.dtype)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)  # (2, taps), x and y
    positions = targets.permute(0, 2, 3, 1).reshape(-1, 2, 1, 1) + offsets[:, None]  # (B H W, 2, 1, taps)
    taps = sample(correlation.reshape(-1, 1, rows, columns), positions)
    return taps.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


class FlowHead(Recorded):
    """Flow head: global matching, then local refinement, with far fewer parameters than a flow network.

    Our reading of the light decoder of ProMotion (arXiv 2406.04999). Matching is as in GMFlow (arXiv 2111.13680),
    lookup and upsampling are as in RAFT (arXiv 2003.12039).

    Args:
        widths: channels of each level's map.
        stride: size of a cell of the first level in pixels, (rows, columns).
        channels: channels of the features that are matched.
        refinements: rounds of refinement after the first prediction.
    """

    def __init__(self, widths: Sequence[int], stride: tuple[int, int], channels: int = 64, refinements: int = 3):
        super().__init__()
        self.refinements = refinements
        self.stride = stride
        self.matching = Reduce(widths, channels)
        self.context = Reduce(widths, HIDDEN)
        self.temperature = nn.Parameter(torch.tensor([math.log(10.0)]))  # (1,): FSDP takes no scalars
        taps = (2 * RADIUS + 1) ** 2
        self.update = nn.Sequential(
            nn.Conv2d(taps + 2 + 2 * HIDDEN, UPDATE, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(UPDATE, UPDATE, 3, padding=1),
            nn.GELU(),
        )
        self.hidden_step = nn.Conv2d(UPDATE, HIDDEN, 1)
        self.flow_step = nn.Conv2d(UPDATE, 2, 1)
        nn.init.zeros_(self.flow_step.weight)
        nn.init.zeros_(self.flow_step.bias)  # type: ignore[arg-type]
        self.upsample = ConvexUpsampling(HIDDEN, stride)

    def forward(self, one: Sequence[Tensor], two: Sequence[Tensor], all_rounds: bool = True) -> list[Tensor]:
        """Predict the flow from frame 1 to frame 2.

        Args:
            one: maps of frame 1, (B, D_l, H_l, W_l) for each level.
            two: maps of frame 2, of the same shapes.
            all_rounds: whether to return the flow of every round or of the last round only.

        Returns:
            Flows (B, 2, H * s_r, W * s_c) in pixels, float32, in the order of the rounds.
        """
        context = self.context(one)
        correlation = correlate(self.matching(one).float(), self.matching(two).float())
        grid = cell_grid(context.shape[-2], context.shape[-1], context.device)
        flow = expected_flow(correlation * self.temperature.float().exp(), grid)
        hidden = torch.tanh(context)
        flows = []
        for round_ in range(self.refinements + 1):
            if round_:
                flow = flow.detach()
                taps = look_up(correlation, grid + flow)
                read = torch.cat([taps.to(hidden.dtype), flow.to(hidden.dtype), hidden, context], dim=1)
                update = self.update(read)
                hidden = torch.tanh(hidden + self.hidden_step(update))
                flow = flow + self.flow_step(update).float()
            if all_rounds or round_ == self.refinements:
                flows.append(self.upsample(flow, hidden) * flow.new_tensor(self.stride[::-1])[:, None, None])
        return flows
