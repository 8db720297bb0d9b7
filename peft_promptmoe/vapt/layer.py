# SPDX-License-Identifier: Apache-2.0
"""The VAPT layer: static prompts or prompts made from the image, and the shared feature projector."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter_state import AdapterState, AffineTable, PromptTable, SharedLayer
from ..engine.key_value import KeyValueLayer
from ..models.patches import Grid
from ..models.sites import Site
from ..routing.prompt_call import PromptCall
from ..routing.router import without_autocast
from .config import MAX_MAPS, MAX_VALUES, VAPTConfig
from .generator import aggregate, grid_weights, project_features, resample, temper

PROJECTOR = ("vapt_down", "vapt_up", "vapt_scale")


class VAPTState(AdapterState):
    """Base of the modules with a feature projector: `vapt_down` (r, D), `vapt_up` (D, r), `vapt_scale` (1,)."""

    adapter_layer_names: tuple[str, ...] = PROJECTOR

    vapt_down: nn.ModuleDict
    vapt_up: nn.ModuleDict
    vapt_scale: nn.ModuleDict

    def make_tables(self) -> None:
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    def add_projector(self, adapter: str, config: VAPTConfig, width: int) -> None:
        """Add an adapter's feature projector, initialised like torch's linear layers (official code)."""
        down, up = nn.Linear(width, config.bottleneck_dim, bias=False), nn.Linear(config.bottleneck_dim, width, False)
        self.vapt_down[adapter] = PromptTable(down.weight.detach() / config.projector_scale)
        self.vapt_up[adapter] = PromptTable(up.weight.detach() / config.projector_scale)
        if config.learnable_scale:
            self.vapt_scale[adapter] = PromptTable(torch.ones(1))


class VAPTLayer(VAPTState, KeyValueLayer):
    """Prompts of one attention layer, static or made from the image, for any number of adapters.

    Trained tensors per adapter in a static layer: `vapt_prompts` (P, D). In other layers: `vapt_norms` (D,) twice,
    `vapt_kernel` (1 or D, 1, K, K), `vapt_token_prompts` weight (P, H' * W') and bias (P,), and the feature projector
    if layers do not share it.
    """

    adapter_layer_names = (
        "vapt_prompts",
        "vapt_norms",
        "vapt_kernel",
        "vapt_token_prompts",
        *PROJECTOR,
    )
    method = "VAPT"
    unrouted = "makes its prompts from the image and has no router"

    vapt_prompts: nn.ModuleDict
    vapt_norms: nn.ModuleDict
    vapt_kernel: nn.ModuleDict
    vapt_token_prompts: nn.ModuleDict

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.make_tables()

    def update_layer(self, adapter: str, config: VAPTConfig) -> None:
        patches, width, count = self.site.patches, self.site.width, config.num_virtual_tokens
        assert patches is not None
        self.prompt_config[adapter] = config
        if config.is_static(self.site.index):
            fan = patches.embedding.in_channels * math.prod(patches.size) + width
            bound = math.sqrt(6.0 / fan) if config.init_weights else 1.0
            self.vapt_prompts[adapter] = PromptTable(torch.empty(count, width).uniform_(-bound, bound))
            return
        rows, columns = config.reduced(patches.grid(config.image_shape))
        self.vapt_norms[adapter] = AffineTable(torch.ones(width), torch.zeros(width))
        projector = nn.Linear(rows * columns, count)
        if config.use_conv:
            channels, side = width if config.channelwise_kernel else 1, config.kernel_size
            self.vapt_kernel[adapter] = PromptTable(torch.randn(channels, 1, side, side))
        if config.init_weights:
            nn.init.zeros_(projector.weight)
            nn.init.zeros_(projector.bias)
        self.vapt_token_prompts[adapter] = AffineTable(projector.weight.detach(), projector.bias.detach())
        if config.use_projector and not config.share_projector:
            self.add_projector(adapter, config, width)

    def rows(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        config = self.prompt_config[adapter]
        if adapter in self.vapt_prompts:
            prompts = self.vapt_prompts[adapter]()[None]
            if not self.training or config.prompt_dropout == 0.0:
                return prompts
            return F.dropout(prompts.expand(x.shape[0], -1, -1), config.prompt_dropout)
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "torch's older ONNX export, which traces the model, computes VAPT's prompts wrongly. Export with "
                "dynamo=True."
            )
        assert self.grids is not None and self.site.patches is not None
        with without_autocast(x):
            grid = self.grids.of(x.shape[1] - self.site.patches.prefix)
            prompts = self._adapt(adapter, config, x, grid)
            return temper(prompts, getattr(self.site.norm, "eps", None))

    def _adapt(self, adapter: str, config: VAPTConfig, x: Tensor, grid: Grid) -> Tensor:
        """Prompts (B, P, D) made from the patches in `x` (B, T, D), which form the grid `grid`."""
        assert self.site.patches is not None
        kernel = self.vapt_kernel[adapter]() if config.use_conv else None
        tokens, bias = self.vapt_token_prompts[adapter]()
        tokens = self._fitted(tokens, adapter, config, grid)
        weights = grid_weights(tokens, kernel, grid, config.reduced(grid), config.padding)
        z = aggregate(x[:, self.site.patches.prefix :], weights, *self.vapt_norms[adapter]())
        if self.training and config.use_conv and config.channel_dropout > 0.0:
            z = z * F.dropout(torch.ones_like(z[:, :1]), config.channel_dropout)
        z = z + bias.to(z.dtype)[:, None]
        if not config.use_projector:
            return z
        owner: Any = self.shared[0] if config.share_projector else self
        scale = owner.vapt_scale[adapter]() if config.learnable_scale else None
        dropout = config.projector_dropout if self.training else 0.0
        down = owner.vapt_down[adapter]() * config.projector_scale
        up = owner.vapt_up[adapter]() * config.projector_scale
        return project_features(z, down, up, config.activation, dropout, scale)

    def reads_input(self, adapter: str) -> bool:
        return adapter not in self.vapt_prompts

    def uses_grid(self, adapter: str) -> bool:
        return adapter not in self.vapt_prompts

    def wants_shared(self, adapter: str) -> bool:
        config = self.prompt_config[adapter]
        return self.uses_grid(adapter) and config.use_projector and config.share_projector

    def _fitted(self, tokens: Tensor, adapter: str, config: VAPTConfig, grid: Grid) -> Tensor:
        """The token-wise projector (P, H' * W') for this grid."""
        assert self.site.patches is not None
        own = self.site.patches.grid(config.image_shape)
        if grid == own:
            return tokens
        check_grid(config, grid, self.site.width)
        if not config.resample_grid:
            raise ValueError(
                f"The adapter {adapter!r} was made for a grid of {own[0]} x {own[1]} patches (image_size="
                f"{config.image_size}), but these images have {grid[0]} x {grid[1]}. Resize the images, make the "
                "adapter with another image_size, or set resample_grid=True."
            )
        if self.training and not torch.compiler.is_compiling():
            warnings.warn(
                f"The prompts are made for a grid of {own[0]} x {own[1]} patches (image_size={config.image_size}), "
                f"but the images have {grid[0]} x {grid[1]}, so weights are resampled in every forward pass. Make "
                "the adapter with the image_size of your images.",
                stacklevel=2,
            )
        return resample(tokens, config.reduced(own), config.reduced(grid))


class VAPTShared(VAPTState, SharedLayer):
    """The feature projector that all non-static layers of an adapter share."""

    def __init__(self, anchor: nn.Module, width: int) -> None:
        super().__init__(anchor, width)
        self.make_tables()

    def update_layer(self, adapter: str, config: VAPTConfig) -> None:
        self.prompt_config[adapter] = config
        self.add_projector(adapter, config, self.width)


def check_grid(config: VAPTConfig, grid: Grid, width: int) -> None:
    """Raise ValueError if the kernel does not fit on the patch grid, or if sizes need too much memory."""
    if config.use_conv and (config.kernel_size > min(grid) or min(config.reduced(grid)) < 1):
        raise ValueError(
            f"kernel_size={config.kernel_size} with padding={config.padding} is larger than the grid of {grid[0]} x "
            f"{grid[1]} patches. Choose a smaller kernel_size, or use_conv=False."
        )
    rows, columns = config.reduced(grid)
    projector = config.num_virtual_tokens * rows * columns
    if projector > MAX_VALUES:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens} prompts of {rows} x {columns} patches are {projector} "
            f"values per layer; at most {MAX_VALUES} are allowed. Use fewer prompts, less padding or a smaller "
            "image_size."
        )
    kernel = config.kernel_size**2 * width if config.use_conv and config.channelwise_kernel else 0
    if kernel > MAX_VALUES or (kernel and projector * width > MAX_MAPS):
        raise ValueError(
            f"channelwise_kernel=True with kernel_size={config.kernel_size}, padding={config.padding} and "
            f"num_virtual_tokens={config.num_virtual_tokens} needs too much memory at width {width}. Use "
            "channelwise_kernel=False, a smaller kernel_size, less padding or fewer prompts."
        )
    if 2 * config.bottleneck_dim * width > MAX_VALUES:
        raise ValueError(
            f"bottleneck_dim={config.bottleneck_dim} is too large for width {width}: at most {MAX_VALUES} values are "
            "allowed."
        )
