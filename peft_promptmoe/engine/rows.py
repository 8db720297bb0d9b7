# SPDX-License-Identifier: Apache-2.0
"""Key and value rows of one adapter in one layer, and the columns that they become in an attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import VirtualTokensConfig
from ..models.sites import Site
from ..routing.record import Chosen
from .chosen_slots import ChosenSlots, Turn
from .columns import Columns, Slots
from .positions import relative_bias, slot_offsets


@dataclass
class Experts:
    """Key and value rows of experts, for token routing.

    Attributes:
        key: (B or 1, H, E * P, d) keys, expert by expert.
        value: (B or 1, H, E * P, v) values.
        slots: slots per expert P.
        turn: rotation that must be undone on queries, see `ChosenSlots`.
        table: result of `decoding_table`, if decoding is expected.
    """

    key: Tensor
    value: Tensor
    slots: int
    turn: Turn | None = None
    table: Tensor | None = None


@dataclass
class Rows:
    """Key and value rows of one adapter in one layer, before a call's tokens choose among them.

    Attributes:
        key: (B or 1, H, R, d) keys of the rows that all tokens see, with positions applied.
        value: (B or 1, H, R, v) their values.
        experts: rows of the experts that tokens choose from, or None.
        first: (B,) column of the first real token when the rows were made. None: column 0 for all samples.
    """

    key: Tensor
    value: Tensor
    experts: Experts | None = None
    first: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The rows after a change of the batch. Tensors with batch size 1 stay unchanged."""
        found: Rows = _changed(self, change)
        return found


def _changed(kept: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(kept, Tensor):
        return change(kept) if kept.shape[0] > 1 else kept
    if is_dataclass(kept) and not isinstance(kept, type):
        return replace(kept, **{part.name: _changed(getattr(kept, part.name), change) for part in fields(kept)})
    if isinstance(kept, tuple) and hasattr(kept, "_replace"):
        return type(kept)(*(_changed(part, change) for part in kept))
    return kept


def columns_of(rows: Rows, choice: Chosen | None, gathers: bool = True) -> Columns:
    """The columns of one call.

    With one token per sample and no gradients (decoding), the number of operations decides the time. The rows of the
    chosen experts then simply become columns. Otherwise attention to them is computed separately (`chosen`).

    Args:
        rows: rows of one adapter.
        choice: experts chosen by each token, for an adapter with token routing.
        gathers: whether the kernel takes a mask that can hold the gates of gathered rows.
    """
    experts, always = rows.experts, Slots(rows.key, rows.value)
    if choice is None or experts is None:
        return Columns([always])
    if gathers and choice.experts.shape[1] == 1 and not torch.is_grad_enabled():
        return Columns([_gathered(experts, choice), always])
    chosen = ChosenSlots(
        experts.key, experts.value, choice.log_gates, choice.experts, experts.slots, turn=experts.turn
    )
    return Columns([always], [chosen])


def gated_columns(rows: Rows, choice: Chosen | None) -> Columns:
    """The columns of one call, including all experts. A token's mask hides the experts that it did not choose.

    For layers that compute attention themselves, whose scores may depend on rows in their own ways.
    """
    experts, always = rows.experts, Slots(rows.key, rows.value)
    if choice is None or experts is None:
        return Columns([always])
    gates = choice.log_gates.new_full((*choice.log_gates.shape[:2], choice.of), -torch.inf)
    gates = gates.scatter(-1, choice.experts, choice.log_gates)
    return Columns([Slots(experts.key, experts.value, gates.repeat_interleave(experts.slots, dim=-1)), always])


def place(columns: Columns, site: Site, config: VirtualTokensConfig, first: Tensor | None, length: int) -> None:
    """Add what one attention layer needs to place columns before its text.

    Args:
        columns: the columns of one adapter in one call.
        site: the attention layer.
        config: the adapter's.
        first: (B,) column of the first real token. None: column 0 for all samples.
        length: number of queries.
    """
    slots, device = config.num_virtual_tokens, columns.slots[0].key.device
    step = 1 if config.prompt_positions == "prefix" else 0
    if site.own is not None:
        columns.offsets, columns.first = slot_offsets(columns.rows, slots, device) * step, first
    elif site.bias_owner is not None:
        bias = relative_bias(site, first, slot_offsets(slots, slots, device) * step, length)
        assert bias is not None
        columns.bias = bias.repeat(1, 1, 1, columns.rows // slots)
        for chosen in columns.chosen:
            chosen.bias = bias


def _gathered(experts: Experts, choice: Chosen) -> Slots:
    """The rows of the experts that one token of each sample chose, in one gather operation."""
    table = experts.table if experts.table is not None else decoding_table(experts)
    chosen, (batch, number, _) = choice.experts[:, 0], table.shape
    if batch > 1:
        chosen = chosen + torch.arange(0, batch * number, number, device=chosen.device)[:, None]
    found = table.flatten(0, 1).index_select(0, chosen.flatten())
    heads, width = experts.key.shape[1], experts.key.shape[3]
    found = found.view(chosen.shape[0], chosen.shape[1] * experts.slots, heads, -1).transpose(1, 2)
    gates = choice.log_gates[..., None].expand(-1, -1, -1, experts.slots).flatten(2)
    return Slots(found[..., :width], found[..., width:], gates)


def decoding_table(experts: Experts) -> Tensor:
    """Keys and values of each expert, (B or 1, E, P * H * (d + v)), with every sample's positions applied."""
    key, value = experts.key, experts.value
    if experts.turn is not None:
        key = experts.turn.there(key.expand(experts.turn.cos.shape[0], -1, -1, -1))
    batch = max(key.shape[0], value.shape[0])
    both = torch.cat([rows.expand(batch, -1, -1, -1).transpose(1, 2) for rows in (key, value)], dim=-1)
    return both.unflatten(1, (-1, experts.slots)).flatten(2)
