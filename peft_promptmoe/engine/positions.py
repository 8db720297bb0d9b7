# SPDX-License-Identifier: Apache-2.0
"""Positions of prompt rows: rotary angles and relative position biases before the text."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter_state import put_away
from ..models.call_arguments import packs_texts
from ..models.sites import Site

# Types of rotary embeddings whose frequencies depend on the length of the text.
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass
class Positions:
    """Positions of prompt rows in the form that one attention layer needs. Empty for layers without positions.

    Attributes:
        cos, sin: (B or 1, R or 1, r) cosines and sines of the rows, if the layer gets rotary tables.
        ids: (B or 1, R or 1) position ids, if the layer computes its own rotary tables.
        is_complex: whether the layer gets its tables as one complex tensor (Llama 4, DeepSeek V2).
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    ids: Tensor | None = None
    is_complex: bool = False

    @property
    def angle(self) -> tuple[Tensor, Tensor] | None:
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)

    @property
    def batch(self) -> int:
        """Batch size B, or 1 if positions are the same in all samples."""
        return max((part.shape[0] for part in (self.cos, self.ids) if part is not None), default=1)

    def tables(self, batch: int, rows: int, sine_first: bool) -> Any:
        """The rotary tables in the layer's own form, or None."""
        if self.angle is None:
            return None
        cos, sin = (table.expand(batch, rows, -1) for table in self.angle)
        if self.is_complex:
            return torch.complex(cos.float(), sin.float())
        return (sin, cos) if sine_first else (cos, sin)


def first_position(site: Site, bound: dict[str, Any], first: Tensor | None) -> Positions:
    """Position of each sample's first real token, from the attention layer's arguments.

    Args:
        site: the attention layer.
        bound: the attention call's arguments by name.
        first: (B,) column of the first real token. None: column 0 for all samples.

    Returns:
        The positions. In continuous batching position 0, where all texts start. Empty for models without rotary
        embedding, and for vision models, which apply it to patches only.
    """
    if not site.is_rotary or site.patches is not None:
        return Positions()
    given = bound.get("position_embeddings")
    if given is None:
        ids = _column(bound.get("position_ids"), first)
        return Positions(ids=torch.zeros_like(ids) if packs_texts(bound) and ids is not None else ids)
    pair = as_pair(given, site.sine_first)
    if pair is None:
        raise ValueError(unknown_form(site))
    cos, sin = (_column(table, first) for table in pair)
    if packs_texts(bound):
        cos, sin = torch.full_like(cos, rotary_scaling(site)), torch.zeros_like(sin)
    return Positions(cos, sin, is_complex=isinstance(given, Tensor))


def _column(table: Any, first: Tensor | None) -> Any:
    """Entries of the first real token, (B or 1, 1, ...). None if `table` is no table."""
    if not isinstance(table, Tensor):
        return None
    if first is None:
        return table[:, :1]
    index = first.reshape(-1, 1, *[1] * (table.ndim - 2)).expand(-1, 1, *table.shape[2:])
    return table.expand(first.shape[0], *table.shape[1:]).gather(1, index)


def row_positions(site: Site, at: Positions, offsets: Tensor | None) -> Positions:
    """Positions of prompt rows at distance `offsets` from each sample's first real token.

    The first token's angle comes from the layer's tables, and the angle of the offset from the model's rotary module.
    Their sum needs neither position ids nor the layout of the tables.

    Args:
        site: the attention layer.
        at: positions from `first_position`.
        offsets: (R,) integers of at most zero. None: all rows at the first token's position ("unrotated").
    """
    if offsets is None:
        return at
    if at.ids is not None:
        return Positions(ids=at.ids + offsets[None])
    if at.angle is None:
        return at
    cos, sin = at.angle
    by_cos, by_sin = offset_tables(site, cos, offsets)
    scale = rotary_scaling(site)
    return replace(at, cos=(cos * by_cos - sin * by_sin) / scale, sin=(sin * by_cos + cos * by_sin) / scale)


