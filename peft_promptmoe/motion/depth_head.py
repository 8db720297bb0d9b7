# SPDX-License-Identifier: Apache-2.0
"""Head that computes depth from the feature maps of one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import ConvexUpsampling, Reduce
from .record import Recorded

HIDDEN, UPDATE = 64, 96
START = 5  # an untrained head predicts max_depth / START


class DepthHead(Recorded):
    """Depth head: predicts inverse depth by a sigmoid from `1 / max_depth` to `1 / min_depth`, then refines it.

    Our reading of the light decoder of ProMotion (arXiv 2406.04999). An untrained head predicts about `max_depth / 5`.
    The middle of the sigmoid would be about twice `min_depth`, and training would need long to leave it.

    Args:
        widths: channels of each level's map.
        stride: size of a cell of the first level in pixels, (rows, columns).
        channels: channels of the map that the levels are merged into.
        refinements: rounds of refinement after the first prediction.
        min_depth: smallest depth that can be predicted.
        max_depth: largest depth that can be predicted.
    """

    def __init__(
        self,
        widths: Sequence[int],
        stride: tuple[int, int],
        channels: int = HIDDEN,
        refinements: int = 2,
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
    ) -> None:
        super().__init__()
        self.refinements = refinements
        self.nearest, self.farthest = 1 / min_depth, 1 / max_depth  # as inverse depths
        self.context = Reduce(widths, channels)
        self.first = nn.Conv2d(channels, 1, 3, padding=1)
        start = min(START * self.farthest, (self.nearest + self.farthest) / 2)
        nn.init.constant_(self.first.bias, math.log((start - self.farthest) / (self.nearest - start)))  # type: ignore[arg-type]
        self.update = nn.Sequential(nn.Conv2d(2 * channels + 1, UPDATE, 3, padding=1), nn.GELU())
        self.hidden_step = nn.Conv2d(UPDATE, channels, 1)
        self.depth_step = nn.Conv2d(UPDATE, 1, 1)
        nn.init.zeros_(self.depth_step.weight)
        nn.init.zeros_(self.depth_step.bias)  # type: ignore[arg-type]
        self.upsample = ConvexUpsampling(channels, stride)

    def forward(self, maps: Sequence[Tensor], all_rounds: bool = True) -> list[Tensor]:
        """Predict depth.

        Args:
            maps: (B, D_l, H_l, W_l) for each level.
            all_rounds: whether to return the depth of every round or of the last round only.

        Returns:
            Depths (B, H * s_r, W * s_c), float32, in the order of the rounds.
        """
        context = self.context(maps)
        hidden, logit = torch.tanh(context), self.first(context)
        depths = []
        for round_ in range(self.refinements + 1):
            if round_:
                logit = logit.detach()
                update = self.update(torch.cat([hidden, context, logit], dim=1))
                hidden = torch.tanh(hidden + self.hidden_step(update))
                logit = logit + self.depth_step(update)
            if all_rounds or round_ == self.refinements:
                share = self.upsample(logit, hidden)[:, 0].sigmoid()
                depths.append(1 / (self.farthest + (self.nearest - self.farthest) * share))
        return depths
