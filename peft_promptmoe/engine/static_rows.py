# SPDX-License-Identifier: Apache-2.0
"""Prompts that are projected once and then reused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .key_value import KeyValueLayer
from .model_hooks import prompt_layers


@contextmanager
def cached_prompts(model: nn.Module) -> Iterator[None]:
    """Within the block, compute prompt rows that do not depend on the input once instead of in every forward.

    These are the rows of static prompts (`num_experts=1`, VPT-Deep) and of token routing; those of sample routing and
    of VAPT depend on the input and are made as ever, as are those that a rotary embedding turns (generation keeps
    them with its own cache). Only forwards without gradient are served so, and compiled ones never.

    Within the block nothing may change a weight, the adapter's or the base model's: what is kept would be stale.

    Args:
        model: a model with an adapter of this package.

    Raises:
        ValueError: it has no prompts that join attention.
    """
    layers = [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]
    if not layers:
        raise ValueError("The model has no prompts whose keys and values could be kept. Add an adapter first.")
    before = [layer.kept for layer in layers]
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.kept = kept
