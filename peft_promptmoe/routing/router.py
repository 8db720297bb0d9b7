# SPDX-License-Identifier: Apache-2.0
"""Pure functions of routers: what they read, and which experts they choose.

Letters: `B` batch, `T` tokens, `D` width, `E` experts, `K` active experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6  # epsilon of the RMS norm of the router's input (official code: the model's or 1e-6)


def routing_dtype(x: Tensor) -> torch.dtype:
    """The dtype that routers compute in: float32, or float64 if the model uses it."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context manager that turns autocast off for routers. The meta device has no autocast to turn off."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def unit_rms(x: Tensor) -> Tensor:
    """Reciprocal root mean square of each token, 1 / rms(x).

    Args:
        x: (B, T, D) hidden states.

    Returns:
        (B, T) in at least float32.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=routing_dtype(x))
    return torch.rsqrt(norm.square() / x.shape[-1] + RMS_EPS)


def pooled_input(x: Tensor, real: Tensor | None, normalize: bool) -> Tensor:
    """Router input of sample routing: the mean of the (RMS-normed) layer input over the real tokens.

    The norm is merged into the weights of the mean, so that only the input itself is stored for the backward pass. A
    sample without any real token gets zeros.

    Args:
        x: (B, T, D) layer input before the block's own norm.
        real: (B, T) which tokens count. None: all.
        normalize: whether each token is divided by its root mean square.

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
    """Router logits of token routing, from each token's own (RMS-normed) layer input.

    Args:
        x: (B, T, D) layer input before the block's own norm.
        weight: (E, D) router weight.
        center: (D,) centre to subtract from every input, or None.
        normalize: whether each token is divided by its root mean square.

    Returns:
        (B, T, E) in at least float32.
    """
    dtype = routing_dtype(x)
    if normalize and not torch.is_grad_enabled():
        # One pass over the input. With gradients this would also store the normed input.
        logits = F.linear(F.rms_norm(x.to(dtype), x.shape[-1:], eps=RMS_EPS), weight.to(dtype))
    else:
        logits = F.linear(x, weight.to(x.dtype)).to(dtype)
        logits = _Scaled.apply(logits, unit_rms(x)) if normalize else logits
    return logits if center is None else logits - F.linear(center.to(dtype), weight.to(dtype))


class _Scaled(torch.autograd.Function):
    """Rows times positive factors. Stores its output, which the softmax over experts stores anyway."""

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
    """Noise on router logits in training: multiplicative Gaussian noise, then dropout of logits (official code)."""
    if noise > 0.0:
        # No gradient flows through the scale of the noise.
        logits = logits + noise * torch.randn_like(logits) * logits.detach()
    return F.dropout(logits, dropout) if dropout > 0.0 else logits


def top_k_log_gates(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Log-gates of the `k` best experts.

    Args:
        logits: (..., E) router logits.
        k: number of active experts K.
        renormalize: whether the gates of the chosen experts sum to one. Otherwise they are the softmax over all E.

    Returns:
        Log-gates (..., E), minus infinity for experts that were not chosen, and the chosen experts (..., K), best
        first.
    """
    if k == logits.shape[-1] and not renormalize:
        log_probs = torch.log_softmax(logits, dim=-1)
        return log_probs, log_probs.topk(k, dim=-1).indices
    best, index = best_gates(logits, k, renormalize)
    return spread_gates(best, index, logits.shape[-1]), index


def best_gates(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Log-gates (..., K) and numbers (..., K) of the `k` best experts, best first. See `top_k_log_gates`."""
    if not renormalize and not torch.is_grad_enabled():
        # Fewer operations. With gradients this would store another tensor of the logits' size.
        best, index = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
        return best, index
    best, index = logits.topk(k, dim=-1)
    return best - (best if renormalize else logits).logsumexp(dim=-1, keepdim=True), index


def spread_gates(best: Tensor, index: Tensor, experts: int) -> Tensor:
    """Log-gates of all experts (..., E) from those of the chosen (..., K). Minus infinity for the others."""
    closed = best.new_full((*best.shape[:-1], experts), -torch.inf)
    return closed.scatter(-1, index, best)


def mix_experts(experts: Tensor, log_gates: Tensor, index: Tensor) -> Tensor:
    """Gate-weighted sum of each sample's chosen experts. The cost does not grow with the number of experts.

    Args:
        experts: (E, P, D) rows of all experts.
        log_gates: (B, E) log-gates.
        index: (B, K) chosen experts.

    Returns:
        (B, P, D) rows of each sample.
    """
    gates = log_gates.gather(-1, index).exp().to(experts.dtype)
    return (gates[..., None, None] * experts[index]).sum(dim=1)
