# SPDX-License-Identifier: Apache-2.0
"""From prompt rows to the key and value rows of one attention layer: norm, projection, position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter_state import put_away
from ..models.call_arguments import CACHE_ARGUMENTS
from ..models.inspection import parameter_names, unwrapped_forward
from ..models.sites import Site
from .columns import Columns, Harvest
from .transformers_attention import COLUMNS


def rotary_tables(
    site: Site, position_embeddings: Any, first: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines for prompt rows that stand `offsets` away from each sample's first real token.

    The first token's own angle comes from the tables that the layer was given and the offset's from the model's rotary
    module; the sum of angles needs neither position ids nor the layout of the tables.

    Args:
        position_embeddings: (cos, sin), each (B or 1, T, r), as the attention layer receives them; None if it has
            none.
        first: (B,) column of the first real token, None for column 0 of all.
        offsets: (R,) integers; None puts every row where the first token is ("unrotated").

    Returns:
        (cos, sin), each (B or 1, R or 1, r); None for models without, and for vision models, which turn patches only.
    """
    if position_embeddings is None or site.patches is not None:
        return None
    if not (isinstance(position_embeddings, (tuple, list)) and len(position_embeddings) == 2) or any(
        not isinstance(table, Tensor) or table.ndim != 3 for table in position_embeddings
    ):
        raise ValueError(
            f"{type(site.attention).__name__} takes rotary tables of a form peft_promptmoe does not know."
        )
    cos, sin = position_embeddings
    if first is None:
        cos, sin = cos[:, :1], sin[:, :1]
    else:
        index = first[:, None, None].expand(-1, 1, cos.shape[-1])
        cos = cos.expand(first.shape[0], -1, -1).gather(1, index)
        sin = sin.expand(first.shape[0], -1, -1).gather(1, index)
    if offsets is None:
        return cos, sin
    if site.rotary is None or rotary_kind(site) in LENGTH_DEPENDENT:
        raise ValueError(
            f"prompt_positions='prefix' needs the rotary angles of the positions before the text, and "
            f"{type(site.attention).__name__} has none that can be reached or has frequencies that depend on the "
            "text's length. Use prompt_positions='unrotated' with this model."
        )
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    by_cos, by_sin = site.rotary(cos, offsets[None], **named)
    scale = rotary_scaling(site)
    return (cos * by_cos - sin * by_sin) / scale, (sin * by_cos + cos * by_sin) / scale


LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_kind(site: Site) -> str:
    """Type of the rotary embedding ("default", "yarn", ...)."""
    kind = getattr(site.rotary, "rope_type", "default")
    return kind.get(site.rotary_type, "default") if isinstance(kind, dict) else kind


def rotary_scaling(site: Site) -> float:
    """Factor that the rotary module puts on its cosines and sines (1 but for YaRN and its kin)."""
    name = f"{site.rotary_type}_attention_scaling" if site.rotary_type is not None else "attention_scaling"
    return getattr(site.rotary, name, 1.0)


def relative_bias(site: Site, first: Tensor | None, offsets: Tensor, length: int) -> Tensor | None:
    """T5 bias between each query and prompt rows `offsets` away from the first real token.

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
        owner: the attention layer that holds the table.
        distance: (B, T, R) integers.

    Returns:
        (B, heads, T, R).
    """
    settings = {}
    if "bidirectional" in inspect.signature(owner._relative_position_bucket).parameters:  # UMT5 reads its own
        settings = {
            "bidirectional": not owner.is_decoder,
            "num_buckets": owner.relative_attention_num_buckets,
            "max_distance": owner.relative_attention_max_distance,
        }
    index, table = owner._relative_position_bucket(distance, **settings), owner.relative_attention_bias
    if hasattr(table.weight, "full_tensor"):
        # FSDP2 gathers the table for its own block and this is another's; it is frozen, so no gradient is lost.
        return F.embedding(index, table.weight.full_tensor()).permute(0, 3, 1, 2)
    if put_away(table.weight):
        raise RuntimeError(
            f"The prompts have relative positions of a table that {type(owner).__name__} holds, and FSDP1 holds it "
            "only while its own block runs. Shard this model with FSDP2 (fully_shard), or train it with DDP."
        )
    return table(index).permute(0, 3, 1, 2)


