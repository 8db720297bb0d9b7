# SPDX-License-Identifier: Apache-2.0
"""Pure functions that make VAPT's prompts from an image.

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
LEAST_EPS = 1e-6  # epsilon of the official code's ViT
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda hidden: hidden.softmax(dim=-1),
    "identity": lambda hidden: hidden,
}


def grid_weights(tokens: Tensor, kernel: Tensor | None, grid: Grid, reduced: Grid, padding: int) -> Tensor:
    """Weights of the patches in each prompt: convolution and token-wise projector merged into one linear map.

    Both act on tokens only, and one kernel serves all channels. So the output of the convolution and its gradient need
    not be stored for any image.

    Args:
        tokens: (P, H' * W') token-wise projector.
        kernel: (1 or D, 1, K, K) convolution kernel. None: no convolution.
        grid: (H, W) patch grid.
        reduced: (H', W') grid after the convolution.
        padding: padding of the convolution, in patches.

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

    The norm is merged into the weights. So only `x` is stored for the backward pass, plus a float32 copy in half
    precision.

    Args:
        x: (B, N, D) patches before any norm.
        weights: (1 or D, P, N) from `grid_weights`.
        gain, bias: (D,) gain and bias of the layer norm.

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
    """Feature projector: z + scale * up(dropout(activation(down(z)))) (official code; the paper has no residual).

    Args:
        z: (B, P, D) prompts.
        down: (r, D) first matrix.
        up: (D, r) second matrix.
        activation: name of the activation.
        dropout: dropout probability.
        scale: (1,) trained scale. None: 1.

    Returns:
        (B, P, D).
    """
    hidden = ACTIVATE[activation](F.linear(z, down.to(z)))
    update = F.linear(F.dropout(hidden, dropout, training=dropout > 0.0), up.to(z))
    return z + update if scale is None else z + scale.to(z) * update


def temper(prompts: Tensor, eps: float | None) -> Tensor:
    """Return the prompts unchanged, with smaller gradients while they are near zero.

    Prompts start at zero. There the block's norm multiplies gradients by 1 / sqrt(epsilon): 1e3 for the ViTs of the
    official code, but 1e6 for transformers' ViT (epsilon 1e-12). The first step would then destroy the projector, or
    leave Adam's second moment too large for a thousand steps. So gradients near zero are scaled as if epsilon were at
    least `LEAST_EPS`.

    Args:
        prompts: (B, P, D).
        eps: epsilon of the block's norm. None: it has no norm.
    """
    if eps is None or eps >= LEAST_EPS or not prompts.requires_grad:
        return prompts
    values = prompts.detach()
    variance = values.var(dim=-1, correction=0, keepdim=True)
    factor = torch.where(variance < LEAST_EPS, ((variance + eps) / (variance + LEAST_EPS)).sqrt(), 1.0)
    return values + (prompts - values) * factor


def resample(tokens: Tensor, reduced: Grid, to: Grid) -> Tensor:
    """Resample a token-wise projector bilinearly to another grid. The sum of each prompt's weights is kept.

    Args:
        tokens: (P, H' * W') token-wise projector.
        reduced: old (H', W').
        to: new (H', W').

    Returns:
        (P, new H' * W').
    """
    maps = F.interpolate(tokens.unflatten(1, reduced)[:, None], size=to, mode="bilinear", align_corners=False)
    # Bilinear resampling does not keep the sum, but an image with equal patches everywhere should give the same
    # prompt. So the difference is spread evenly.
    share = (to[0] * to[1]) / (reduced[0] * reduced[1])
    maps = maps[:, 0].flatten(1) / share
    return maps + (tokens.sum(dim=1, keepdim=True) - maps.sum(dim=1, keepdim=True)) / maps.shape[1]
