# SPDX-License-Identifier: Apache-2.0
"""Computes key and value rows from prompt rows: norm, projection and position of one attention layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.inspection import parameter_names, unwrapped_forward
from ..models.sites import Site
from .chosen_slots import Rotate, Turn
from .columns import Harvest, MaskWithRows
from .positions import Positions, offset_tables, rotary_scaling, row_positions, slot_offsets
from .rows import Experts, Rows
from .transformers_attention import COLUMNS


def project_rows(site: Site, rows: Tensor, positions: Positions) -> Rows:
    """Compute key and value rows from prompt rows, with the layer's own norm and projections.

    Architectures of the table use their projections directly. For others the layer itself is run on the rows
    ("harvest"). The result is the same, but the query and output projections are also computed.

    Args:
        rows: (B or 1, R, D) in the place of layer inputs.
        positions: of the rows.
    """
    normed = normed_rows(site, rows)
    if site.family is None or not site.family.direct:
        return harvest(site, normed, positions)
    return project_directly(site, normed, positions)


def normed_rows(site: Site, rows: Tensor) -> Tensor:
    """The attention layer's input for rows in the form of layer inputs: rows after the norm."""
    normed: Tensor = site.norm(rows) if site.norm is not None else rows
    return normed if site.factor is None else normed * site.factor


def project_directly(site: Site, normed: Tensor, positions: Positions) -> Rows:
    """Key and value rows, with the projections named in the table of tested architectures."""
    family, attention = site.family, site.attention
    assert family is not None
    if family.own is not None:
        key, value = family.own.project(attention, normed)
        return Rows(_turned(site, key, positions), value)
    width = getattr(attention, family.head_dim)
    if family.fused is not None:
        key, value = _fused_projection(getattr(attention, family.fused), normed)
    else:
        key, value = getattr(attention, family.key)(normed), getattr(attention, family.value)(normed)
    key = key.unflatten(-1, (-1, width)).transpose(1, 2)
    value = value.unflatten(-1, (-1, width)).transpose(1, 2)
    if family.key_norm is not None:
        key = getattr(attention, family.key_norm)(key)
    return Rows(_turned(site, key, positions), value)


def _turned(site: Site, key: Tensor, positions: Positions) -> Tensor:
    angle = positions.angle
    if angle is None:
        return key
    turn = Turn(*angle, rotation(site))
    width = site.own.turned(site.attention) if site.own is not None else None
    if width is None:
        return turn.there(key)
    key = key.expand(max(key.shape[0], positions.batch), -1, -1, -1)
    return torch.cat([turn.there(key[..., :width]), key[..., width:]], dim=-1)


def rotation(site: Site) -> Rotate:
    """The function with which a layer of the table applies its rotary embedding."""
    found: Rotate = unwrapped_forward(site.attention).__globals__["apply_rotary_pos_emb"]
    return found


def project_experts(
    site: Site,
    rows: Tensor,
    slots: int,
    routed: int,
    at: Positions,
    prefix: bool,
) -> Rows:
    """Key and value rows of an adapter with token routing.

    If samples start at different positions, experts' keys get the rotary angles of their offsets only, and queries are
    turned back to the start of their sample. Otherwise there would be separate keys for every sample and expert.

    Args:
        site: the attention layer.
        rows: (1, R, D) in the form of layer inputs, those of experts first.
        slots: rows of one expert, P.
        routed: rows of all experts, E * P.
        at: positions from `first_position`.
        prefix: whether rows stand before the text instead of at its start.
    """
    offsets = slot_offsets(rows.shape[1], slots, rows.device) if prefix else None
    angle = at.angle
    if angle is None or angle[0].shape[0] == 1 or not _turns_queries(site):
        found = project_rows(site, rows, row_positions(site, at, offsets))
        experts = Experts(found.key[:, :, :routed], found.value[:, :, :routed], slots)
        return Rows(found.key[:, :, routed:], found.value[:, :, routed:], experts)
    found = project_directly(site, normed_rows(site, rows), Positions())
    rotate, scale = rotation(site), rotary_scaling(site)
    by_offset = Turn(*offset_tables(site, angle[0], None if offsets is None else offsets[:routed]), rotate)
    experts = Experts(by_offset.there(found.key[:, :, :routed]), found.value[:, :, :routed], slots)
    experts.turn = Turn(angle[0] / scale, angle[1] / scale, rotate)
    placed = row_positions(site, at, None if offsets is None else offsets[routed:])
    return Rows(_turned(site, found.key[:, :, routed:], placed), found.value[:, :, routed:], experts)


