# SPDX-License-Identifier: Apache-2.0
"""The query of a causal language model, given by the user where no labels show it."""

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
    """Within the block, routers of `routing="sample"` on a causal model read the first tokens of each row only.

    For forwards that have no labels: trainers that compute the loss themselves, and scores of texts. Labels count for
    nothing within the block.

    Args:
        model: a model with an adapter of this package.
        tokens: how many tokens of each row are its query, padding not counted: a number, or (B,) one for each row of
            the batches within the block. None for all tokens, where one answer is made of the whole row.

    Raises:
        ValueError: the number is negative, or no router of the model reads a query: it routes by token, has one
            expert, or is not causal.
    """
    if isinstance(tokens, int) and tokens < 0:
        raise ValueError(f"given_query takes the number of tokens in the query, got {tokens}.")
    layers = prompt_layers(model)
    hooks = find_hooks(model)
    if hooks is None or not any(layer.reads_query(name) for layer in layers for name in layer.prompt_config):
        raise ValueError(
            "No router of this model reads a query: given_query is for routing='sample' with several experts on a "
            "causal model. Leave it out."
        )
    before = hooks.calls.give(GivenQuery(tokens))
    try:
        yield
    finally:
        hooks.calls.give(before)


def look_for_query(call: PromptCall, training: bool) -> None:
    """Refuse, or say, that a router will read a text with its answer."""
    if call.knows_query:
        return
    if training and call.learns:
        refuse_unknown_query()
    if not (call.cached or call.warned or torch.compiler.is_compiling()):
        call.warned = True
        warn_of_whole_rows()
