# SPDX-License-Identifier: Apache-2.0
"""Products of tokens with the rows of their chosen experts, computed in equal blocks, one expert per block.

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
    # Counts and keys of one choice each, for ONNX has neither stable sorts nor searches.
    order = torch.sort(group * choices + torch.arange(choices, device=device)).indices
    ordered = group[order]
    counts = torch.zeros(groups, dtype=group.dtype, device=device).scatter_add(0, group, torch.ones_like(group))
    starts = counts.cumsum(0) - counts
    ends = ((counts + size - 1) // size).cumsum(0)  # behind each group's blocks
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    rows = first[ordered] * size + torch.arange(choices, device=device) - starts[ordered]
    source = torch.full((number * size,), -1, dtype=order.dtype, device=device).scatter(0, rows, order)
    place = torch.empty_like(order).scatter(0, order, rows)
    blocks = (torch.arange(number, device=device)[:, None] >= ends).sum(dim=1)
    return Order(source, place, blocks.clamp(max=groups - 1))


class Heads(NamedTuple):
    """Query heads as the key/value heads group them: H and g."""

    groups: int
    each: int

    @property
    def number(self) -> int:
        return self.groups * self.each


def rows_for_blocks(index: Tensor, heads: Heads, blocks: int) -> Tensor:
    """Where blocks find their rows among those of all heads of tokens or choices.

    Args:
        index: (M * C,) which token or choice stands in each row.
        blocks: M.

    Returns:
        (M * H * C * g,) of (R * Hq) rows.
    """
    by_head = torch.arange(heads.number, device=index.device).view(heads.groups, 1, heads.each)
    return (index.view(blocks, 1, -1, 1) * heads.number + by_head).flatten()


def rows_for_choices(order: Order, heads: Heads) -> Tensor:
    """Where choices find what was computed for all their heads in blocks: (N * K * Hq,) of (M * H * C * g) rows."""
    size = order.source.shape[0] // order.group.shape[0]
    first = torch.div(order.place, size, rounding_mode="floor") * ((heads.groups - 1) * size) + order.place
    by_group = torch.arange(0, heads.groups * size * heads.each, size * heads.each, device=first.device)
    by_head = (by_group[:, None] + torch.arange(heads.each, device=first.device)).flatten()
    return (first[:, None] * heads.each + by_head).flatten()


def rows_of_blocks(rows: Tensor, group: Tensor, slots: int) -> Tensor:
    """The expert's rows that each block meets.

    Args:
        rows: (1 or B, H, E * P, w).
        group: (M,) the expert, or sample and expert, of each block: see `group_for`.
        slots: P.

    Returns:
        (M * H, P, w).
    """
    return by_expert(rows, slots).index_select(0, group).flatten(0, 1)


def sum_of_blocks(blocked: Tensor, group: Tensor, like: Tensor, slots: int) -> Tensor:
    """The transpose of `rows_of_blocks`: what blocks give their experts' rows, summed.

    Args:
        blocked: (M * H, P, w).
        group: (M,).
        like: (1 or B, H, E * P, w), of the result's shape.
    """
    batch, heads, rows, width = like.shape
    total = blocked.new_zeros(batch * (rows // slots), heads, slots, width)
    total.index_add_(0, group, blocked.view(-1, heads, slots, width))
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


def group_for(rows: Tensor, key: Tensor, group: Tensor, slots: int) -> Tensor:
    """(M,) groups of blocks among these rows, which may be the same for all samples where keys are not."""
    return group if rows.shape[0] == key.shape[0] else group % (rows.shape[2] // slots)
