# SPDX-License-Identifier: Apache-2.0
"""Tries layers outside the table of tested architectures on a few rows, before the model is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.inspection import parameter_names
from ..models.reachable import TROUBLE, CannotJoin
from ..models.sites import Site
from .eval_mode import eval_mode
from .positions import Positions, first_position
from .projection import harvest
from .rows import Rows
from .timm_attention import close_forward, open_forward
from .transformers_attention import config_view

ROWS = 3
CLOSE = 1e-3


def try_on_rows(site: Site) -> None:
    """Run an attention layer on rows, and check that a row's key and value do not depend on the other rows.

    Raises:
        CannotJoin: they do, or the layer cannot be run on rows.
    """
    if site.family is not None and site.family.direct:
        return
    device, dtype = _place(site)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, ROWS, site.width, generator=generator).to(device, dtype)
    other = rows.clone()
    other[:, 0] = -rows[:, 0] + 1.0
    try:
        first, second = (_harvest(site, part) for part in (rows, other))
    except TROUBLE as error:
        trouble = f"run on prompt rows alone to compute their keys and values, it raises {type(error).__name__}"
        raise CannotJoin(site.name, site.attention, f"{trouble} ({str(error).rstrip('.')})") from error
    parts = ((first.key, second.key), (first.value, second.value))
    if device.type != "meta" and any(_differ(one[:, :, 1:], two[:, :, 1:]) for one, two in parts):
        neighbours = "its keys and values also depend on neighbouring tokens (by a convolution, for example)"
        raise CannotJoin(site.name, site.attention, f"{neighbours}, and prompts have no neighbours")


@torch.no_grad()
def _harvest(site: Site, rows: Tensor) -> Rows:
    attention: Any = site.attention
    if site.is_called:
        open_forward(site)
    else:
        attention.config = config_view(site)
    try:
        with eval_mode(attention):
            return harvest(site, rows, _where_the_text_starts(site, rows))
    finally:
        if site.is_called:
            close_forward(attention)
        else:
            attention.config = attention.config.real


def _where_the_text_starts(site: Site, rows: Tensor) -> Positions:
    """Position 0 for all rows, so that only the rows themselves differ."""
    if not site.is_rotary or site.rotary is None:
        return Positions()
    ids = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
    if "position_embeddings" not in parameter_names(site.attention):
        return Positions(ids=ids)
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    return first_position(site, {"position_embeddings": site.rotary(rows, ids, **named)}, None)


def _place(site: Site) -> tuple[torch.device, torch.dtype]:
    parameters = [parameter for parameter in site.attention.parameters() if parameter.is_floating_point()]
    norm = getattr(site.norm, "weight", None)
    like = norm if isinstance(norm, Tensor) else parameters[0] if parameters else torch.empty(0)
    return like.device, like.dtype


def _differ(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() > CLOSE * (one.abs().max() + 1e-12))
