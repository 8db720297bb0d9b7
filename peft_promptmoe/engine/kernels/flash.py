# SPDX-License-Identifier: Apache-2.0
"""Flash attention, installed or from the Hub: 2-D padding masks and packed rows.

Rows in front of the keys act like a cache: the causal mask is aligned at the last query and the last key, so every
query sees them. The padding mask is extended by ones. In packed rows, prompt rows are put in front of every segment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..columns import Columns, join_rows
from .kernel import Function, Kernel, check_width, refuse_capped_choice

WIDEST = 256
SEGMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Which tokens are text, (B, T), from a padding mask (B, S) that ends with them. None if nothing is padded."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"Flash attention takes padding masks of shape (batch, tokens), but this call has one of shape "
            f"{tuple(mask.shape)}. Use attn_implementation='sdpa' with masks of other shapes."
        )
    return mask[:, -length:].bool()


def _attend(
    function: Function,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    columns: Columns,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    refuse_capped_choice(columns, kwargs.get("softcap"))
    _refuse(key, kwargs)
    rows = columns.number
    joined = join_rows(columns, query, key, value, None, kwargs.get("scaling"))
    check_width(joined.query.shape[-1], query.shape[-1], WIDEST)
    key, value = joined.key, joined.value
    # The text fits into the window (`_refuse`). With rows in front it may not, and rows would drop out.
    kwargs = {**kwargs, "scaling": joined.scaling, "sliding_window": None}
    if mask is not None:
        mask = F.pad(mask, (rows, 0), value=1)
    else:
        segments = _segments(query.shape[0], kwargs)
        kwargs["position_ids"] = None  # it is already known whether rows are packed
        if segments is not None:
            index, kwargs = _rows_in_segments(rows, key.shape[2] - rows, segments, kwargs)
            key, value = key.index_select(2, index), value.index_select(2, index)
    output, weights = function(module, joined.query, key, value, mask, **kwargs)
    return joined.finish(output), weights


def _refuse(key: Tensor, kwargs: dict[str, Any]) -> None:
    if kwargs.get("block_table") is not None or kwargs.get("k_cache") is not None:
        raise ValueError(
            "Prompts do not join the paged cache of continuous batching. Use generate() without it, or load the model "
            "with attn_implementation='sdpa'."
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError("Flash attention has no relative position bias. Use attn_implementation='sdpa'.")
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise ValueError(
            f"{key.shape[2]} tokens are more than the sliding window of {window}, and with flash attention the "
            "prompts would drop out of the window. Use attn_implementation='sdpa' or 'flex_attention' for texts "
            "longer than the window."
        )


def _segments(batch: int, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Ends of the samples in a packed row, found like in transformers' flash attention. None for one sample."""
    given = {name: kwargs.get(name) for name in SEGMENTS}
    if all(value is not None for value in given.values()):
        return given
    positions = kwargs.get("position_ids")
    if positions is None or batch != 1 or positions.shape[-1] == 1:
        return None
    positions = positions.reshape(-1)
    starts = positions == positions.min()
    if not bool((positions[1:] != positions[:-1] + 1).any()):
        return None
    ends = torch.tensor([len(positions)], dtype=torch.int32, device=positions.device)
    bounds = torch.cat([starts.nonzero().view(-1).to(torch.int32), ends])
    longest = bounds.diff().max()
    return dict(zip(SEGMENTS, (bounds, bounds, longest, longest), strict=True))


def _rows_in_segments(
    rows: int, tokens: int, segments: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Order of `rows` and `tokens` columns with the rows in front of every segment, and the segments' bounds."""
    bounds = segments["cu_seq_lens_k"]
    number = bounds.shape[0] - 1
    column, row = torch.arange(tokens, device=bounds.device), torch.arange(rows, device=bounds.device)
    segment = torch.searchsorted(bounds[1:].contiguous(), column.to(bounds.dtype), right=True)
    before = torch.arange(number, device=bounds.device) * rows + bounds[:-1]
    index = torch.empty(tokens + number * rows, dtype=torch.long, device=bounds.device)
    index[column + rows * (segment + 1)] = column + rows
    index[(before[:, None] + row).flatten()] = row.repeat(number)
    grown = bounds + rows * torch.arange(number + 1, device=bounds.device, dtype=bounds.dtype)
    longest = segments["max_length_k"] + rows
    return index, {**kwargs, **segments, "cu_seq_lens_k": grown, "max_length_k": longest}


FLASH = Kernel(real_tokens, _attend, reads_config=True, widest=WIDEST, adds_mask=False)
