# SPDX-License-Identifier: Apache-2.0
"""The load-balance term of a router, and its way to the optimiser."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompt_call import PromptCall


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
    call.terms = []  # a model around this one may put out the same loss
    if torch.compiler.is_compiling():
        return loss
    return _LossGradient.apply(loss, call, share)
