# SPDX-License-Identifier: Apache-2.0
"""Routers: what they read, what they choose, how they are balanced, and the record of what went where.

Letters: `B` batch, `T` tokens, `D` width, `E` experts, `K` active experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6  # of the unit-gain RMS norm that the router reads through (official code: the model's or 1e-6)


def routing_dtype(x: Tensor) -> torch.dtype:
    """Routers compute in float32, or in float64 where the model does."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast lets routers be; the meta device, which only counts, has no autocast to turn off."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def unit_rms(x: Tensor) -> Tensor:
    """Reciprocal root mean square of each token.

    Args:
        x: (B, T, D).

    Returns:
        (B, T) in at least float32.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=routing_dtype(x))
    return torch.rsqrt(norm.square() / x.shape[-1] + RMS_EPS)


def pooled_input(x: Tensor, real: Tensor | None, normalize: bool) -> Tensor:
    """Router input of sample routing: mean over the real tokens of the (RMS-normed) layer input.

    The norm is folded into the weights of the mean, so that nothing of the input's size is saved for the backward pass
    but the input itself. A sample without any real token gets zeros.

    Args:
        x: (B, T, D) layer input before the block's own norm.
        real: (B, T) which tokens count; None for all.
        normalize: whether each token is divided by its root mean square (unit gain).

    Returns:
        (B, D) in at least float32.
    """
    dtype = routing_dtype(x)
    weight = unit_rms(x) if normalize else torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    if real is None:
        weight = weight / x.shape[1]
    else:
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        weight = weight * real / count
    return torch.matmul(weight[:, None].to(x.dtype), x)[:, 0].to(dtype)


def token_logits(x: Tensor, weight: Tensor, center: Tensor | None, normalize: bool) -> Tensor:
    """Router logits of token routing, each token by its own (RMS-normed) layer input.

    Args:
        x: (B, T, D) layer input before the block's own norm.
        weight: (E, D).
        center: (D,) subtracted from every input, or None.

    Returns:
        (B, T, E) in at least float32.
    """
    dtype = routing_dtype(x)
    if normalize and not torch.is_grad_enabled():
        # One pass over the input; with a gradient it would save the normed input as well.
        logits = F.linear(F.rms_norm(x.to(dtype), x.shape[-1:], eps=RMS_EPS), weight.to(dtype))
    else:
        logits = F.linear(x, weight.to(x.dtype)).to(dtype)
        logits = _Scaled.apply(logits, unit_rms(x)) if normalize else logits
    return logits if center is None else logits - F.linear(center.to(dtype), weight.to(dtype))


class _Scaled(torch.autograd.Function):
    """Rows times positive factors; keeps what it returns, which the softmax over experts keeps anyway."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: Tensor) -> Tensor:
        scaled = rows * factors[..., None]
        ctx.save_for_backward(scaled, factors)
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        scaled, factors = ctx.saved_tensors
        return gradients[0] * factors[..., None], (gradients[0] * scaled).sum(dim=-1) / factors


def perturb(logits: Tensor, noise: float, dropout: float) -> Tensor:
    """Training noise on router logits: multiplicative Gaussian noise, then dropout of whole logits (official code)."""
    if noise > 0.0:
        # Its scale is not a path for the gradient.
        logits = logits + noise * torch.randn_like(logits) * logits.detach()
    return F.dropout(logits, dropout) if dropout > 0.0 else logits


def top_k_log_gates(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Log-gates of the `k` best experts.

    Args:
        logits: (..., E).
        k: active experts K.
        renormalize: whether the gates of the chosen experts sum to one; otherwise they are the softmax over all.

    Returns:
        log-gates (..., E), minus infinity outside the top k, and the chosen experts (..., K), best first.
    """
    if k == logits.shape[-1] and not renormalize:
        log_probs = torch.log_softmax(logits, dim=-1)
        return log_probs, log_probs.topk(k, dim=-1).indices
    best, index = best_gates(logits, k, renormalize)
    return spread_gates(best, index, logits.shape[-1]), index


def best_gates(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Log-gates (..., K) of the `k` best experts, best first, and which they are (..., K); see `top_k_log_gates`."""
    if not renormalize and not torch.is_grad_enabled():
        # Fewer operations; with a gradient it would keep another tensor of the logits' size.
        best, index = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
        return best, index
    best, index = logits.topk(k, dim=-1)
    return best - (best if renormalize else logits).logsumexp(dim=-1, keepdim=True), index


def spread_gates(best: Tensor, index: Tensor, experts: int) -> Tensor:
    """(..., E) log-gates of all experts, minus infinity but for those (..., K) that were chosen."""
    closed = best.new_full((*best.shape[:-1], experts), -torch.inf)
    return closed.scatter(-1, index, best)


def mix_experts(experts: Tensor, log_gates: Tensor, index: Tensor) -> Tensor:
    """Gate-weighted sum of each sample's chosen experts, at a cost that does not grow with the number of experts.

    Args:
        experts: (E, P, D).
        log_gates: (B, E).
        index: (B, K).

    Returns:
        (B, P, D).
    """
    gates = log_gates.gather(-1, index).exp().to(experts.dtype)
    return (gates[..., None, None] * experts[index]).sum(dim=1)
