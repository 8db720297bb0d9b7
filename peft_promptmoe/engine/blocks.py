# SPDX-License-Identifier: Apache-2.0
"""Every token's products with the rows of the experts it chose, grouped by expert in blocks of one size.

Choices (token and expert) are sorted by expert, and each expert's run is laid out in blocks of `C` rows, the last one
filled up. Shapes depend on the numbers of choices and experts alone: nothing waits for the device, nothing compiles
anew, and a block meets its expert's rows in one product.

Letters: `N` tokens, `K` active experts, `E` experts, `P` slots of one, `Hq` query heads, `H` key/value heads, `g` =
Hq / H, `d` width of a head, `C` rows of a block, `M` blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST, LARGEST = 4, 128  # rows of a block: fewer make many small products, more are mostly filling


class Order(NamedTuple):
    """Where every choice lies in the blocks.

    Attributes:
        source: (M * C,) the choice in each row, -1 in rows that fill a block up.
        place: (N * K,) the row of each choice.
        group: (M,) whose rows each block meets.
    """

    source: Tensor
    place: Tensor
    group: Tensor


def block_size(choices: int, groups: int) -> int:
    """Rows of a block: so few that filling adds half of the work at most."""
    size = SMALLEST
    while size < LARGEST and 4 * size * groups <= choices:
        size *= 2
    return size


def in_blocks(group: Tensor, groups: int) -> Order:
    """Lay choices out in blocks.

    Args:
        group: (N * K,) the group of each choice.
        groups: how many there are.
    """
    choices, device = group.shape[0], group.device
    size = block_size(choices, groups)
    number = choices // size + min(groups, choices)  # of blocks, however the choices fall
    ordered, order = torch.sort(group, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(groups + 1, device=device))
    ends = ((starts.diff() + size - 1) // size).cumsum(0)  # behind each group's blocks
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    rows = first[ordered] * size + torch.arange(choices, device=device) - starts[ordered]
    source = torch.full((number * size,), -1, device=device).scatter(0, rows, order)
    place = torch.empty_like(order).scatter(0, order, rows)
    blocks = torch.searchsorted(ends, torch.arange(number, device=device), right=True)
    return Order(source, place, blocks.clamp(max=groups - 1))


class Heads(NamedTuple):
    """Query heads as the key/value heads group them: H and g."""

    groups: int
    each: int

    @property
    def number(self) -> int:
        return self.groups * self.each


def to_blocks(rows: Tensor, index: Tensor, heads: Heads, blocks: int) -> Tensor:
    """Rows by token or choice, in the order of the blocks.

    Args:
        rows: (R, Hq, w).
        index: (M * C,) which of R stands in each row.
        blocks: M.

    Returns:
        (M * H, C * g, w).
    """
    width = rows.shape[-1]
    by_head = torch.arange(heads.number, device=index.device).view(heads.groups, 1, heads.each)
    places = index.view(blocks, 1, -1, 1) * heads.number + by_head
    found = rows.reshape(-1, width).index_select(0, places.flatten())
    return found.view(blocks * heads.groups, -1, width)


def to_choices(blocked: Tensor, order: Order, heads: Heads) -> Tensor:
    """What was computed in blocks, by choice.

    Args:
        blocked: (M * H, C * g, w).

    Returns:
        (N * K, Hq, w).
    """
    width, size = blocked.shape[-1], blocked.shape[1] // heads.each
    block, row = order.place // size, order.place % size
    first = (block * heads.groups * size + row) * heads.each
    by_head = torch.arange(heads.groups, device=first.device)[:, None] * (size * heads.each)
    by_head = by_head + torch.arange(heads.each, device=first.device)
    places = first[:, None, None] + by_head
    return blocked.reshape(-1, width).index_select(0, places.flatten()).view(-1, heads.number, width)


def rows_of_blocks(rows: Tensor, group: Tensor, slots: int) -> Tensor:
    """The expert's rows that each block meets.

    Args:
        rows: (1 or B, H, E * P, w).
        group: (M,) of `group_of`.
        slots: P.

    Returns:
        (M * H, P, w).
    """
    return by_expert(rows, slots).index_select(0, _expert(rows, group, slots)).flatten(0, 1)


def sum_of_blocks(blocked: Tensor, group: Tensor, like: Tensor, slots: int) -> Tensor:
    """The transpose of `rows_of_blocks`: what blocks give their experts' rows, summed.

    Args:
        blocked: (M * H, P, w).
        group: (M,).
        like: (1 or B, H, E * P, w), of the result's shape.
    """
    batch, heads, rows, width = like.shape
    total = blocked.new_zeros(batch * (rows // slots), heads, slots, width)
    total.index_add_(0, _expert(like, group, slots), blocked.view(-1, heads, slots, width))
    return total.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def by_expert(rows: Tensor, slots: int) -> Tensor:
    """(1 or B, H, E * P, w) rows as (E or B * E, H, P, w)."""
    return rows.unflatten(2, (-1, slots)).transpose(1, 2).flatten(0, 1)


def group_of(experts: Tensor, key: Tensor, slots: int) -> tuple[Tensor, int]:
    """(N * K,) the group of each choice, and how many there are: its expert, or sample and expert.

    Args:
        experts: (B, T, K).
        key: (1 or B, H, E * P, d); keys of each sample's own make groups of its own.
        slots: P.
    """
    number = key.shape[2] // slots
    if key.shape[0] == 1:
        return experts.flatten(), number
    sample = torch.arange(0, key.shape[0] * number, number, device=experts.device)
    return (experts + sample[:, None, None]).flatten(), key.shape[0] * number


def _expert(rows: Tensor, group: Tensor, slots: int) -> Tensor:
    return group if rows.shape[0] > 1 else group % (rows.shape[2] // slots)
