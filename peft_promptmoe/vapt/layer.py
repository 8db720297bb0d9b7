# SPDX-License-Identifier: Apache-2.0
"""How VAPT makes prompts of an image.

Letters: `B` batch, `N = H * W` patches, `D` width, `P` prompts, `K` kernel side, `r` bottleneck width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layer import PromptLayer
from ..routing import PromptCall, routing_dtype, without_autocast
from ..sites import Site
from ..state import AdapterState, PromptTable, SharedLayer
from ..vision import Grid
from .config import MAX_PROJECTOR, VAPTConfig

NORM_EPS = 1e-5  # official code: torch's default
LEAST_EPS = 1e-6  # that of the official code's ViT
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda hidden: hidden.softmax(dim=-1),
    "identity": lambda hidden: hidden,
}


def grid_weights(tokens: Tensor, kernel: Tensor | None, grid: Grid, reduced: Grid, padding: int) -> Tensor:
    """Weights of the patches in each prompt: the convolution and the token-wise projector in one linear map.

    Both act on tokens alone, and a kernel that is tied over the channels does the same in all of them; so neither the
    map that the convolution makes nor its gradient has to be kept for any image.

    Args:
        tokens: (P, H' * W') token-wise projector.
        kernel: (1 or D, 1, K, K) convolution kernel; None for no convolution.
        grid: (H, W).
        reduced: (H', W').
        padding: of the convolution.

    Returns:
        (1 or D, P, H * W).
    """
    if kernel is None:
        return tokens[None]
    channels = kernel.shape[0]
    maps = tokens.unflatten(1, reduced)[:, None].expand(-1, channels, -1, -1)
    spread = F.conv_transpose2d(maps, kernel, groups=channels)
    rows, columns = grid
    return spread[:, :, padding : padding + rows, padding : padding + columns].flatten(2).transpose(0, 1)


def aggregate(x: Tensor, weights: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Weighted sums of layer-normed patches.

    The norm is folded into the weights of the sums, so that nothing of the size of `x` is saved but `x` itself.

    Args:
        x: (B, N, D) patches before any norm.
        weights: (1 or D, P, N) of `grid_weights`.
        gain, bias: (D,) of the layer norm.

    Returns:
        (B, P, D) in at least float32.
    """
    dtype = routing_dtype(x)
    variance, mean = torch.var_mean(x.to(dtype), dim=-1, correction=0)
    scale = torch.rsqrt(variance + NORM_EPS)  # (B, N)
    sums = weights.sum(dim=-1).to(dtype)  # (1 or D, P)
    if weights.shape[0] == 1:
        scaled = weights.to(dtype) * scale[:, None]  # (B, P, N)
        normed = torch.matmul(scaled.to(x.dtype), x).to(dtype) - (scaled @ mean[..., None])
    else:
        centred = ((x.to(dtype) - mean[..., None]) * scale[..., None]).to(x.dtype)
        normed = torch.einsum("dpn,bnd->bpd", weights.to(x.dtype), centred).to(dtype)
    return normed * gain.to(dtype) + sums.T * bias.to(dtype)


def project_features(
    z: Tensor, down: Tensor, up: Tensor, activation: str, dropout: float, scale: Tensor | None
) -> Tensor:
    """z + scale * up(dropout(activation(down(z)))), the residual bottleneck (official code; the paper: no residual).

    Args:
        z: (B, P, D).
        down: (r, D).
        up: (D, r).
        scale: (1,) or None for 1.

    Returns:
        (B, P, D).
    """
    hidden = ACTIVATE[activation](F.linear(z, down.to(z.dtype)))
    update = F.linear(F.dropout(hidden, dropout, training=dropout > 0.0), up.to(z.dtype))
    return z + update if scale is None else z + scale.to(z.dtype) * update


def temper(prompts: Tensor, eps: float | None) -> Tensor:
    """The prompts themselves; while they are next to zero, their gradient as behind a norm of epsilon `LEAST_EPS`.

    Prompts start at zero, and there the block's norm multiplies gradients by 1 / sqrt(epsilon). That is 1e3 for the
    ViTs of the official code and 1e6 for transformers' ViT (1e-12), whose first step would throw the projector off or
    leave Adam's second moment too large for a thousand steps.

    Args:
        prompts: (B, P, D).
        eps: epsilon of the block's norm; None where it has none.
    """
    if eps is None or eps >= LEAST_EPS or not prompts.requires_grad:
        return prompts
    values = prompts.detach()
    variance = values.var(dim=-1, correction=0, keepdim=True)
    factor = torch.where(variance < LEAST_EPS, ((variance + eps) / (variance + LEAST_EPS)).sqrt(), 1.0)
    return values + (prompts - values) * factor


