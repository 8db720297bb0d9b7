# SPDX-License-Identifier: Apache-2.0
"""Prompt rows as columns of one attention call: what they are, who may see them, how they meet keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.record import Chosen
from .chosen import HALVES, attend_chosen
from .chosen_slots import ChosenSlots, Turn


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
    """

    key: Tensor
    value: Tensor
    experts: Experts | None = None


@dataclass
class Columns:
    """What joins one attention call.

    Shapes: `B` batch, `H` key/value heads, `R` prompt rows, `T` query tokens, `d` and `v` widths of a head.

    Attributes:
        key: (B or 1, H, R, d), positions applied.
        value: (B or 1, H, R, v).
        gates: (B, T, up to R) added to the scores of the first rows; None where all are simply open.
        chosen: slots of experts that are attended apart, adapter by adapter.
        bias: (B or 1, query heads, T, R) relative position bias, for models that have one.
        arrived: how often the attention interface has seen these columns.
    """

    key: Tensor
    value: Tensor
    gates: Tensor | None = None
    chosen: list[ChosenSlots] = field(default_factory=list)
    bias: Tensor | None = None
    arrived: int = 0

    @property
    def number(self) -> int:
        """Columns in front of the text's: rows, and one for each adapter's chosen slots."""
        return len(self.chosen) + self.key.shape[2]


@dataclass
class MaskWithRows:
    """An attention mask with the prompt rows of its call, for layers that hand on their mask and nothing else."""

    mask: Tensor | None
    columns: Columns | Harvest


