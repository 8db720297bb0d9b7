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
from .chosen_slots import Rotate, Turn
from .columns import Harvest
from .rows import Experts, Rows
from .transformers_attention import COLUMNS


def first_angle(site: Site, position_embeddings: Any, first: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Rotary cosines and sines of each sample's first real token, from the tables that the attention layer is given.

    Args:
        position_embeddings: (cos, sin), each (B or 1, T, r), as the attention layer receives them; None if it has
            none.
        first: (B,) column of the first real token, None for column 0 of all.

    Returns:
        (cos, sin), each (B or 1, 1, r); None for models without, and for vision models, which turn patches only.
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
        return cos[:, :1], sin[:, :1]
    index = first[:, None, None].expand(-1, 1, cos.shape[-1])
    cos = cos.expand(first.shape[0], -1, -1).gather(1, index)
    return cos, sin.expand(first.shape[0], -1, -1).gather(1, index)


def offset_tables(site: Site, like: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of offsets, from the model's rotary module.

    Args:
        like: (B or 1, 1, r) cosines.
        offsets: (R,) integers; None for no offset, of one row that stands for all.

    Returns:
        (cos, sin), each (1, R or 1, r), scaled as the module scales them.
    """
    if offsets is None:
        return torch.full_like(like[:1], rotary_scaling(site)), torch.zeros_like(like[:1])
    if site.rotary is None or rotary_kind(site) in LENGTH_DEPENDENT:
        raise ValueError(
            f"prompt_positions='prefix' needs the rotary angles of the positions before the text, and "
            f"{type(site.attention).__name__} has none that can be reached or has frequencies that depend on the "
            "text's length. Use prompt_positions='unrotated' with this model."
        )
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    cos, sin = site.rotary(like, offsets[None], **named)
    return cos, sin


def rotary_tables(
    site: Site, angle: tuple[Tensor, Tensor] | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines for prompt rows that stand `offsets` away from each sample's first real token.

    The first token's own angle comes from the tables that the layer was given and the offset's from the model's rotary
    module; the sum of angles needs neither position ids nor the layout of the tables.

    Args:
        angle: of `first_angle`.
        offsets: (R,) integers; None puts every row where the first token is ("unrotated").

    Returns:
        (cos, sin), each (B or 1, R or 1, r); None without an angle.
    """
    if angle is None or offsets is None:
        return angle
    cos, sin = angle
    by_cos, by_sin = offset_tables(site, cos, offsets)
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


def project_rows(site: Site, rows: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Rows:
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


def project_directly(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> Rows:
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
        key = Turn(*tables, rotation(site)).there(key)
    return Rows(key, value)


def rotation(site: Site) -> Rotate:
    """The function by which a layer of the table turns queries and keys."""
    found: Rotate = unwrapped_forward(site.attention).__globals__["apply_rotary_pos_emb"]
    return found


def project_experts(
    site: Site,
    rows: Tensor,
    slots: int,
    routed: int,
    angle: tuple[Tensor, Tensor] | None,
    prefix: bool,
    bound: dict[str, Any],
) -> Rows:
    """Key and value rows of an adapter whose tokens choose among experts.

    Keys of experts are turned by their offsets alone where samples begin at places of their own: then queries are
    turned back instead, for keys of each sample would be as many as samples times experts.

    Args:
        rows: (1, R, D) in the place of layer inputs, those of experts first.
        slots: rows of one expert, P.
        routed: rows of all experts, E * P.
        angle: of `first_angle`.
        prefix: whether rows stand before the text and not where it begins.
        bound: the attention call's arguments by name.
    """
    offsets = slot_offsets(rows.shape[1], slots, rows.device) if prefix else None
    if angle is None or angle[0].shape[0] == 1 or site.family is None or not site.family.direct:
        found = project_rows(site, rows, rotary_tables(site, angle, offsets), bound)
        experts = Experts(found.key[:, :, :routed], found.value[:, :, :routed], slots)
        return Rows(found.key[:, :, routed:], found.value[:, :, routed:], experts)
    found = project_directly(site, site.norm(rows) if site.norm is not None else rows, None)
    rotate, scale = rotation(site), rotary_scaling(site)
    by_offset = Turn(*offset_tables(site, angle[0], None if offsets is None else offsets[:routed]), rotate)
    experts = Experts(by_offset.there(found.key[:, :, :routed]), found.value[:, :, :routed], slots)
    experts.turn = Turn(angle[0] / scale, angle[1] / scale, rotate)
    tables = rotary_tables(site, angle, None if offsets is None else offsets[routed:])
    assert tables is not None
    return Rows(Turn(*tables, rotate).there(found.key[:, :, routed:]), found.value[:, :, routed:], experts)


def slot_offsets(rows: int, slots: int, device: torch.device) -> Tensor:
    """(R,) positions of prompt rows relative to the first token: slot p of every expert stands at p - slots."""
    return torch.arange(rows, device=device) % slots - slots


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


def harvest(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Rows:
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
    return Rows(caught.key, caught.value)


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
