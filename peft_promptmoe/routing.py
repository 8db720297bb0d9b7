# SPDX-License-Identifier: Apache-2.0
"""Routers: what they read, what they choose, how they are balanced, and the record of what went where.

Letters: `B` batch, `T` tokens, `D` width, `E` experts, `K` active experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        logits = logits * unit_rms(x)[..., None] if normalize else logits
    return logits if center is None else logits - F.linear(center.to(dtype), weight.to(dtype))


def perturb(logits: Tensor, noise: float, dropout: float) -> Tensor:
    """Training noise on router logits: multiplicative Gaussian noise, then dropout of whole logits (official code)."""
    if noise > 0.0:
        # Its scale is not a path for the gradient.
        logits = logits + noise * torch.randn_like(logits) * logits.detach()
    return F.dropout(logits, dropout) if dropout > 0.0 else logits


class Chosen(NamedTuple):
    """What a router chose for the one token of each sample.

    Attributes:
        log_gates: (B, 1, K), best first.
        experts: (B, 1, K).
        of: number of experts, E.
    """

    log_gates: Tensor
    experts: Tensor
    of: int


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
    best, index = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
    return best - best.logsumexp(dim=-1, keepdim=True) if renormalize else best, index


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


def balance_loss(logits: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    """Load-balance term of one router, E * sum_e f_e * p_e (Switch Transformer, arXiv 2101.03961, section 2.2).

    `f_e` is the fraction of choices that fell on expert e, `p_e` its mean probability. It is 1 at perfect balance
    and E when one expert gets everything. Tokens or samples that are not real count in neither.

    Args:
        logits: (N..., E).
        index: (N..., K) chosen experts.
        real: (N...) which entries count; None for all.
    """
    probs = torch.softmax(logits, dim=-1).flatten(0, -2)
    chosen = F.one_hot(index, logits.shape[-1]).to(probs.dtype).mean(dim=-2).flatten(0, -2)
    if real is not None:
        weight = real.flatten().to(probs.dtype)[:, None]
        count = weight.sum().clamp(min=1.0)
        probs, chosen = probs * weight / count * probs.shape[0], chosen * weight / count * probs.shape[0]
    return logits.shape[-1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The balance loss on its way to the optimiser
# ---------------------------------------------------------------------------------------------------------------------


class PromptCall:
    """What one forward of the base model tells its prompt layers; it travels through the model's keyword arguments.

    So it is there again when a checkpointed block is recomputed, in whatever thread, and two forwards never share one.

    Attributes:
        query: (B, T) the tokens that routers of a causal language model may read; None for all real ones.
        balance: detached balance values of the layers, by layer.
        loss_gradient: gradient of the model's loss, known once its backward pass has begun.
        terms: balance terms with their graph, for compiled code (see `add_balance_loss`).
        centers: router centres as this forward's first pass saw them, by layer and adapter.
    """

    def __init__(self, query: Tensor | None = None) -> None:
        self.query = query
        self.balance: dict[tuple[str, str], Tensor] = {}
        self.loss_gradient: Tensor | None = None
        self.terms: list[Tensor] = []
        self.centers: dict[tuple[str, str], Tensor] = {}


class _BalanceGradient(torch.autograd.Function):
    """Identity on `carrier`; gives `term` the gradient that the model's loss was given."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, term: Tensor, call: PromptCall) -> Tensor:
        ctx.call = call
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.call.loss_gradient is None:
            warnings.warn(
                "balance_loss_weight has no effect in this step: the loss that was differentiated is not the model's "
                "own outputs.loss (label smoothing and compute_loss_func replace it). Let the model compute the loss, "
                "or set balance_loss_weight=0.",
                stacklevel=2,
            )
        return gradients[0], ctx.call.loss_gradient, None


class _LossGradient(torch.autograd.Function):
    """Identity on the loss; notes its gradient before any layer's backward pass runs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, call: PromptCall, share: Tensor | float) -> Tensor:
        ctx.call, ctx.share = call, share
        return loss.clone()  # no view: the Trainer scales the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.call.loss_gradient = gradients[0] * ctx.share
        return gradients[0], None, None


def carry_balance_loss(carrier: Tensor, term: Tensor, call: PromptCall, site: str, adapter: str) -> Tensor:
    """Attach a router's balance term to a tensor that the layer's output depends on.

    In eager mode the term rides on `carrier` and gets its gradient when that of `carrier` is computed, so it needs no
    path to the loss: re-entrant checkpointing runs the layer without a graph and would cut any other. Compiled code
    may not write from a backward pass to the outside, but there the whole graph is in view: the term is listed.
    """
    call.balance[site, adapter] = term.detach()
    if not torch.is_grad_enabled():
        return carrier
    if torch.compiler.is_compiling():
        call.terms.append(term)
        return carrier
    return _BalanceGradient.apply(carrier, term, call)


def add_balance_loss(loss: Tensor, call: PromptCall, share: Tensor | float = 1.0) -> Tensor:
    """The model's loss, unchanged in value, with the balance terms of its layers in its gradient.

    Their gradient is scaled like that of the loss, whatever the trainer does to it afterwards: division by
    accumulation steps, a gradient scaler, a weight in a sum.

    Args:
        loss: the model's loss, a scalar.
        call: of this forward.
        share: of this forward in its optimiser step, where the loss already accounts for it.
    """
    for term in call.terms:
        loss = loss + (share * (term - term.detach())).to(loss.dtype)
    if torch.compiler.is_compiling():
        return loss
    return _LossGradient.apply(loss, call, share)


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class RoutingRecord:
    """What one router chose in one forward pass.

    Attributes:
        gates: log-gates (B, E) or (B, T, E), or what was chosen for one token of each sample.
        real: (B, T) which tokens are real; None for all. Of no meaning to sample routing.
        training: whether the layer was in training mode.
    """

    gates: Tensor | Chosen
    real: Tensor | None
    training: bool

    @property
    def log_gates(self) -> Tensor:
        """(B, E) or (B, T, E), minus infinity for experts that were not chosen."""
        if isinstance(self.gates, Tensor):
            return self.gates
        return spread_gates(self.gates.log_gates, self.gates.experts, self.gates.of)


# Called with the path of the attention layer, the adapter and the record.
Observer = Callable[[str, str, RoutingRecord], None]