def project_rows(site: Site, rows: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Columns:
    """Key and value rows of prompt rows, by the layer's own norm and projections.

    Families of the table project directly; elsewhere the layer itself is run on the rows ("harvest"), which gives the
    same result and also pays the query and output projections.

    Args:
        rows: (B or 1, R, D) in the place of layer inputs.
        tables: rotary (cos, sin) for the rows, each (B or 1, R, r).
        bound: the attention call's arguments by name, from which a harvest takes its own.
    """
    normed = site.norm(rows) if site.norm is not None else rows
    if site.family is None or not site.family.direct:
        return harvest(site, normed, tables, bound)
    return project_directly(site, normed, tables)


def project_directly(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> Columns:
    """Key and value rows through the projections that the family's table entry names."""
    family, attention = site.family, site.attention
    assert family is not None
    width = getattr(attention, family.head_dim)
    if family.fused is not None:
        key, value = _fused_projection(getattr(attention, family.fused), normed)
    else:
        key, value = getattr(attention, family.key)(normed), getattr(attention, family.value)(normed)
    key = key.unflatten(-1, (-1, width)).transpose(1, 2)
    value = value.unflatten(-1, (-1, width)).transpose(1, 2)
    if family.key_norm is not None:
        key = getattr(attention, family.key_norm)(key)
    if tables is not None:
        rotate = unwrapped_forward(attention).__globals__["apply_rotary_pos_emb"]
        tables = (tables[0].to(key.dtype), tables[1].to(key.dtype))
        # The function rotates a query and a key; the key stands in for both.
        key = rotate(key, key, *tables)[1]
    return Columns(key, value.expand(key.shape[0], -1, -1, -1))


def _fused_projection(projection: nn.Module, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a projection that makes query, key and value in this order."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if isinstance(weight, Tensor) and weight.device != normed.device:
        weight = None  # offloaded: it comes when the module is called
    if type(projection) is nn.Linear and isinstance(weight, Tensor):
        third = weight.shape[0] // 3
        both = F.linear(normed, weight[third:], bias[third:] if isinstance(bias, Tensor) else None)
        return both.tensor_split(2, dim=-1)  # type: ignore[return-value]
    if type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor):
        third = weight.shape[1] // 3
        both = F.linear(normed, weight[:, third:].T, bias[third:] if isinstance(bias, Tensor) else None)
        return both.tensor_split(2, dim=-1)  # type: ignore[return-value]
    # Another adapter, a quantiser or an offloading engine has wrapped it: the module itself knows best.
    _, key, value = projection(normed).chunk(3, dim=-1)
    return key, value


def harvest(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Columns:
    """Key and value rows by running the attention layer on the prompt rows and stopping at the interface."""
    attention, caught = site.attention, Harvest()
    batch = max(normed.shape[0], tables[0].shape[0] if tables is not None else 1)
    arguments = {name: value for name, value in bound.items() if name not in _NOT_FOR_PROMPTS}
    accepted = inspect.signature(unwrapped_forward(attention)).parameters
    arguments |= {name: None for name in _NOT_FOR_PROMPTS if name in accepted}
    arguments[parameter_names(attention)[0]] = normed.expand(batch, -1, -1)
    if site.patches is not None and not site.is_timm and arguments.get("position_embeddings") is not None:
        raise ValueError(
            f"{type(attention).__name__} turns its patches by a rotary embedding that peft_promptmoe does not know. "
            "This vision model is not supported."
        )
    if tables is not None:
        arguments["position_embeddings"] = tuple(table.expand(batch, normed.shape[1], -1) for table in tables)
    attention.forward(**arguments, **{COLUMNS: caught})
    if caught.key is None or caught.value is None:
        raise RuntimeError(
            f"{type(attention).__name__} did not reach its attention kernel when run on prompt rows; this "
            "architecture is not supported."
        )
    return Columns(caught.key, caught.value)


_NOT_FOR_PROMPTS = (
    "attention_mask",
    "mask",
    *CACHE_ARGUMENTS,
    "position_bias",
    "cache_position",
    "position_ids",
    "output_attentions",
    "rope",
    "attn_mask",
    COLUMNS,
)
