# SPDX-License-Identifier: Apache-2.0
"""Prompt rows in one attention call: their columns, which tokens see them, and how they join keys and values."""

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
    """Rows that become columns, side by side.

    Attributes:
        key: (B or 1, H, R, d) keys with positions applied.
        value: (B or 1, H, R, v) values.
        gates: (B, T, R) numbers added to their scores. None: nothing is added.
    """

    key: Tensor
    value: Tensor
    gates: Tensor | None = None


@dataclass
class Columns:
    """The prompts that join one attention call.

    Shapes: `B` batch, `H` key/value heads, `R` prompt rows, `T` query tokens, `d` and `v` widths of a head.

    Attributes:
        slots: rows that become columns.
        chosen: chosen experts' slots, one item per adapter. Attention to them is computed separately, and each item
            becomes one column.
        bias: (B or 1, query heads, T, all R) relative position bias, for models that have one.
        offsets: (all R,) positions relative to the first real token, for layers that compute attention themselves.
        first: (B,) column of the first real token, for the same layers. None: column 0 for all samples.
        calls: number of kernel calls of the layer (two for differential attention). Their keys and values are side by
            side along d.
        arrived: how often the attention interface has received these columns.
    """

    slots: list[Slots]
    chosen: list[ChosenSlots] = field(default_factory=list)
    bias: Tensor | None = None
    offsets: Tensor | None = None
    first: Tensor | None = None
    calls: int = 1
    arrived: int = 0

    def arrive(self) -> Columns:
        """The columns of the next kernel call."""
        self.arrived += 1
        if self.calls == 1 or self.arrived > self.calls:
            return self
        which = self.arrived - 1
        slots = [Slots(self._part(each.key, which), self._part(each.value, which), each.gates) for each in self.slots]
        chosen = [
            replace(each, key=self._part(each.key, which), value=self._part(each.value, which)) for each in self.chosen
        ]
        return replace(self, slots=slots, chosen=chosen)

    def check_arrived(self, layer: str) -> None:
        """Raise RuntimeError if `layer`, its name in the message, did not use the columns once in each kernel call."""
        if self.arrived != self.calls:
            raise RuntimeError(
                f"{layer} reached its attention kernel {self.arrived} times in one call instead of {self.calls}, so "
                "the prompts did not join its attention as defined. This architecture (or this option of it) is not "
                "supported. Unload the adapter."
            )

    def _part(self, rows: Tensor, which: int) -> Tensor:
        return rows.chunk(self.calls, dim=-1)[which]

    @property
    def rows(self) -> int:
        return sum(slots.key.shape[2] for slots in self.slots)

    @property
    def number(self) -> int:
        """Number of columns in front of the text."""
        return len(self.chosen) + self.rows


@dataclass
class MaskWithRows:
    """An attention mask together with the prompt rows of a call, for layers that pass on their mask only."""

    mask: Tensor | None
    columns: Columns | Overheard


class Overheard:
    """Replaces `Columns` to record the keys and values of a layer's own call without changing it.

    Keys and values of several kernel calls are side by side along d.
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
    """Replaces `Columns` when the attention layer is run on prompt rows to compute their keys and values."""

    def catch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Record keys and values, and return zeros (B, Hq, R, dv) as the output of attention."""
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
    """The arguments of an attention kernel with prompt columns, and the function for its output.

    Attributes:
        query: (B, Hq, lead + T, width) queries.
        key, value: (B, H, columns + S, width) keys and values with the prompt columns in front.
        mask, scaling: mask and scale for the kernel.
        finish: function that turns the kernel's output (B, lead + T, Hq, width) into (B, T, Hq, v).
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
        columns: the prompt columns.
        query: (B, Hq, T, d) queries.
        key, value: (B, H, S, d) and (B, H, S, v) keys and values of the text.
        mask: (B or 1, 1 or Hq, T or 1, S) boolean or additive, or None.
        scaling: factor of the scores. None: 1 / sqrt(d).
        lead: number of blank queries to put in front.
        cap: soft cap that the kernel applies to scores before it adds the mask, or None.
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
    # With a cap the score is put into the mask, which is added after the cap.
    of_score = codes.repeat_interleave(HALVES, dim=1) if cap is None else codes[:, :0]
    key = _in_front(key, keys, _code(of_score, width, wide))
    value = _in_front(value, values, _code(codes, value_width, wide))
    if cap is not None:
        mask = _with_scores(mask, apart.score.permute(1, 3, 2, 0), key)
    return Joined(apart.query, key, value, mask, scaling, apart.finish)


def _in_front(text: Tensor, rows: list[Tensor], code: Tensor | None = None) -> Tensor:
    """Rows in front of the text, (B, H, columns + S, width). With `code`, it comes first and gives the width."""
    batch, parts = text.shape[0], [each.to(text.dtype) for each in (*rows, text)]
    for each in parts:
        if each.shape[0] not in (1, batch):
            raise ValueError(
                f"The prompt rows were made for a batch of {each.shape[0]}, but attention now runs on {batch}. A "
                "cache that was filled with one batch cannot be used with another. Start from a new cache."
            )
    if code is not None:
        fill = code.shape[-1] - text.shape[-1]
        parts = [code.expand(1, text.shape[1], -1, -1), *[F.pad(each, (0, fill)) for each in parts]]
    return torch.cat([each.expand(batch, -1, -1, -1) if each.shape[0] < batch else each for each in parts], dim=2)


def _code(codes: Tensor, width: int, wide: int) -> Tensor:
    """The columns of chosen slots, (A, wide), which only consist of features."""
    return F.pad(codes, (width, wide - width - codes.shape[-1]))


def _with_scores(mask: Tensor | None, scores: Tensor, key: Tensor) -> Tensor:
    """Additive mask (B, Hq, T, columns + S) with the scores (B, Hq, T, A) of the first columns."""
    if mask is None:
        mask = scores.new_zeros(1, 1, 1, key.shape[2])
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=key.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(key.dtype).min
        )
    rest = mask[..., scores.shape[-1] :].to(key.dtype)
    return torch.cat([scores.to(key.dtype), rest.expand(*scores.shape[:3], -1)], dim=-1)


def gates_of(slots: list[Slots]) -> Tensor | None:
    """Gates of all rows, (B, T, up to all R). Rows after the last gated ones are open. None if all rows are open."""
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
        query: queries, for the dtype of the mask.
        columns: number of all columns, prompts and text.

    Returns:
        (B, 1 or Hq, T, columns) additive mask.
    """
    gates = F.pad(gates.to(query.dtype), (0, columns - gates.shape[-1]))[:, None]
    if mask is None:
        return gates
    if mask.dtype == torch.bool:
        return gates.masked_fill(~mask, torch.finfo(query.dtype).min)
    return gates + mask
