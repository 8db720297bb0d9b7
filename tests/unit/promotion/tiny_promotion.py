# SPDX-License-Identifier: Apache-2.0
"""Small models with units, and what the tests of ProMotion do with them."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Dinov2Backbone, Dinov2Config, Dinov2ForImageClassification

from peft_promptmoe import ProMotionConfig

WIDTH, DEPTH, PATCH, SIDE = 32, 3, 8, 32
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": 3,
}
SMALL: dict[str, Any] = {"num_prototypes": 3, "bottleneck_dim": 8}
DENSE = Case("promotion", "dinov2_backbone", "units", "sdpa")


def large(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights by which every token matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.1 * noise) if weight.ndim == 1 else weight.copy_(0.25 * noise)
    return model.eval()


def classifier(**settings: Any) -> nn.Module:
    """Of which all blocks' patches are read."""
    return large(Dinov2ForImageClassification(Dinov2Config(**SHAPE | settings)))


def backbone() -> Dinov2Backbone:
    stages = [f"stage{number + 1}" for number in range(DEPTH)]
    return large(Dinov2Backbone(Dinov2Config(**SHAPE, out_features=stages, apply_layernorm=False)))


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    chosen = SMALL | {"layers_to_transform": [0, 2]} | settings
    return get_peft_model(classifier() if base is None else base, ProMotionConfig(**chosen))


def images(count: int = 4, seed: int = 0, shape: tuple[int, int] = (SIDE, SIDE)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, *shape, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(3, (count,), generator=generator)}


def units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "promotion_up")]


def banks(model: nn.Module, adapter: str = "default") -> list[Any]:
    return [unit.promotion_bank[adapter] for unit in units(model)]


def trained(model: nn.Module, kind: str = "promotion_") -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and kind in name}


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """One training step, seeded; without an optimiser the gradients stay."""
    torch.manual_seed(7)
    loss = model.train()(**batch).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def sgd(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
