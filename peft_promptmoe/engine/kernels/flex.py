# SPDX-License-Identifier: Apache-2.0
"""Flex attention. Its mask is a function of positions and a list of the blocks with open entries.

Rows fill whole blocks in front of the text, so the text's blocks do not change. Their list is shifted by the rows'
blocks instead of being built again, which would cost more than the attention to the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..columns import Columns, join_rows
from .kernel import Function, Kernel, refuse_capped_choice

SHIFTED = "_promptmoe_shifted"


def real_tokens(mask: BlockMask | Tensor | None, length: int) -> Tensor | None:
    """Which tokens are text, (B, T): those that may attend to themselves. None if nothing is masked."""
    if mask is None:
        return None
    if not isinstance(mask, BlockMask):
        raise ValueError(
            f"Flex attention takes block masks, but this model passes a {type(mask).__name__}. Use "
            "attn_implementation='sdpa' with this model."
        )
    batch, device = mask.shape[0], mask.kv_num_blocks.device
    sample, token = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    return mask.mask_mod(sample, torch.zeros_like(sample), token, token).expand(batch, length)


def _attend(
    function: Function,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | None,
    columns: Columns,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    refuse_capped_choice(columns, kwargs.get("softcap"))
    rows = columns.number
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "Flex attention with prompts does not support relative position biases. Use attn_implementation='sdpa'."
        )
    joined = join_rows(columns, query, key, value, None, kwargs.get("scaling"))
    query, key, value = joined.query, joined.key, joined.value
    if mask is not None:
        fill = -rows % mask.BLOCK_SIZE[1]
        key, value = _fill_up(key, rows, fill), _fill_up(value, rows, fill)
        mask = _with_rows(mask, rows)
    kwargs = {**kwargs, "scaling": joined.scaling}
    output, weights = function(module, query.contiguous(), key.contiguous(), value.contiguous(), mask, **kwargs)
    return joined.finish(output), weights


def _fill_up(columns: Tensor, rows: int, fill: int) -> Tensor:
    """Columns with zeros after the rows, (B, H, rows + fill + S, d)."""
    return torch.cat([F.pad(columns[:, :, :rows], (0, 0, 0, fill)), columns[:, :, rows:]], dim=2)


def _with_rows(mask: BlockMask, rows: int) -> BlockMask:
    """The text's mask with blocks of open rows in front. Made once for all layers that share the mask."""
    made = mask.__dict__.setdefault(SHIFTED, {})
    if rows not in made:
        made[rows] = _shift(mask, rows)
    return made[rows]


def _shift(mask: BlockMask, rows: int) -> BlockMask:
    block, text = mask.BLOCK_SIZE[1], mask.mask_mod
    blocks = -(-rows // block)
    start = blocks * block

    def open_(sample: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        inside = text(sample, head, query, (column - start).clamp(min=0))
        return (column < rows) | ((column >= start) & inside)

    in_front = torch.arange(blocks, device=mask.kv_indices.device, dtype=mask.kv_indices.dtype)
    indices = torch.cat([in_front.expand(*mask.kv_indices.shape[:3], -1), mask.kv_indices + blocks], dim=-1)
    full, full_number = mask.full_kv_indices, mask.full_kv_num_blocks
    if full is not None:
        # As wide as the other list, because the kernel's index arithmetic assumes this.
        full = torch.cat([full + blocks, torch.zeros_like(full[..., :1]).expand(*full.shape[:3], blocks)], dim=-1)
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks + blocks,
        indices,
        full_number,
        full,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=open_,
        seq_lengths=(mask.seq_lengths[0], start + mask.seq_lengths[1]),
    )


FLEX = Kernel(real_tokens, _attend, reads_config=True, adds_mask=False)