class Harvest:
    """Stands in for `Columns` when the attention layer itself is run on prompt rows to get their keys and values."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None


def merge_columns(parts: list[Columns]) -> Columns:
    """Columns of several active adapters, side by side."""
    if len(parts) == 1:
        return parts[0]
    batch = max(part.key.shape[0] for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    bias_batch = max((bias.shape[0] for bias in biases), default=1)
    gates = None
    if given := [part.gates for part in parts if part.gates is not None]:
        blank = given[0].new_zeros(*given[0].shape[:2], 0)
        gates = torch.cat([_filled(blank if part.gates is None else part.gates, part.key) for part in parts], dim=-1)
    return Columns(
        key=torch.cat([part.key.expand(batch, -1, -1, -1) for part in parts], dim=2),
        value=torch.cat([part.value.expand(batch, -1, -1, -1) for part in parts], dim=2),
        gates=gates,
        chosen=[chosen for part in parts for chosen in part.chosen],
        bias=torch.cat([bias.expand(bias_batch, -1, -1, -1) for bias in biases], dim=-1) if biases else None,
    )


def _filled(gates: Tensor, key: Tensor) -> Tensor:
    """(B, T, R) gates of all rows of `key`; those behind the gated ones are open."""
    return F.pad(gates, (0, key.shape[2] - gates.shape[-1]))


def columns_of(rows: Rows, choice: Chosen | None, gathers: bool = True) -> Columns:
    """The columns of one call, by what its tokens chose.

    One token of each sample and no gradient is decoding. It is short, and the number of operations is most of what it
    costs, so the rows of the chosen experts simply become columns. Elsewhere they are attended apart.

    Args:
        rows: of one adapter.
        choice: of each token, in an adapter with experts to choose among.
        gathers: whether the kernel takes a mask that can hold the gates of gathered rows.
    """
    if choice is None or rows.experts is None:
        return Columns(rows.key, rows.value)
    if gathers and choice.experts.shape[1] == 1 and not torch.is_grad_enabled():
        return _gathered(rows, rows.experts, choice)
    experts = rows.experts
    chosen = ChosenSlots(
        experts.key, experts.value, choice.log_gates, choice.experts, experts.slots, turn=experts.turn
    )
    return Columns(rows.key, rows.value, chosen=[chosen])


def _gathered(rows: Rows, experts: Experts, choice: Chosen) -> Columns:
    """Columns of the chosen experts and of the open rows: one gather fetches the keys and values of all of them."""
    table = experts.table if experts.table is not None else decoding_table(rows, experts)
    chosen, number = choice.experts[:, 0], table.shape[1]
    if number > choice.of:
        always = torch.arange(choice.of, number, device=chosen.device).expand(chosen.shape[0], -1)
        chosen = torch.cat([chosen, always], dim=1)
    if table.shape[0] > 1:
        chosen = chosen + torch.arange(0, table.shape[0] * number, number, device=chosen.device)[:, None]
    found = table.flatten(0, 1).index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
    found = found.flatten(1, 2).transpose(1, 2)
    key, value = found.split([rows.key.shape[-1], rows.value.shape[-1]], dim=-1)
    return Columns(key, value, gates=choice.log_gates.repeat_interleave(experts.slots, dim=-1))


def decoding_table(rows: Rows, experts: Experts) -> Tensor:
    """(B or 1, E + R / P, P, H, d + v) keys and values of all rows, expert by expert, each sample's own positions
    applied."""
    key = experts.key
    if experts.turn is not None:
        key = experts.turn.there(key.expand(experts.turn.cos.shape[0], -1, -1, -1))
    parts = [key, rows.key, experts.value, rows.value]
    batch = max(part.shape[0] for part in parts)
    key, open_key, value, open_value = (part.expand(batch, -1, -1, -1) for part in parts)
    both = torch.cat([torch.cat([key, open_key], dim=2), torch.cat([value, open_value], dim=2)], dim=-1)
    return both.transpose(1, 2).unflatten(1, (-1, experts.slots))


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
    batch, width, value_width = query.shape[0], query.shape[3], value.shape[3]
    if columns.key.shape[0] not in (1, batch):
        raise ValueError(
            f"The prompt rows were made for a batch of {columns.key.shape[0]} and attention now runs on {batch}. A "
            "cache that is filled with one batch cannot go on with another; start from a new cache."
        )
    if mask is not None:
        mask = F.pad(mask, (columns.number, 0), value=True if mask.dtype == torch.bool else 0.0)
    if not columns.chosen:
        key, value = _in_front(key, columns.key), _in_front(value, columns.value)
        if columns.gates is not None:
            mask = add_gates(mask, columns.gates, query, key)
        query = F.pad(query, (0, 0, lead, 0)) if lead else query
        return Joined(query, key, value, mask, scaling, lambda output: output[:, lead:])
    adapters, scaling = len(columns.chosen), scaling if scaling is not None else 1.0 / math.sqrt(width)
    apart = attend_chosen(query, value, columns.chosen, scaling, lead, cap)
    codes, wide = torch.eye(adapters, dtype=key.dtype, device=key.device), apart.query.shape[-1]
    # A cap comes between products and softmax; what is behind it is the mask, which then takes the score there.
    of_score = codes.repeat_interleave(HALVES, dim=1) if cap is None else codes[:, :0]
    key = _in_front(key, columns.key, _code(of_score, width, wide))
    value = _in_front(value, columns.value, _code(codes, value_width, wide))
    if cap is not None:
        mask = _with_scores(mask, apart.score.permute(1, 3, 2, 0), key)
    return Joined(apart.query, key, value, mask, scaling, apart.finish)


def _in_front(text: Tensor, rows: Tensor, code: Tensor | None = None) -> Tensor:
    """(B, H, columns + S, width) rows in front of the text's; with features, all as wide as `code`, which is first."""
    rows = rows.to(text.dtype).expand(text.shape[0], -1, -1, -1)
    if code is None:
        return torch.cat([rows, text], dim=2)
    fill = code.shape[-1] - text.shape[-1]
    return torch.cat([code.expand(*text.shape[:2], -1, -1), F.pad(rows, (0, fill)), F.pad(text, (0, fill))], dim=2)


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


def add_gates(mask: Tensor | None, by_row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The attention mask with gates added to the columns of the rows they open.

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
