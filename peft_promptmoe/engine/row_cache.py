# SPDX-License-Identifier: Apache-2.0
"""Prompt rows kept with a model's key/value cache, so that decoding steps do not make them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.call_arguments import given_cache
from ..models.sites import Site
from .columns import Rows

CACHE_ROWS = "_promptmoe_rows"


def cached_rows(site: Site, bound: dict[str, Any], tokens: int) -> tuple[dict[str, Rows] | None, bool]:
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
    length = cache.get_seq_length(site.attention.layer_idx)
    if isinstance(length, Tensor):
        # A static cache counts on the device. Compiled code cannot ask; there, single tokens are decoding steps.
        past = _continues(site, cache, tokens) if torch.compiler.is_compiling() else bool(length > 0)
    else:
        past = length > 0
    rows = cache.__dict__.setdefault(CACHE_ROWS, {})
    if not past:
        rows[site.name] = {}
    return rows.setdefault(site.name, {}), past


def _continues(site: Site, cache: Any, tokens: int) -> bool:
    """Whether compiled code is to go on with the cache's rows, told by there being any."""
    kept = bool(cache.__dict__.get(CACHE_ROWS, {}).get(site.name))
    if kept and tokens > 1:
        raise ValueError(
            "Compiled code cannot tell a further chunk of a static cache from a new text. Give the text in one piece "
            "and decode token by token, start from a new cache, or do not compile."
        )
    return kept