def _turns_queries(site: Site) -> bool:
    """Whether queries may be turned instead of experts' keys."""
    return site.family is not None and site.family.direct and site.own is None


def _fused_projection(projection: nn.Module, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values from one projection for queries, keys and values, in this order."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if isinstance(weight, Tensor) and weight.device != normed.device:
        weight = None  # offloaded: only available when the module is called
    if type(projection) is nn.Linear and isinstance(weight, Tensor):
        third = weight.shape[0] // 3
        both = F.linear(normed, weight[third:], bias[third:] if isinstance(bias, Tensor) else None)
        return both.tensor_split(2, dim=-1)  # type: ignore[return-value]
    if type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor):
        third = weight.shape[1] // 3
        both = F.linear(normed, weight[:, third:].T, bias[third:] if isinstance(bias, Tensor) else None)
        return both.tensor_split(2, dim=-1)  # type: ignore[return-value]
    # It is wrapped by another adapter, a quantiser or an offloader, so the module itself is called.
    _, key, value = projection(normed).chunk(3, dim=-1)
    return key, value


def harvest(site: Site, normed: Tensor, positions: Positions) -> Rows:
    """Key and value rows by running the attention layer on the prompt rows and stopping at its attention kernel.

    The layer gets the rows and their positions, but no mask or state of the text's call, so the result depends on the
    rows only.

    Raises:
        RuntimeError: the layer did not make one key and one value per row.
    """
    attention, caught = site.attention, Harvest()
    batch, count = max(normed.shape[0], positions.batch), normed.shape[1]
    carried: dict[str, Any] = {COLUMNS: caught}
    arguments = _arguments(site, normed.expand(batch, -1, -1), positions)
    if site.rows_by_mask:
        carried, arguments["attention_mask"] = {}, MaskWithRows(None, caught)
    attention.forward(**arguments, **carried)
    made = [None if part is None else (part.ndim, part.shape[0], part.shape[2]) for part in (caught.key, caught.value)]
    if caught.arrived != site.calls or any(shape != (4, batch, count) for shape in made):
        raise RuntimeError(
            f"{type(attention).__name__} does not make one key and one value from each prompt row. This architecture "
            "is not supported."
        )
    return Rows(caught.key, caught.value)  # type: ignore[arg-type]


def _arguments(site: Site, rows: Tensor, positions: Positions) -> dict[str, Any]:
    """Arguments to run the layer on rows (B, R, D): their positions, and defaults or None for all others."""
    forward = unwrapped_forward(site.attention)
    batch, count = rows.shape[:2]
    given: dict[str, Any] = {"shared_kv_states": {}}  # Gemma 4 leaves its keys here for other layers
    given["position_embeddings"] = positions.tables(batch, count, site.sine_first)
    if positions.ids is not None:
        given["position_ids"] = positions.ids.expand(batch, count)
    elif positions.cos is not None:  # Ministral scales queries by position, but the rows' queries are not used
        given["position_ids"] = torch.zeros(batch, count, dtype=torch.long, device=rows.device)
    if site.reads_mask:  # everything is open
        given["attention_mask"] = rows.new_zeros(batch, 1, count, count)
    arguments: dict[str, Any] = {parameter_names(site.attention)[0]: rows}
    for name, parameter in list(inspect.signature(forward).parameters.items())[2:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        arguments[name] = given.get(name, default)
    return arguments
