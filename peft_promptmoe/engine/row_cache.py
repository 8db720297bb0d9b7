# SPDX-License-Identifier: Apache-2.0
"""Prompt rows kept with a model's key/value cache, so that decoding steps do not make them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.call_arguments import given_cache
from ..models.sites import Site
from .columns import Columns

CACHE_ROWS = "_promptmoe_rows"


def cached_rows(site: Site, bound: dict[str, Any], tokens: int) -> tuple[dict[str, Columns] | None, bool]:
    """A layer's key and value rows kept with the call's cache, and whether the cache already holds tokens.

    Without a cache there is nothing to keep rows with, and None instead of them.

    Args:
        site: the attention layer.
        bound: the attention call's arguments by name.
        tokens: that the call brings.
    """
    cache = given_cache(bound)
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None, False
    slot = cache_slot(site, bound)
    length = cache.get_seq_length(slot)
    if isinstance(length, Tensor):
        # A static cache counts on the device. Compiled code cannot ask; there, single tokens are decoding steps.
        past = _continues((site.name, slot), cache, tokens) if torch.compiler.is_compiling() else bool(length > 0)
    else:
        past = length > 0
    rows = cache.__dict__.setdefault(CACHE_ROWS, {})
    if not past:
        rows[site.name, slot] = {}
    return rows.setdefault((site.name, slot), {}), past


# What layers that run several times in a forward add to their number, for the cache to tell the runs apart.
SLOT_OFFSETS = ("cycle_offset", "cache_offset")


def cache_slot(site: Site, bound: dict[str, Any]) -> int:
    """Number of the cache's layer that this run of the attention layer writes to."""
    number = bound.get("layer_idx")  # Zamba's one layer stands at many places
    if number is None:
        number = (
            site.attention.layer_idx if hasattr(site.attention, "layer_idx") else site.attention.layer_id
        )  # GPT-Neo
    return int(number + sum(bound.get(name) or 0 for name in SLOT_OFFSETS))


def _continues(run: tuple[str, int], cache: Any, tokens: int) -> bool:
    """Whether compiled code is to go on with the cache's rows, told by there being any."""
    kept = bool(cache.__dict__.get(CACHE_ROWS, {}).get(run))
    if kept and tokens > 1:
        raise ValueError(
            "Compiled code cannot tell a further chunk of a static cache from a new text. Give the text in one piece "
            "and decode token by token, start from a new cache, or do not compile."
        )
    return kept
