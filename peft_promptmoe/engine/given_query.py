# SPDX-License-Identifier: Apache-2.0
"""Lets the user give the query of a causal language model, for forward passes without labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.query import refuse_unknown_query, warn_of_whole_rows
from ..routing.prompt_call import GivenQuery, PromptCall
from .model_hooks import find_hooks, prompt_layers


@contextmanager
def given_query(model: nn.Module, tokens: int | Tensor | None) -> Iterator[None]:
    """Context manager: routers of `routing="sample"` on a causal model read only the first tokens of each row.

    Use it for forward passes without labels: trainers that compute the loss themselves, and scoring of texts. Labels
    are ignored in the block.

    Args:
        model: a model with an adapter of this package.
        tokens: number of query tokens of each row, without padding: one number, or (B,) one per row of the batches in
            the block. None: all tokens, if the model gives one answer for the whole row.

    Raises:
        ValueError: the number is negative, or no router of the model reads a query (routing by token, one expert, or
            a model that is not causal).
    """
    if isinstance(tokens, int) and tokens < 0:
        raise ValueError(f"given_query needs a number of tokens of at least 0, got {tokens}.")
    layers = prompt_layers(model)
    hooks = find_hooks(model)
    if hooks is None or not any(layer.reads_query(name) for layer in layers for name in layer.prompt_config):
        raise ValueError(
            "No router of this model reads a query. given_query is for routing='sample' with several experts on a "
            "causal model. Leave it out."
        )
    before = hooks.calls.give(GivenQuery(tokens))
    try:
        yield
    finally:
        hooks.calls.give(before)


def look_for_query(call: PromptCall, training: bool) -> None:
    """Refuse in training, and warn otherwise, if a router would read a text with its answer."""
    if call.knows_query:
        return
    if training and call.learns:
        refuse_unknown_query()
    if not (call.cached or call.warned or torch.compiler.is_compiling()):
        call.warned = True
        warn_of_whole_rows()
