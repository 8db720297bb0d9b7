# SPDX-License-Identifier: Apache-2.0
"""A plain bottleneck adapter (arXiv 1902.00751) behind frozen blocks, to measure ProMotion's units against."""

from typing import Any

from torch import Tensor, nn

from .remembered import blocks_of

WIDTH = 32  # a ProMotion unit's default


class Bottleneck(nn.Module):
    """x + up(gelu(down(norm(x)))), which is x at first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(self.norm(x))))


def add_bottlenecks(model: Any, blocks: list[int], inner: int = WIDTH) -> nn.Module:
    """Put one behind each of the blocks of a DINOv2 in a `FlowModel` or `DepthModel`; all else of it is as it was."""
    layers = blocks_of(model)
    model.bottlenecks = nn.ModuleList(Bottleneck(model.backbone.config.hidden_size, inner) for _ in blocks)
    for block, adapter in zip(blocks, model.bottlenecks, strict=True):
        layers[block].register_forward_hook(lambda module, args, output, adapter=adapter: _through(adapter, output))
    return model  # type: ignore[no-any-return]


def _through(adapter: nn.Module, output: Any) -> Any:
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)
