# SPDX-License-Identifier: Apache-2.0
"""Reading the arguments of a call: masks and padding, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# transformers' names of the argument: since 5.24, before, and in a few old models
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def given_cache(bound: dict[str, Any]) -> Any | None:
    """The key/value cache among a call's arguments by name."""
    return next((bound[name] for name in CACHE_ARGUMENTS if bound.get(name) is not None), None)


def packs_texts(bound: dict[str, Any]) -> bool:
    """Whether a call's one row is many texts, as in continuous batching, whose paged cache counts no tokens.

    Each of them starts at position 0, wherever the row's own columns are in their texts.
    """
    cache = given_cache(bound)
    return cache is not None and not hasattr(cache, "get_seq_length")


# What closes a column of an additive mask: at most this. Relative positions, which T5-like models add, are smaller.
SHUT = -1e3


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Which tokens of a sequence are text and which padding, read off the attention mask.

    A token that may see itself is real: in every mask of transformers a padded column is closed for all queries, its
    own included, whatever the padding side, window or causality.

    Args:
        mask: (B, 1, T or 1, S) boolean or additive mask, or None for no padding.
        length: T.

    Returns:
        (B, T) boolean, or None where nothing is padded.
    """
    if mask is None:
        return None
    if mask.ndim != 4:
        raise ValueError(
            f"peft_promptmoe reads padding from 4-D attention masks and got one of shape {tuple(mask.shape)}; it "
            "supports the sdpa and eager kernels, use one of them."
        )
    open_ = mask if mask.dtype == torch.bool else mask > SHUT
    if mask.shape[2] == 1:
        return open_[:, 0, 0, :length]
    return torch.diagonal(open_[:, 0], dim1=-2, dim2=-1)[:, :length]


def first_real(real: Tensor | None) -> Tensor | None:
    """(B,) column of each sample's first real token; None where no sample is padded."""
    return None if real is None else real.to(torch.int8).argmax(dim=-1)


def attention_mask(bound: dict[str, Any]) -> Tensor | None:
    """The attention mask; of several for different layers any one, for they differ in what is not padding."""
    mask = bound.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return mask if isinstance(mask, Tensor) else None
