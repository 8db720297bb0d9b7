# SPDX-License-Identifier: Apache-2.0
"""Products of tokens with the rows of their chosen experts, computed in blocks of equal size, one expert per block.

Choices (a token and an expert) are sorted by expert. The choices of each expert are put into blocks of `C` rows, and
the last block is padded. Shapes depend on the numbers of choices and experts only: no wait for the device and no
recompilation. Each block is multiplied with its expert's rows in one product.

Letters: `N` tokens, `K` active experts, `E` experts, `P` slots of one, `Hq` query heads, `H` key/value heads, `g` =
Hq / H, `d` width of a head, `C` rows of a block, `M` blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST, LARGEST = 4, 128  # rows of a block: fewer give many small products, more are mostly padding


class Order(NamedTuple):
    """The place of every choice in the blocks.

    Attributes:
        source: (M * C,) number of the choice in each row, -1 in padded rows.
        place: (N * K,) row of each choice.
        group: (M,) group (expert) of each block.
    """

    source: Tensor
    place: Tensor
    group: Tensor


def block_size(choices: int, groups: int) -> int:
    """Rows of a block, so few that padding adds at most half of the work."""
    size = SMALLEST
    while size < LARGEST and 4 * size * groups <= choices:
        size *= 2
    return size


def in_blocks(group: Tensor, groups: int) -> Order:
    """Put choices into blocks.

    Args:
        group: (N * K,) group of each choice.
        groups: number of groups.
    """
    choices, device = group.shape[0], group.device
    size = block_size(choices, groups)
    number = choices // size + min(groups, choices)  # upper bound on the blocks for any choices
    # Counts and unique keys, because ONNX has neither stable sorts nor searches.
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
    """Grouping of query heads by key/value heads: H and g."""

    groups: int
    each: int

    @property
    def number(self) -> int:
        return self.groups * self.each


def rows_for_blocks(index: Tensor, heads: Heads, blocks: int) -> Tensor:
    """Indices that gather the rows of blocks from the rows of tokens or choices, for all heads.

    Args:
        index: (M * C,) token or choice in each row.
        heads: grouping of the heads.
        blocks: number of blocks M.

    Returns:
        (M * H * C * g,) indices into (R * Hq) rows.
    """
    by_head = torch.arange(heads.number, device=index.device).view(heads.groups, 1, heads.each)
    return (index.view(blocks, 1, -1, 1) * heads.number + by_head).flatten()


def rows_for_choices(order: Order, heads: Heads) -> Tensor:
    """Indices that gather the rows of choices from blocks, for all heads: (N * K * Hq,) of (M * H * C * g) rows."""
    size = order.source.shape[0] // order.group.shape[0]
    first = torch.div(order.place, size, rounding_mode="floor") * ((heads.groups - 1) * size) + order.place
    by_group = torch.arange(0, heads.groups * size * heads.each, size * heads.each, device=first.device)
    by_head = (by_group[:, None] + torch.arange(heads.each, device=first.device)).flatten()
    return (first[:, None] * heads.each + by_head).flatten()


def rows_of_blocks(rows: Tensor, group: Tensor, slots: int) -> Tensor:
    """The expert's rows for each block.

    Args:
        rows: (1 or B, H, E * P, w) rows of all experts.
        group: (M,) expert, or sample and expert, of each block: see `group_for`.
        slots: slots per expert P.

    Returns:
        (M * H, P, w).
    """
    return by_expert(rows, slots).index_select(0, group).flatten(0, 1)


def sum_of_blocks(blocked: Tensor, group: Tensor, like: Tensor, slots: int) -> Tensor:
    """The transpose of `rows_of_blocks`: values of blocks, summed into their experts' rows.

    Args:
        blocked: (M * H, P, w) values of blocks.
        group: (M,) group of each block.
        like: (1 or B, H, E * P, w) tensor with the result's shape.
        slots: slots per expert P.
    """
    batch, heads, rows, width = like.shape
    total = blocked.new_zeros(batch * (rows // slots), heads, slots, width)
    total.index_add_(0, group, blocked.view(-1, heads, slots, width))
    return total.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def by_expert(rows: Tensor, slots: int) -> Tensor:
    """Rows (1 or B, H, E * P, w) as (E or B * E, H, P, w)."""
    return rows.unflatten(2, (-1, slots)).transpose(1, 2).flatten(0, 1)


def group_of(experts: Tensor, key: Tensor, slots: int) -> tuple[Tensor, int]:
    """Group of each choice (N * K,), and the number of groups. A group is an expert, or a sample and an expert.

    Args:
        experts: (B, T, K) chosen experts.
        key: (1 or B, H, E * P, d) keys. If every sample has its own keys, groups are per sample.
        slots: slots per expert P.
    """
    number = key.shape[2] // slots
    if key.shape[0] == 1:
        return experts.flatten(), number
    sample = torch.arange(0, key.shape[0] * number, number, device=experts.device)
    return (experts + sample[:, None, None]).flatten(), key.shape[0] * number


def group_for(rows: Tensor, key: Tensor, group: Tensor, slots: int) -> Tensor:
    """Groups of blocks for these rows, (M,). Rows may be shared by all samples although keys are not."""
    return group if rows.shape[0] == key.shape[0] else group % (rows.shape[2] // slots)
