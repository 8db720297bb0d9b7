# SPDX-License-Identifier: Apache-2.0
"""Prompt rows as columns of one attention call: what they are, gates on them, and how they meet keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.record import Chosen

# Score of a slot outside a token's top-k, before the scale. Finite, because it is multiplied with the zeros of the
# other slots' codes, and small enough for float16; times any usual scale its exponential is zero in float64, too.
CLOSED = -3e4


@dataclass
class Columns:
    """Key and value rows that join one attention call.

    Shapes: `B` batch, `H` key/value heads, `R` prompt rows, `T` query tokens, `G` gates, `d` head width.

    Attributes:
        key: (B or 1, H, R, d), positions already applied.
        value: (B or 1, H, R, d).
        log_gates: (B, T, G) added to the scores of the rows they own, minus infinity for a closed gate; or None.
        owner: (R,) index of the gate that a row answers to, -1 for rows that are always open; None without gates, or
            where the rows of each gate stand in order and `slots` says all.
        slots: rows of one gate, of columns that have gates and no owner.
        table: of `expert_table`, to gather from; None where nothing is gathered.
        bias: (B or 1, query heads, T, R) relative position bias, for models that have one.
        offsets: (R,) positions relative to the first real token, and
        first: (B,) its column (None for column 0 of all), for layers that compute attention themselves.
        calls: how many kernel calls the layer makes (differential attention: two), whose keys and values stand side by
            side along d.
        arrived: how often the attention interface has seen these rows.
    """

    key: Tensor
    value: Tensor
    log_gates: Tensor | None = None
    owner: Tensor | None = None
    slots: int = 0
    table: Tensor | None = None
    bias: Tensor | None = None
    offsets: Tensor | None = None
    first: Tensor | None = None
    calls: int = 1
    arrived: int = 0

    def arrive(self) -> Columns:
        """The rows of the kernel call that comes next."""
        self.arrived += 1
        if self.calls == 1 or self.arrived > self.calls:
            return self
        which = self.arrived - 1
        key, value = (part.chunk(self.calls, dim=-1)[which] for part in (self.key, self.value))
        return replace(self, key=key, value=value)


@dataclass
class MaskWithRows:
    """An attention mask with the prompt rows of its call, for layers that hand on their mask and nothing else."""

    mask: Tensor | None
    columns: Columns | Harvest | Overheard


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
    """Rows of several active adapters, side by side."""
    if len(parts) == 1:
        return parts[0]
    batch = max(part.key.shape[0] for part in parts)
    gates, owners, count = [], [], 0
    for part in parts:
        if part.log_gates is None:
            owners.append(torch.full((part.key.shape[2],), -1, device=part.key.device))
            continue
        owner = owner_of(part)
        owners.append(torch.where(owner >= 0, owner + count, owner))
        gates.append(part.log_gates)
        count += part.log_gates.shape[-1]
    biases = [part.bias for part in parts if part.bias is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    bias_batch = max((bias.shape[0] for bias in biases), default=1)
    return Columns(
        key=torch.cat([part.key.expand(batch, -1, -1, -1) for part in parts], dim=2),
        value=torch.cat([part.value.expand(batch, -1, -1, -1) for part in parts], dim=2),
        log_gates=torch.cat(gates, dim=-1) if gates else None,
        owner=torch.cat(owners) if gates else None,
        bias=torch.cat([bias.expand(bias_batch, -1, -1, -1) for bias in biases], dim=-1) if biases else None,
        offsets=torch.cat(offsets) if offsets else None,
        first=parts[0].first,
    )


def open_columns(columns: Columns, gates: Tensor | Chosen, slots: int) -> Columns:
    """Put gates on columns; where each sample has one token, keep only the columns of the experts it chose.

    So a decoding step costs the active experts, not all of them. It is short, and the number of operations is most of
    what it costs: one gather fetches keys and values, those that are always open among them.

    Args:
        columns: key and value of (B or 1, H, R, d), the gated experts' rows first.
        gates: log-gates (B, T, G), or what was chosen for one token.
        slots: rows of one expert.
    """
    if isinstance(gates, Tensor):
        return Columns(columns.key, columns.value, gates, slots=slots)
    table = columns.table if columns.table is not None else expert_table(columns, slots)
    chosen, number = gates.experts[:, 0], table.shape[1]
    if number > gates.of:
        always = torch.arange(gates.of, number, device=chosen.device).expand(chosen.shape[0], -1)
        chosen = torch.cat([chosen, always], dim=1)
    if table.shape[0] > 1:
        chosen = chosen + torch.arange(0, table.shape[0] * number, number, device=chosen.device)[:, None]
    rows = table.flatten(0, 1).index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
    rows = rows.flatten(1, 2).transpose(1, 2)
    key, value = rows.split([columns.key.shape[-1], columns.value.shape[-1]], dim=-1)
    return Columns(key, value, gates.log_gates, slots=slots)


def expert_table(columns: Columns, slots: int) -> Tensor:
    """(B or 1, R / slots, slots, H, width of a key and a value) keys and values, expert by expert."""
    batch = max(columns.key.shape[0], columns.value.shape[0])
    rows = [part.expand(batch, -1, -1, -1).transpose(1, 2) for part in (columns.key, columns.value)]
    return torch.cat(rows, dim=-1).unflatten(1, (-1, slots))


def owner_of(columns: Columns) -> Tensor:
    """(R,) the gate that each row answers to, -1 for rows that are always open."""
    if columns.owner is not None:
        return columns.owner
    assert columns.log_gates is not None
    owner = torch.arange(columns.key.shape[2], device=columns.key.device) // columns.slots
    return torch.where(owner < columns.log_gates.shape[-1], owner, -1)


def join_rows(
    columns: Columns,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    maskless: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """What an attention kernel takes, with prompt rows in front of the keys and values.

    Args:
        columns: the rows.
        query: (B, Hq, T, d).
        key, value: (B, H, S, d).
        mask: (B or 1, 1 or Hq, T or 1, S) boolean or additive, or None.
        scaling: factor of the scores; None for 1 / sqrt(d).
        maskless: whether to leave the mask None if it is.

    Returns:
        query, key, value, mask and scaling. The width of the first three may have grown, then the scaling is given and
        the output is to be cut to the values' old width.
    """
    batch, width, rows = query.shape[0], query.shape[3], columns.key.shape[2]
    if columns.key.shape[0] not in (1, batch):
        raise ValueError(
            f"The prompt rows were made for a batch of {columns.key.shape[0]} and attention now runs on {batch}. A "
            "cache that is filled with one batch cannot go on with another; start from a new cache."
        )
    if mask is not None:
        mask = F.pad(mask, (rows, 0), value=True if mask.dtype == torch.bool else 0.0)
    key = torch.cat([columns.key.to(key.dtype).expand(batch, *columns.key.shape[1:]), key], dim=2)
    value = torch.cat([columns.value.to(value.dtype).expand(batch, *columns.value.shape[1:]), value], dim=2)
    if columns.log_gates is None:
        return query, key, value, mask, scaling
    if not columns.log_gates.requires_grad and not maskless:
        return query, key, value, add_gates(mask, gates_by_row(columns), query, key), scaling
    scaling = scaling if scaling is not None else 1.0 / math.sqrt(width)
    query, key, value = fold_gates(query, key, value, columns.log_gates, owner_of(columns), scaling)
    return query, key, value, mask, scaling


def fold_gates(
    query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor, owner: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Write gates into queries and keys so that attention adds them to the scores by itself.

    An additive mask would do the same, but one that needs a gradient throws sdpa off its fused kernels and saves the
    attention weights. The gates become extra query features and every row's owner an extra one-hot key feature; the
    widths are filled up to a multiple of 8, which is what the fused kernels take.

    Args:
        query: (B, Hq, T, d).
        key, value: (B, H, R + S, d), the prompt rows first.
        log_gates: (B, T, G), minus infinity for closed gates.
        owner: (R,) gate of each prompt row, -1 for none.
        scaling: factor of the scores.

    Returns:
        query, key and value of width d + G, filled up to a multiple of 8.
    """
    width, gates = query.shape[-1], log_gates.shape[-1]
    fill = -(width + gates) % 8
    opened = (log_gates / scaling).clamp(min=CLOSED).to(query.dtype)
    opened = F.pad(opened, (0, fill))[:, None].expand(-1, query.shape[1], -1, -1)
    code = (owner[:, None] == torch.arange(gates + fill, device=owner.device)).to(key.dtype)
    code = F.pad(code, (0, 0, 0, key.shape[2] - code.shape[0])).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query, opened], dim=-1)
    key = torch.cat([key, code], dim=-1)
    return query, key, F.pad(value, (0, gates + fill))


def gates_by_row(columns: Columns) -> Tensor:
    """(B, T, up to R) the log-gate of each row; rows behind them are always open."""
    gates = columns.log_gates
    assert gates is not None
    if columns.owner is None:
        return gates[..., None].expand(*gates.shape, columns.slots).flatten(-2)
    return F.pad(gates, (0, 1))[..., columns.owner]  # -1 is the gate that is always open


def add_gates(mask: Tensor | None, by_row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The attention mask with the gates added to the columns of the rows they own.

    Args:
        mask: (B or 1, 1 or Hq, T or 1, R + S) boolean or additive, or None.
        by_row: (B, T, up to R).

    Returns:
        (B, 1, T, R + S) additive mask in the dtype of `query`.
    """
    gates = F.pad(by_row.to(query.dtype), (0, key.shape[2] - by_row.shape[-1]))[:, None]
    if mask is None:
        return gates
    if mask.dtype == torch.bool:
        return gates.masked_fill(~mask, torch.finfo(query.dtype).min)
    return gates + mask
