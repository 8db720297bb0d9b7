# SPDX-License-Identifier: Apache-2.0
"""Flex attention written out, with gradients and in float64, which torch's own has on no CPU.

What is open follows from the block lists as the fused kernel reads them: nothing in a block that is in no list, what
the mask's function says in a partial block, everything in a full one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask


def _listed(number: Tensor, indices: Tensor) -> Tensor:
    """(B, H, query blocks, column blocks) which blocks a list names."""
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in number.shape)).tolist():
        found[tuple(place)][indices[tuple(place)][: number[tuple(place)]].long()] = True
    return found


def open_columns(mask: BlockMask, queries: int, columns: int) -> Tensor:
    """(B, H, T, S) booleans."""
    rows, width = mask.BLOCK_SIZE

    def spread(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(rows, 2).repeat_interleave(width, 3)[:, :, :queries, :columns]

    by_function = create_mask(mask.mask_mod, *mask.kv_num_blocks.shape[:2], queries, columns, device="cpu")
    seen = spread(_listed(mask.kv_num_blocks, mask.kv_indices)) & by_function
    if mask.full_kv_indices is not None:
        seen = seen | spread(_listed(mask.full_kv_num_blocks, mask.full_kv_indices))
    return seen


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> Tensor:
    """(B, Hq, T, d) of query (B, Hq, T, d), key and value (B, H, S, d)."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.mT * (scale if scale is not None else query.shape[-1] ** -0.5)
    if score_mod is not None:
        places = [
            torch.arange(size).view([-1 if axis == own else 1 for axis in range(4)])
            for own, size in enumerate(scores.shape)
        ]
        scores = score_mod(scores, *places)
    if block_mask is not None:
        assert block_mask.seq_lengths == (query.shape[2], key.shape[2])
        seen = open_columns(block_mask, query.shape[2], key.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value
