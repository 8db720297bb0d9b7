# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: they reach the optimiser through the gradient of the model's own loss, in any training loop."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .prompt_call import CallBook, PromptCall


class _TermGradient(torch.autograd.Function):
    """Identity on `carrier`; gives `term` the gradient that the model's loss was given."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, term: Tensor, call: PromptCall | None) -> Tensor:
        ctx.call, ctx.device = call, term.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = ctx.call.loss_gradient if ctx.call is not None else None
        if gradient is None:
            warnings.warn(
                "The adapter's auxiliary losses have no effect in this step: the loss that was differentiated is not "
                "the model's own outputs.loss (label smoothing, compute_loss_func, TRL's trainers of preferences and "
                "rewards or a loss of your own replace it). Add peft_promptmoe.auxiliary_loss(model) to that loss, in "
                "compute_loss of a subclass of the trainer; or set the weights of the auxiliary losses "
                "(balance_loss_weight, denoise_weight, margin_weight, compact_weight) to 0.",
                stacklevel=2,
            )
        # Layers of a model that is spread over devices need not be where its loss is.
        return gradients[0], None if gradient is None else gradient.to(ctx.device), None


class _LossGradient(torch.autograd.Function):
    """Identity on the loss; notes its gradient before any layer's backward pass runs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, book: CallBook, call: PromptCall, share: Tensor | float) -> Tensor:
        ctx.book, ctx.call, ctx.share = book, call, share
        return loss.clone()  # no view: the Trainer scales the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        _note(ctx.book, ctx.call, gradients[0] * ctx.share)
        return gradients[0], None, None, None


class _TokenGradient(torch.autograd.Function):
    """Identity on log-probabilities of labels; notes what each token's loss weighs in the sum."""

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
    """Let the layers of a forward find what its loss's gradient is, unless that of their own losses is known."""
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

    In eager mode the term rides on `carrier` and gets its gradient when that of `carrier` is computed, so it needs no
    path to the loss: re-entrant checkpointing runs the layer without a graph and would cut any other. Compiled code
    may not write from a backward pass to the outside, but there the whole graph is in view: the term is listed.

    Args:
        term: the weighted loss, a scalar.
        book: of the base model.
        call: of the forward; None in a block that is run again where no argument tells.
        site: path of the attention layer.
        values: what to report of it, by name.
    """
    if call is not None:
        for name, value in values.items():
            call.losses[site, adapter, name] = value.detach()
        if book.call is call:  # and not a block that is run again
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
    """The model's loss, unchanged in value, with the auxiliary losses of its layers in its gradient.

    Their gradient is scaled like that of the loss, whatever the trainer does to it afterwards: division by
    accumulation steps, a gradient scaler, a weight in a sum.

    Args:
        loss: the model's loss, a scalar.
        book: of the base model.
        call: of this forward.
        share: of this forward in its optimiser step, where the loss already accounts for it.
    """
    compiled = torch.compiler.is_compiling()
    if compiled and not call.terms and not call.added:  # blocks that ran eagerly: their losses ride on their outputs
        return _noted(loss, book, call, share)
    for term in call.terms:
        loss = loss + (share * (term - term.detach())).to(loss.dtype)
    call.terms, call.added = [], True  # a model around this one may put out the same loss
    return loss if compiled else _noted(loss, book, call, share)


@torch._dynamo.disable(reason="the gradient of a loss is noted outside of compiled code")
def _noted(loss: Tensor, book: CallBook, call: PromptCall, share: Tensor | float) -> Tensor:
    found: Tensor = _LossGradient.apply(loss, book, call, share)
    return found


def add_losses_to_tokens(log_probs: Tensor, labelled: Tensor, book: CallBook, call: PromptCall) -> Tensor:
    """Log-probabilities of labels, unchanged, with the auxiliary losses in the gradient of their mean.

    For trainers that make the loss of them. Where that is the mean of the tokens' losses, auxiliary losses have the
    gradient that `add_losses` would give them; where tokens have weights, they weigh as much as these do together.

    Args:
        log_probs: (B, T).
        labelled: (B, T) which tokens have a label.
        book: of the base model.
        call: of this forward.
    """
    for term in call.terms:
        log_probs = log_probs - labelled * (term - term.detach()).to(log_probs.dtype)
    if torch.compiler.is_compiling():
        return log_probs
    return _TokenGradient.apply(log_probs, labelled, book, call)


def own_losses(book: CallBook) -> Tensor | None:
    """The weighted auxiliary losses of this thread's last training forward, as a scalar; None without any.

    Its gradient is theirs, and takes the place of that of the model's own loss.
    """
    call = book.last
    if call is None or call.total is None or not torch.is_grad_enabled():
        return None
    return _OwnGradient.apply(call.total.clone().requires_grad_(), book, call)