def offset_tables(site: Site, like: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of offsets, from the model's rotary module.

    Args:
        site: the attention layer.
        like: (B or 1, 1, r) cosines, for width and dtype.
        offsets: (R,) integers of at most zero. None: no offset, as one row for all.

    Returns:
        (cos, sin), each (1, R or 1, r), scaled as the module scales them.
    """
    if offsets is None:
        return torch.full_like(like[:1], rotary_scaling(site)), torch.zeros_like(like[:1])
    if not can_stand_before(site):
        raise ValueError(no_angles(site))
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    # Stored tables have no negative positions. The angle of the opposite position has the opposite sine.
    pair = as_pair(site.rotary(like, offsets.abs()[None], **named), site.sine_first)
    if pair is None:
        raise ValueError(unknown_form(site))
    return pair[0], -pair[1]


def as_pair(given: Any, sine_first: bool) -> tuple[Tensor, Tensor] | None:
    """(cos, sin), each (B or 1, T, r), from a layer's position embeddings. None for other forms."""
    if isinstance(given, Tensor):
        return (given.real, given.imag) if given.ndim == 3 and given.is_complex() else None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return None
    if any(not isinstance(table, Tensor) or table.ndim != 3 for table in given):
        return None
    return (given[1], given[0]) if sine_first else (given[0], given[1])


def unknown_form(site: Site) -> str:
    """The message for rotary tables that are neither a pair nor a complex tensor (B or 1, T, r)."""
    return f"{type(site.attention).__name__} takes rotary tables of a form that is not supported for prompts."


def can_stand_before(site: Site) -> bool:
    """Whether prompts can have positions before the text: no positions, relative ones, or known rotary angles."""
    if not site.is_rotary or site.patches is not None:
        return True
    return site.rotary is not None and rotary_kind(site) not in LENGTH_DEPENDENT


def no_angles(site: Site) -> str:
    """The message that prompts cannot have positions before the text."""
    return (
        f"prompt_positions='prefix' needs the rotary angles of the positions before the text, but those of "
        f"{type(site.attention).__name__} cannot be reached or depend on the text's length ({rotary_kind(site)!r}). "
        "Use prompt_positions='unrotated' with this model."
    )


def rotary_kind(site: Site) -> str:
    """Type of the rotary embedding ("default", "yarn", ...)."""
    kind = getattr(site.rotary, "rope_type", "default")
    return kind.get(site.rotary_type, "default") if isinstance(kind, dict) else kind


def rotary_scaling(site: Site) -> float:
    """Factor of the rotary module's cosines and sines. 1 except for YaRN and similar types."""
    name = f"{site.rotary_type}_attention_scaling" if site.rotary_type is not None else "attention_scaling"
    return getattr(site.rotary, name, 1.0)


def slot_offsets(rows: int, slots: int, device: torch.device) -> Tensor:
    """Positions of prompt rows relative to the first token, (R,): slot p of every expert is at p - slots."""
    return torch.arange(rows, device=device) % slots - slots


def relative_bias(site: Site, first: Tensor | None, offsets: Tensor, length: int) -> Tensor | None:
    """T5 bias between each query and prompt rows at distance `offsets` from the first real token.

    Returns:
        (B or 1, heads, T, R), or None for models without such a table.
    """
    owner = site.bias_owner
    if owner is None:
        return None
    start = first[:, None, None] if first is not None else 0
    query = torch.arange(length, device=offsets.device)[None, :, None]
    distance = offsets[None, None, :] + start - query
    return bias_at(owner, distance)


def bias_at(owner: Any, distance: Tensor) -> Tensor:
    """Entries of a T5 table for distances key - query.

    Args:
        owner: the attention layer with the table.
        distance: (B, T, R) integers, key position minus query position.

    Returns:
        (B, heads, T, R).
    """
    settings = {}
    if (
        "bidirectional" in inspect.signature(owner._relative_position_bucket).parameters
    ):  # UMT5 reads its own attribute
        settings = {
            "bidirectional": not owner.is_decoder,
            "num_buckets": owner.relative_attention_num_buckets,
            "max_distance": owner.relative_attention_max_distance,
        }
    index, table = owner._relative_position_bucket(distance, **settings), owner.relative_attention_bias
    if hasattr(table.weight, "full_tensor"):
        # FSDP2 gathers the table only for its own block. The table is frozen, so no gradient is lost here.
        return F.embedding(index, table.weight.full_tensor()).permute(0, 3, 1, 2)
    if put_away(table.weight):
        raise RuntimeError(
            f"The prompts need the relative position table of {type(owner).__name__}, but FSDP1 keeps it in memory "
            "only while its own block runs. Shard this model with FSDP2 (fully_shard), or train it with DDP."
        )
    return table(index).permute(0, 3, 1, 2)
