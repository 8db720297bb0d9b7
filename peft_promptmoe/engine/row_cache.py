# SPDX-License-Identifier: Apache-2.0
"""Stores prompt rows in the key/value cache, so that decoding steps do not compute them again.

The rows are stored in the cache's layer, next to the keys and values of the text, and follow every change of these:
see `row_keeper`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..models.call_arguments import given_cache
from ..models.sites import Site
from .rows import Rows

ROWS, KEYS = "_promptmoe_rows", "_promptmoe_keys"


def cached_rows(site: Site, bound: dict[str, Any], tokens: int) -> tuple[dict[str, Rows] | None, bool]:
    """A layer's key and value rows stored in the call's cache, and whether the cache already holds tokens.

    Args:
        site: the attention layer.
        bound: the attention call's arguments by name.
        tokens: number of tokens in this call.

    Returns:
        The rows by adapter (None without a cache), and whether the cache holds tokens.

    Raises:
        ValueError: this kind of cache cannot store rows, or its keys were replaced by other code, so that rows of
            several samples may be in a wrong order.
    """
    layer = _cache_layer(site, bound)
    if layer is None:
        return None, False
    length = layer.get_seq_length()
    if isinstance(length, Tensor):
        # A static cache counts on the device. Compiled code cannot read this, so single tokens count as decoding
        # steps.
        past = _continues(site, layer, tokens) if torch.compiler.is_compiling() else bool(length > 0)
    else:
        past = length > 0
    rows = layer.__dict__.get(ROWS, {})
    if past:
        own = rows.get(site.name, {})
        _check_unchanged(layer, own)
        return own, True
    own = {}
    layer.__dict__[ROWS] = {**rows, site.name: own}  # a new dict, because a shallow copy of the layer has the old one
    if not torch.compiler.is_compiling() and not hasattr(layer, "keeps_rows_of"):
        layer.__class__ = row_keeper(type(layer))  # type: ignore[arg-type]
    return own, False


def note_keys(site: Site, bound: dict[str, Any]) -> None:
    """Note the keys that a layer's rows belong to. Called after the cache has stored a call's tokens."""
    layer = _cache_layer(site, bound)
    if layer is not None and ROWS in layer.__dict__:
        layer.__dict__[KEYS] = getattr(layer, "keys", None)


@lru_cache(maxsize=64)
def row_keeper(kind: Any) -> Any:
    """Make a cache layer class whose prompt rows follow every operation on keys and values.

    Caches pass every operation on to their layers, so none is missed here. A layer gets this class when rows are put
    into it, and otherwise behaves as before.

    Args:
        kind: class of the cache layer.
    """

    class Keeper(kind):
        _layer_type = None  # otherwise transformers would use this class for all later layers of that type
        keeps_rows_of = kind

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            _follow(self, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            _follow(self, lambda rows: rows.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            _follow(self, lambda rows: rows[indices, ...])

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            _follow(self)

        def offload(self) -> None:
            super().offload()
            _follow(self)

        def prefetch(self) -> None:
            super().prefetch()
            _follow(self)

        def __reduce__(self) -> tuple[Any, ...]:
            return _rebuilt, (kind,), self.__dict__

    for name in ("batch_repeat_interleave", "batch_select_indices"):
        if not hasattr(kind, name):  # static caches have neither
            delattr(Keeper, name)
    Keeper.__name__, Keeper.__qualname__, Keeper.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Keeper


def _rebuilt(kind: Any) -> Any:
    keeper = row_keeper(kind)
    return keeper.__new__(keeper)


def _follow(layer: Any, change: Callable[[Tensor], Tensor] | None = None) -> None:
    """Apply a change of the batch to a layer's rows, and note its current keys."""
    if change is not None:
        layer.__dict__[ROWS] = {
            site: {adapter: kept.changed(change) for adapter, kept in own.items()}
            for site, own in layer.__dict__.get(ROWS, {}).items()
        }
    layer.__dict__[KEYS] = getattr(layer, "keys", None)


def _of_several_samples(own: dict[str, Rows]) -> bool:
    found: list[Tensor] = []

    def see(rows: Tensor) -> Tensor:
        found.append(rows)
        return rows

    for kept in own.values():
        kept.changed(see)
    return bool(found)


def _check_unchanged(layer: Any, own: dict[str, Rows]) -> None:
    """Raise ValueError if rows of several samples no longer belong to the keys in the cache."""
    noted = layer.__dict__.pop(KEYS, None)  # released, so that the cache's update can free them
    if noted is None or noted is getattr(layer, "keys", None) or not _of_several_samples(own):
        return
    raise ValueError(
        "The keys of this cache were replaced since the last call, so the prompt rows that it keeps for each sample "
        "may be wrong. Change caches with their own methods (reorder_cache, batch_repeat_interleave, "
        "batch_select_indices, crop) and outside compiled code, or start from a new cache."
    )


# Arguments that layers with several runs per forward pass add to their number, so that the cache separates the runs.
SLOT_OFFSETS = ("cycle_offset", "cache_offset")


def cache_slot(site: Site, bound: dict[str, Any]) -> int:
    """Number of the cache layer that this run of the attention layer writes to."""
    number, layer = bound.get("layer_idx"), site.attention  # Zamba uses one layer at many places
    if number is None:
        number = layer.layer_idx if hasattr(layer, "layer_idx") else layer.layer_id  # GPT-Neo
    return int(number + sum(bound.get(name) or 0 for name in SLOT_OFFSETS))


def _cache_layer(site: Site, bound: dict[str, Any]) -> Any | None:
    """The layer of the call's cache that belongs to the attention layer. None without a cache that counts tokens."""
    cache = given_cache(bound)
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    layers, index = getattr(cache, "layers", None), cache_slot(site, bound)
    if layers is not None:
        kind = getattr(cache, "layer_class_to_replicate", None)
        while kind is not None and len(layers) <= index:
            layers.append(kind())  # as the cache's update will do
        if index < len(layers) and hasattr(layers[index], "get_seq_length"):
            return layers[index]
    raise ValueError(
        f"Prompt rows are stored in the layers of the cache, but this {type(cache).__name__} has none for "
        f"{site.name!r}. Use a cache of transformers (DynamicCache, StaticCache), leave out layers that share another "
        "layer's keys with exclude_modules, or set use_cache=False."
    )


def _continues(site: Site, layer: Any, tokens: int) -> bool:
    """Whether compiled code uses the cache's rows: if there are any."""
    kept = bool(layer.__dict__.get(ROWS, {}).get(site.name))
    if kept and tokens > 1:
        raise ValueError(
            "Compiled code cannot tell a further chunk of a text in a static cache from a new text. Pass the text in "
            "one piece and decode token by token, start from a new cache, or do not compile."
        )
    return kept
