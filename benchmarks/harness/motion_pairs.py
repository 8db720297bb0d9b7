# SPDX-License-Identifier: Apache-2.0
"""Generated pairs of one task, as the harness trains on them and as metrics read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moving_layers import IMAGENET, GeneratedPairs

COLUMNS = {"flow": ("pixel_values", "next_pixel_values", "flow_labels"), "depth": ("pixel_values", "depth_labels")}


class Pairs:
    """Pairs of one task, made once and kept."""

    def __init__(self, task: str, photos: Any, count: int, seed: int) -> None:
        made = GeneratedPairs(photos, count, seed)
        rows = [made[index] for index in range(count)]
        self.columns = {name: torch.stack([row[name] for row in rows]) for name in COLUMNS[task]}
        self.occluded = torch.stack([row["occluded"] for row in rows])
        self.labels = torch.zeros(count)

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return {name: values[chosen] for name, values in self.columns.items()}

    def noisy(self, spread: float, count: int) -> Dataset[dict[str, Tensor]]:
        """The first pairs with Gaussian noise on their frames, of a range of 255."""
        generator = torch.Generator().manual_seed(0)
        noise = spread / 255 / torch.tensor(IMAGENET[1])[:, None, None]

        def worn(name: str, values: Tensor) -> Tensor:
            values = values[:count]
            frames = name.endswith("pixel_values") and spread > 0
            return values + noise * torch.randn(values.shape, generator=generator) if frames else values

        columns = {name: worn(name, values) for name, values in self.columns.items()}
        columns["occluded"] = self.occluded[:count]
        return [{name: values[i] for name, values in columns.items()} for i in range(min(count, len(self)))]  # type: ignore[return-value]
