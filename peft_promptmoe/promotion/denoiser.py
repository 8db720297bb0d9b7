# SPDX-License-Identifier: Apache-2.0
"""Pure functions of a unit's denoiser.

Letters: `B` images, `N` patches, `d` unit width, `h` heads, `M` steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.router import routing_dtype

LEAST_ENERGY = 1e-12  # lower bound: tokens of zeros then have a loss of zero


def attention_step(z: Tensor, subspace: Tensor, output: Tensor, gain: Tensor, heads: int) -> Tensor:
    """z + gain * Attention(z) output: a step towards the subspaces of an image's patches (CRATE, arXiv 2306.01129).

    Args:
        z: (B, N, d) patches.
        subspace: (d, d) one projection for queries, keys and values.
        output: (d, d) output projection.
        gain: () or (1,) size of the step.
        heads: number of heads h, a divisor of d.

    Returns:
        (B, N, d).
    """
    parts = F.linear(z, subspace.to(z)).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, N, d / h)
    attended = F.scaled_dot_product_attention(parts, parts, parts).transpose(1, 2).flatten(2)
    return z + gain.to(z) * F.linear(attended, output.to(z))


def token_step(y: Tensor, hidden: tuple[Tensor, Tensor], token: tuple[Tensor, Tensor]) -> Tensor:
    """y + token(gelu(hidden(y))), for each patch separately.

    Args:
        y: (B, N, d).
        hidden: weight (2d, d) and bias (2d,).
        token: weight (d, 2d) and bias (d,).

    Returns:
        (B, N, d).
    """
    inner = F.gelu(F.linear(y, hidden[0].to(y), hidden[1].to(y)))
    return y + F.linear(inner, token[0].to(y), token[1].to(y))


def denoise(z: Tensor, tensors: dict[str, Tensor], steps: int, heads: int) -> Tensor:
    """All M denoising steps, one after the other.

    Args:
        z: (B, N, d).
        tensors: for `attention_step`, if used, `subspace` and `output` (M, d, d) and `gain` (M,). For `token_step`,
            if used, `hidden_weight` (M, 2d, d), `hidden_bias` (M, 2d), `token_weight` (M, d, 2d) and `token_bias`
            (M, d).
        steps: number of steps M.
        heads: number of heads h.

    Returns:
        (B, N, d).
    """
    for step in range(steps):
        own = {name: tensor[step] for name, tensor in tensors.items()}
        if "subspace" in own:
            z = attention_step(z, own["subspace"], own["output"], own["gain"], heads)
        if "hidden_weight" in own:
            hidden, token = (own["hidden_weight"], own["hidden_bias"]), (own["token_weight"], own["token_bias"])
            z = token_step(z, hidden, token)
    return z


def add_noise(z: Tensor, std: float, noise: Tensor) -> Tensor:
    """z + std * rms(z) * noise, with the root mean square of each patch. No gradient flows through rms(z).

    Args:
        z: (B, N, d).
        noise: (B, N, d) of standard normal numbers.

    Returns:
        (B, N, d).
    """
    rms = z.detach().to(routing_dtype(z)).square().mean(dim=-1, keepdim=True).sqrt()
    return z + (std * rms).to(z.dtype) * noise


def denoising_loss(found: Tensor, clean: Tensor) -> Tensor:
    """mean (found - clean)^2 / mean clean^2. Without any denoising it is the noise's variance, `noise_std`^2.

    Args:
        found: (B, N, d) output of the denoiser for the noisy patches.
        clean: (B, N, d) patches without noise. No gradient flows through them: patches of zero would score best.

    Returns:
        () in at least float32.
    """
    clean = clean.detach().to(routing_dtype(clean))
    energy = clean.square().mean().clamp(min=LEAST_ENERGY)
    return (found.to(clean.dtype) - clean).square().mean() / energy


def first_images(images: int, share: float) -> int:
    """Number of a batch's images that the denoiser learns from: the share, at least one."""
    return max(1, int(images * share))


def draw_noise(z: Tensor) -> Tensor:
    """Standard normal numbers (B, N, d) from torch's generator, whose state checkpointing restores."""
    return torch.randn_like(z)
