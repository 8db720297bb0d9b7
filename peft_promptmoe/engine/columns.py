# SPDX-License-Identifier: Apache-2.0
"""Prompt rows in one attention call: which columns they are, who may see them, how they join keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chosen import HALVES, attend_chosen
from .chosen_slots import ChosenSlots


class Slots(NamedTuple):
    """Rows that become columns side by side.

    Attributes:
        key: (B or 1, H, R, d), positions applied.
        value: (B or 1, H, R, v).
        gates: (B, T, R) added to their scores; None where they are simply open.
    """

    key: Tensor
    value: Tensor
    gates: Tensor | None = None


@dataclass
class Columns:
    """What joins one attention call.

    Shapes: `B` batch, `H` key/value heads, `R` prompt rows, `T` query tokens, `d` and `v` widths of a head.

    Attributes:
        slots: rows that become columns.
        chosen: slots of experts that are attended apart, adapter by adapter, and become one column each.
        bias: (B or 1, query heads, T, all R) relative position bias, for models that have one.
        offsets: (all R,) positions relative to the first real token, and
        first: (B,) its column (None for column 0 of all), for layers that compute attention themselves.
        calls: how many kernel calls the layer makes (differential attention: two), whose keys and values stand side by
            side along d.
        arrived: how often the attention interface has seen these columns.
    """

    slots: list[Slots]
    chosen: list[ChosenSlots] = field(default_factory=list)
    bias: Tensor | None = None
    offsets: Tensor | None = None
    first: Tensor | None = None
    calls: int = 1
    arrived: int = 0

    def arrive(self) -> Columns:
        """The columns of the kernel call that comes next."""
        self.arrived += 1
        if self.calls == 1 or self.arrived > self.calls:
            return self
        which = self.arrived - 1
        slots = [Slots(self._part(each.key, which), self._part(each.value, which), each.gates) for each in self.slots]
        chosen = [
            replace(each, key=self._part(each.key, which), value=self._part(each.value, which)) for each in self.chosen
        ]
        return replace(self, slots=slots, chosen=chosen)

    def _part(self, rows: Tensor, which: int) -> Tensor:
        return rows.chunk(self.calls, dim=-1)[which]

    @property
    def rows(self) -> int:
        return sum(slots.key.shape[2] for slots in self.slots)

    @property
    def number(self) -> int:
        """Columns in front of the text's."""
        return len(self.chosen) + self.rows


@dataclass
class MaskWithRows:
    """An attention mask with the prompt rows of its call, for layers that hand on their mask and nothing else."""

    mask: Tensor | None
    columns: Columns | Overheard


class Overheard:
    """Stands in for `Columns` to note the keys and values of a layer's own call, which goes on as if it were not.

    Those of several kernel calls stand side by side along d.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.arrived = 0

    def note(self, key: Tensor, value: Tensor) -> None:
        self.key = key if self.key is None else torch.cat([self.key, key], dim=-1)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=-1)
        self.arrived += 1


class Harvest(Overheard):
    """Stands in for `Columns` when the attention layer itself is run on prompt rows to get their keys and values."""

    def catch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Note keys and values, and give (B, Hq, R, dv) zeros that the rest of the layer can run on."""
        self.note(key, value)
        return value.new_zeros(*query.shape[:3], value.shape[-1])


def merge_columns(parts: list[Columns]) -> Columns:
    """Columns of several active adapters, side by side."""
    if len(parts) == 1:
        return parts[0]
    biases = [part.bias for part in parts if part.bias is not None]
    batch = max((bias.shape[0] for bias in biases), default=1)
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Columns(
        [slots for part in parts for slots in part.slots],
        [chosen for part in parts for chosen in part.chosen],
        torch.cat([bias.expand(batch, -1, -1, -1) for bias in biases], dim=-1) if biases else None,
        torch.cat(offsets) if offsets else None,
        parts[0].first,
    )


