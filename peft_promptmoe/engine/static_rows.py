# SPDX-License-Identifier: Apache-2.0
"""Prompt rows that are computed once and then reused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .key_value import KeyValueLayer
from .model_hooks import prompt_layers


@contextmanager
def cached_prompts(model: nn.Module) -> Iterator[None]:
    """Context manager for inference: compute prompt rows that do not depend on the input once, not in every forward.

    This applies to static prompts (`num_experts=1`, VPT-Deep) and to token routing. It has no effect on sample routing
    and VAPT, whose rows depend on the input, and on models with rotary embeddings (generation keeps their rows with
    the key/value cache). Forward passes with gradients and compiled ones do not use the stored rows.

    Do not change any weight in the block, neither of the adapter nor of the base model: stored rows would be outdated.

    Args:
        model: a model with an adapter of this package.

    Raises:
        ValueError: the model has no prompts that join attention.
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