def resample(tokens: Tensor, reduced: Grid, to: Grid) -> Tensor:
    """A token-wise projector for another grid: bilinear between the old one's weights, each prompt's sum kept.

    Args:
        tokens: (P, H' * W').
        reduced: (H', W').
        to: the new (H', W').

    Returns:
        (P, new H' * W').
    """
    maps = F.interpolate(tokens.unflatten(1, reduced)[:, None], size=to, mode="bilinear", align_corners=False)
    # Bilinear points do not sum to what the old ones did in proportion; an image of the same patches everywhere should
    # give the same prompt, so the difference is spread evenly.
    share = (to[0] * to[1]) / (reduced[0] * reduced[1])
    maps = maps[:, 0].flatten(1) / share
    return maps + (tokens.sum(dim=1, keepdim=True) - maps.sum(dim=1, keepdim=True)) / maps.shape[1]


PROJECTOR = ("vapt_down", "vapt_up", "vapt_scale")


class VAPTState(AdapterState):
    """What a layer has, or all layers share: the feature projector `vapt_down` (r, D), `vapt_up` (D, r), `vapt_scale`
    (1,).
    """

    adapter_layer_names: tuple[str, ...] = PROJECTOR

    vapt_down: nn.ModuleDict
    vapt_up: nn.ModuleDict
    vapt_scale: nn.ModuleDict

    def make_tables(self) -> None:
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    def add_projector(self, adapter: str, config: VAPTConfig, width: int) -> None:
        """Give an adapter its feature projector, started as torch starts linear layers (official code)."""
        down, up = nn.Linear(width, config.bottleneck_dim, bias=False), nn.Linear(config.bottleneck_dim, width, False)
        self.vapt_down[adapter] = PromptTable(down.weight.detach())
        self.vapt_up[adapter] = PromptTable(up.weight.detach())
        if config.learnable_scale:
            self.vapt_scale[adapter] = PromptTable(torch.ones(1))