@dataclass
class Joined:
    """What an attention kernel takes, with prompt columns in front of the keys and values, and the way back.

    Attributes:
        query: (B, Hq, lead + T, width).
        key, value: (B, H, columns + S, width).
        mask, scaling: as the kernel takes them.
        finish: makes (B, T, Hq, v) of the kernel's output (B, lead + T, Hq, width).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    finish: Callable[[Tensor], Tensor]


def join_rows(
    columns: Columns,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    lead: int = 0,
    cap: float | None = None,
) -> Joined:
    """Put prompt columns in front of the keys and values of one attention call.

    Args:
        columns: what joins.
        query: (B, Hq, T, d).
        key, value: (B, H, S, d) and (B, H, S, v).
        mask: (B or 1, 1 or Hq, T or 1, S) boolean or additive, or None.
        scaling: factor of the scores; None for 1 / sqrt(d).
        lead: blank queries to put in front.
        cap: what the kernel squashes scores by, before it adds the mask.
    """
    width, value_width, gates = query.shape[3], value.shape[3], gates_of(columns.slots)
    if mask is not None:
        mask = F.pad(mask, (columns.number, 0), value=True if mask.dtype == torch.bool else 0.0)
    if gates is not None:
        gates = F.pad(gates, (len(columns.chosen), 0)) if columns.chosen else gates
        mask = add_gates(mask, gates, query, columns.number + key.shape[2])
    keys, values = [slots.key for slots in columns.slots], [slots.value for slots in columns.slots]
    if not columns.chosen:
        query = F.pad(query, (0, 0, lead, 0)) if lead else query
        key, value = _in_front(key, keys), _in_front(value, values)
        return Joined(query, key, value, mask, scaling, lambda output: output[:, lead:])
    adapters, scaling = len(columns.chosen), scaling if scaling is not None else 1.0 / math.sqrt(width)
    apart = attend_chosen(query, value, columns.chosen, scaling, lead, cap)
    codes, wide = torch.eye(adapters, dtype=key.dtype, device=key.device), apart.query.shape[-1]
    # A cap comes between products and softmax; what is behind it is the mask, which then takes the score there.
    of_score = codes.repeat_interleave(HALVES, dim=1) if cap is None else codes[:, :0]
    key = _in_front(key, keys, _code(of_score, width, wide))
    value = _in_front(value, values, _code(codes, value_width, wide))
    if cap is not None:
        mask = _with_scores(mask, apart.score.permute(1, 3, 2, 0), key)
    return Joined(apart.query, key, value, mask, scaling, apart.finish)


def _in_front(text: Tensor, rows: list[Tensor], code: Tensor | None = None) -> Tensor:
    """(B, H, columns + S, width) rows in front of the text's; with features, all as wide as `code`, which is first."""
    batch, parts = text.shape[0], [each.to(text.dtype) for each in (*rows, text)]
    for each in parts:
        if each.shape[0] not in (1, batch):
            raise ValueError(
                f"The prompt rows were made for a batch of {each.shape[0]} and attention now runs on {batch}. A cache "
                "that is filled with one batch cannot go on with another; start from a new cache."
            )
    if code is not None:
        fill = code.shape[-1] - text.shape[-1]
        parts = [code.expand(1, text.shape[1], -1, -1), *[F.pad(each, (0, fill)) for each in parts]]
    return torch.cat([each.expand(batch, -1, -1, -1) if each.shape[0] < batch else each for each in parts], dim=2)


def _code(codes: Tensor, width: int, wide: int) -> Tensor:
    """(A, wide) the columns of chosen slots, which are nothing but features."""
    return F.pad(codes, (width, wide - width - codes.shape[-1]))


def _with_scores(mask: Tensor | None, scores: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, T, columns + S) additive mask with the scores (B, Hq, T, A) of the first columns."""
    if mask is None:
        mask = scores.new_zeros(1, 1, 1, key.shape[2])
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=key.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(key.dtype).min
        )
    rest = mask[..., scores.shape[-1] :].to(key.dtype)
    return torch.cat([scores.to(key.dtype), rest.expand(*scores.shape[:3], -1)], dim=-1)


def gates_of(slots: list[Slots]) -> Tensor | None:
    """(B, T, up to all R) gates of all rows; those behind the last gated ones are open. None if all are."""
    gated = [number for number, each in enumerate(slots) if each.gates is not None]
    if not gated:
        return None
    if gated == [0]:
        return slots[0].gates
    like = slots[gated[0]].gates
    assert like is not None
    return torch.cat(
        [like.new_zeros(*like.shape[:2], each.key.shape[2]) if each.gates is None else each.gates for each in slots],
        dim=-1,
    )


def add_gates(mask: Tensor | None, gates: Tensor, query: Tensor, columns: int) -> Tensor:
    """The attention mask with gates added to the first columns.

    Args:
        mask: (B or 1, 1 or Hq, T or 1, columns) boolean or additive, or None.
        gates: (B, T, up to columns).
        query: of the dtype that the mask is to have.
        columns: in front of the text's, and the text's.

    Returns:
        (B, 1 or Hq, T, columns) additive mask.
    """
    gates = F.pad(gates.to(query.dtype), (0, columns - gates.shape[-1]))[:, None]
    if mask is None:
        return gates
    if mask.dtype == torch.bool:
        return gates.masked_fill(~mask, torch.finfo(query.dtype).min)
    return gates + mask
