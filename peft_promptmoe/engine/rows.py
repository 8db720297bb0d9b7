# SPDX-License-Identifier: Apache-2.0
"""Key and value rows of one adapter in one layer, and the columns that a call's tokens choose from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..routing.record import Chosen
from .chosen_slots import ChosenSlots, Turn
from .columns import Columns, Slots


@dataclass
class Experts:
    """Key and value rows of experts that tokens choose among.

    Attributes:
        key: (B or 1, H, E * P, d), expert by expert.
        value: (B or 1, H, E * P, v).
        slots: P.
        turn: what is left to do of the keys' rotation, or rather to undo on queries; see `ChosenSlots`.
        table: of `decoding_table`, once decoding is to be expected.
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
        key: (B or 1, H, R, d) of the rows that are open to all tokens, positions applied.
        value: (B or 1, H, R, v).
        experts: those that tokens choose among.
        first: (B,) column of the first real token when the rows were made, None for column 0 of all.
    """

    key: Tensor
    value: Tensor
    experts: Experts | None = None
    first: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The rows with a change of the batch; what is the same for all samples, of batch 1, stays."""
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
    """The columns of one call, by what its tokens chose.

    One token of each sample and no gradient is decoding. It is short, and the number of operations is most of what it
    costs, so the rows of the chosen experts simply become columns. Elsewhere they are attended apart.

    Args:
        rows: of one adapter.
        choice: of each token, in an adapter with experts to choose among.
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
    """The columns of one call with all experts among them, those that a token did not choose closed to it.

    For layers that compute attention themselves, where scores may depend on rows in ways of their own.
    """
    experts, always = rows.experts, Slots(rows.key, rows.value)
    if choice is None or experts is None:
        return Columns([always])
    gates = choice.log_gates.new_full((*choice.log_gates.shape[:2], choice.of), -torch.inf)
    gates = gates.scatter(-1, choice.experts, choice.log_gates)
    return Columns([Slots(experts.key, experts.value, gates.repeat_interleave(experts.slots, dim=-1)), always])


def _gathered(experts: Experts, choice: Chosen) -> Slots:
    """The rows of the experts that one token of each sample chose, fetched by one gather."""
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
    """(B or 1, E, P * H * (d + v)) keys and values of each expert, with every sample's own positions applied."""
    key, value = experts.key, experts.value
    if experts.turn is not None:
        key = experts.turn.there(key.expand(experts.turn.cos.shape[0], -1, -1, -1))
    batch = max(key.shape[0], value.shape[0])
    both = torch.cat([rows.expand(batch, -1, -1, -1).transpose(1, 2) for rows in (key, value)], dim=-1)
    return both.unflatten(1, (-1, experts.slots)).flatten(2)
