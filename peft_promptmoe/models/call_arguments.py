# SPDX-License-Identifier: Apache-2.0
"""Reads masks, padding and caches from the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Names of the cache argument in transformers: since 5.24, before, and in a few old models.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def given_cache(bound: dict[str, Any]) -> Any | None:
    """The key/value cache in a call's arguments, given by name. None if there is none."""
    return next((bound[name] for name in CACHE_ARGUMENTS if bound.get(name) is not None), None)


def packs_texts(bound: dict[str, Any]) -> bool:
    """Whether the call's single row holds many texts, as in continuous batching with its paged cache.

    Every text starts at position 0, so columns of the row are not positions.
    """
    cache = given_cache(bound)
    return cache is not None and not hasattr(cache, "get_seq_length")


# An additive mask closes a column with a value below this. Relative position biases (T5) stay above it.
SHUT = -1e3


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Read from the attention mask which tokens are text and which are padding.

    A token that may attend to itself is real. In every mask of transformers a padded column is closed for all queries,
    also its own, for any padding side, window or causality.

    Args:
        mask: (B, 1, T or 1, S) boolean or additive mask. None: no padding.
        length: number of tokens T.

    Returns:
        (B, T) boolean, True for real tokens. None if nothing is padded.
    """
    if mask is None:
        return None
    if mask.ndim != 4:
        raise ValueError(
            f"peft_promptmoe reads padding from 4-D attention masks, but got one of shape {tuple(mask.shape)}. Load "
            "the model with attn_implementation='sdpa' or 'eager'."
        )
    open_ = mask if mask.dtype == torch.bool else mask > SHUT
    if mask.shape[2] == 1:
        return open_[:, 0, 0, :length]
    return torch.diagonal(open_[:, 0], dim1=-2, dim2=-1)[:, :length]


def first_real(real: Tensor | None) -> Tensor | None:
    """Column of each sample's first real token, (B,). None if no sample is padded."""
    return None if real is None else real.to(torch.int8).argmax(dim=-1)


def attention_mask(bound: dict[str, Any]) -> Tensor | None:
    """The attention mask. If there are several for different layers, any of them: they agree on padding."""
    mask = bound.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return mask if isinstance(mask, Tensor) else None
