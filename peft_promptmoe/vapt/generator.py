# SPDX-License-Identifier: Apache-2.0
"""How VAPT makes prompts of an image: pure functions.

Letters: `B` batch, `N = H * W` patches, `D` width, `P` prompts, `K` kernel side, `r` bottleneck width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.patches import Grid
from ..routing.router import routing_dtype

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

    The norm is folded into the weights of the sums, so that nothing of the size of `x` is saved but `x` itself, and in
    half precision its float32 copy.

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
        scaled = (weights.to(dtype) * scale[:, None]).to(x.dtype)  # (B, P, N)
        normed = torch.matmul(scaled, x).to(dtype) - (scaled.to(dtype) @ mean[..., None])
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
    hidden = ACTIVATE[activation](F.linear(z, down.to(z)))
    update = F.linear(F.dropout(hidden, dropout, training=dropout > 0.0), up.to(z))
    return z + update if scale is None else z + scale.to(z) * update


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
