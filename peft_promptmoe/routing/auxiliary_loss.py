# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses. They are added to the gradient of the model's own loss, so they work in any training loop."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .prompt_call import CallBook, PromptCall


class _TermGradient(torch.autograd.Function):
    """Identity on `carrier`. In the backward pass `term` gets the gradient of the model's loss."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, term: Tensor, call: PromptCall | None) -> Tensor:
        ctx.call, ctx.device = call, term.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = ctx.call.loss_gradient if ctx.call is not None else None
        if gradient is None:
            warnings.warn(
                "The adapter's auxiliary losses have no effect in this step: backward() was called on another loss "
                "than the model's own outputs.loss (label smoothing, compute_loss_func, TRL's preference and reward "
                "trainers or a loss of your own replace it). Add peft_promptmoe.auxiliary_loss(model) to that loss, "
                "in compute_loss of a subclass of the trainer. Or set the weights of the auxiliary losses "
                "(balance_loss_weight, denoise_weight, margin_weight, compact_weight) to 0.",
                stacklevel=2,
            )
        # In a model spread over devices, layers and loss may be on different devices.
        return gradients[0], None if gradient is None else gradient.to(ctx.device), None


class _LossGradient(torch.autograd.Function):
    """Identity on the loss. Notes its gradient before the backward pass of any layer runs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, book: CallBook, call: PromptCall, share: Tensor | float) -> Tensor:
        ctx.book, ctx.call, ctx.share = book, call, share
        return loss.clone()  # not a view, because the Trainer scales the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        _note(ctx.book, ctx.call, gradients[0] * ctx.share)
        return gradients[0], None, None, None


class _TokenGradient(torch.autograd.Function):
    """Identity on log-probabilities of labels. Notes the weight of each token's loss in the sum."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, labelled: Tensor, book: CallBook, call: PromptCall) -> Tensor:
        ctx.book, ctx.call = book, call
        ctx.save_for_backward(labelled)
        return log_probs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        _note(ctx.book, ctx.call, -(gradients[0] * ctx.saved_tensors[0]).sum())
        return gradients[0], None, None, None


class _OwnGradient(torch.autograd.Function):
    """The sum of a forward's auxiliary losses; notes its gradient before any layer's backward pass runs."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, book: CallBook, call: PromptCall) -> Tensor:
        ctx.book, ctx.call = book, call
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.call.by_hand = False
        _note(ctx.book, ctx.call, gradients[0])
        ctx.call.by_hand = True
        return None, None, None


def _note(book: CallBook, call: PromptCall, gradient: Tensor) -> None:
    """Store the gradient of the loss for the layers, unless that of `auxiliary_loss(model)` is already known."""
    if not call.by_hand:
        call.loss_gradient = gradient
    book.differentiate(call)


def carry_loss(
    carrier: Tensor,
    term: Tensor,
    book: CallBook,
    call: PromptCall | None,
    site: str,
    adapter: str,
    values: dict[str, Tensor],
) -> Tensor:
    """Attach an auxiliary loss to a tensor that the layer's output depends on.

    In eager mode the loss gets its gradient when the gradient of `carrier` is computed. So it needs no path in the
    graph to the model's loss, which re-entrant checkpointing would cut. Compiled code cannot write to the outside in a
    backward pass, but it has the whole graph: there the loss is put into a list of the call.

    Args:
        carrier: the tensor.
        term: the weighted loss, a scalar.
        book: calls of the base model.
        call: call of this forward pass. None in a checkpointed block that is run again without it.
        site: path of the attention layer.
        adapter: name of the adapter.
        values: values to report, by name.
    """
    if call is not None:
        for name, value in values.items():
            call.losses[site, adapter, name] = value.detach()
        if book.call is call:  # not a checkpointed block that is run again
            value = term.detach()
            call.total = value if call.total is None else call.total.to(value.device) + value
    if not torch.is_grad_enabled():
        if call is None and not torch.compiler.is_compiling():
            book.recompute()  # of what is run again within a block that is run again
        return carrier
    if torch.compiler.is_compiling():
        if call is not None:
            call.terms.append(term)
        return carrier
    return _TermGradient.apply(carrier, term, call if call is not None else book.recompute())


def add_losses(loss: Tensor, book: CallBook, call: PromptCall, share: Tensor | float = 1.0) -> Tensor:
    """Return the model's loss with an unchanged value and the auxiliary losses of its layers in its gradient.

    Their gradient is scaled like that of the loss, whatever the trainer does with it: division by accumulation steps,
    a gradient scaler, a weight in a sum.

    Args:
        loss: the model's loss, a scalar.
        book: calls of the base model.
        call: call of this forward pass.
        share: share of this forward pass in its optimiser step, if the loss already includes it.
    """
    compiled = torch.compiler.is_compiling()
    if (
        compiled and not call.terms and not call.added
    ):  # blocks ran eagerly: their losses are attached to their outputs
        return _noted(loss, book, call, share)
    for term in call.terms:
        loss = loss + (share * (term - term.detach())).to(loss.dtype)
    call.terms, call.added = [], True  # a model around this one may return the same loss
    return loss if compiled else _noted(loss, book, call, share)


@torch._dynamo.disable(reason="the gradient of a loss is noted outside of compiled code")
def _noted(loss: Tensor, book: CallBook, call: PromptCall, share: Tensor | float) -> Tensor:
    found: Tensor = _LossGradient.apply(loss, book, call, share)
    return found


def add_losses_to_tokens(log_probs: Tensor, labelled: Tensor, book: CallBook, call: PromptCall) -> Tensor:
    """Return log-probabilities of labels unchanged, with the auxiliary losses in the gradient of their mean.

    For trainers that compute their loss from log-probabilities. If this loss is the mean over tokens, auxiliary losses
    get the same gradient as with `add_losses`. If tokens have weights, auxiliary losses get the sum of these weights.

    Args:
        log_probs: (B, T) log-probabilities.
        labelled: (B, T) which tokens have a label.
        book: calls of the base model.
        call: call of this forward pass.
    """
    for term in call.terms:
        log_probs = log_probs - labelled * (term - term.detach()).to(log_probs.dtype)
    if torch.compiler.is_compiling():
        return log_probs
    return _TokenGradient.apply(log_probs, labelled, book, call)


def own_losses(book: CallBook) -> Tensor | None:
    """The weighted auxiliary losses of this thread's last training forward pass, as a scalar. None without any.

    Their gradient then comes from this scalar instead of the model's own loss.
    """
    call = book.last
    if call is None or call.total is None or not torch.is_grad_enabled():
        return None
    return _OwnGradient.apply(call.total.clone().requires_grad_(), book, call)