class VAPTLayer(VAPTState, PromptLayer):
    """Static or adaptive prompts of one attention layer, for any number of adapters.

    Trained tensors per adapter of a static layer: `vapt_prompts` (P, D). Of an adaptive one: `vapt_norm` (D,) twice,
    `vapt_kernel` (1 or D, 1, K, K), `vapt_token_prompts` weight (P, H' * W') and bias (P,), and the feature projector
    where layers do not share it.
    """

    adapter_layer_names = (
        "vapt_prompts",
        "vapt_norm",
        "vapt_kernel",
        "vapt_token_prompts",
        *PROJECTOR,
    )
    method = "VAPT"

    vapt_prompts: nn.ModuleDict
    vapt_norm: nn.ModuleDict
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
            fan = patches.embedding.weight[0].numel() + width
            bound = math.sqrt(6.0 / fan) if config.init_weights else 1.0
            self.vapt_prompts[adapter] = PromptTable(torch.empty(count, width).uniform_(-bound, bound))
            return
        rows, columns = config.reduced(patches.grid(config.image_shape))
        self.vapt_norm[adapter] = nn.LayerNorm(width, eps=NORM_EPS)
        self.vapt_token_prompts[adapter] = projector = nn.Linear(rows * columns, count)
        if config.use_conv:
            channels, side = width if config.channelwise_kernel else 1, config.kernel_size
            self.vapt_kernel[adapter] = PromptTable(torch.randn(channels, 1, side, side))
        if config.init_weights:
            nn.init.zeros_(projector.weight)
            nn.init.zeros_(projector.bias)
        if config.use_projector and not config.share_projector:
            self.add_projector(adapter, config, width)

    def rows(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        config = self.prompt_config[adapter]
        if adapter in self.vapt_prompts:
            prompts = self.vapt_prompts[adapter]()[None]
            if not self.training or config.prompt_dropout == 0.0:
                return prompts
            return F.dropout(prompts.expand(x.shape[0], -1, -1), config.prompt_dropout)
        assert self.grids is not None and self.site.patches is not None
        with without_autocast(x):
            prompts = self._adapt(adapter, config, x, self.grids.of(x.shape[1]))
            return temper(prompts, getattr(self.site.norm, "eps", None))

    def _adapt(self, adapter: str, config: VAPTConfig, x: Tensor, grid: Grid) -> Tensor:
        """(B, P, D) prompts made of the patches in `x` (B, T, D), which lie in `grid`."""
        assert self.site.patches is not None
        kernel = self.vapt_kernel[adapter]() if config.use_conv else None
        projector: Any = self.vapt_token_prompts[adapter]
        norm: Any = self.vapt_norm[adapter]
        tokens = self._tokens(adapter, config, grid)
        weights = grid_weights(tokens, kernel, grid, config.reduced(grid), config.padding)
        z = aggregate(x[:, self.site.patches.prefix :], weights, norm.weight, norm.bias)
        if self.training and config.use_conv and config.channel_dropout > 0.0:
            z = z * F.dropout(torch.ones_like(z[:, :1]), config.channel_dropout)
        z = z + projector.bias.to(z.dtype)[:, None]
        if not config.use_projector:
            return z
        owner: Any = self.shared[0] if config.share_projector else self
        scale = owner.vapt_scale[adapter]() if config.learnable_scale else None
        dropout = config.projector_dropout if self.training else 0.0
        down, up = owner.vapt_down[adapter](), owner.vapt_up[adapter]()
        return project_features(z, down, up, config.activation, dropout, scale)

    def uses_grid(self, adapter: str) -> bool:
        return adapter not in self.vapt_prompts

    def wants_shared(self, adapter: str) -> bool:
        config = self.prompt_config[adapter]
        return self.uses_grid(adapter) and config.use_projector and config.share_projector

    def _tokens(self, adapter: str, config: VAPTConfig, grid: Grid) -> Tensor:
        """(P, H' * W') token-wise projector for the grid that has come."""
        assert self.site.patches is not None
        projector: Any = self.vapt_token_prompts[adapter]
        tokens, own = projector.weight, self.site.patches.grid(config.image_shape)
        if grid == own:
            return tokens
        check_grid(config, grid)
        if not config.resample_grid:
            raise ValueError(
                f"The adapter {adapter!r} was made for a grid of {own[0]} x {own[1]} patches (image_size="
                f"{config.image_size}) and these images have {grid[0]} x {grid[1]}. Resize the images, make the "
                "adapter with another image_size, or set resample_grid=True."
            )
        if self.training and not torch.compiler.is_compiling():
            warnings.warn(
                f"The prompts are made for a grid of {own[0]} x {own[1]} patches (image_size={config.image_size}) and "
                f"train on images of {grid[0]} x {grid[1]}, resampled in every forward. Make the adapter with the "
                "image_size of your images.",
                stacklevel=2,
            )
        return resample(tokens, config.reduced(own), config.reduced(grid))


class VAPTShared(VAPTState, SharedLayer):
    """The feature projector that all adaptive layers of an adapter share."""

    def __init__(self, anchor: nn.Module, width: int) -> None:
        super().__init__(anchor, width)
        self.make_tables()

    def update_layer(self, adapter: str, config: VAPTConfig) -> None:
        self.prompt_config[adapter] = config
        self.add_projector(adapter, config, self.width)


def check_grid(config: VAPTConfig, grid: Grid) -> None:
    """Refuse a patch grid that the kernel does not fit on, or one so large that the projector fills the memory."""
    if config.use_conv and (config.kernel_size > min(grid) or min(config.reduced(grid)) < 1):
        raise ValueError(
            f"kernel_size={config.kernel_size} with padding={config.padding} is larger than the grid of {grid[0]} x "
            f"{grid[1]} patches. Choose a smaller kernel_size, or use_conv=False."
        )
    rows, columns = config.reduced(grid)
    if config.num_virtual_tokens * rows * columns > MAX_PROJECTOR:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens} prompts of {rows} x {columns} patches are "
            f"{config.num_virtual_tokens * rows * columns} values per layer; at most {MAX_PROJECTOR} are allowed. Use "
            "fewer prompts or a smaller image_size."
        )
