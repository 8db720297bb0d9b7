# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2 as torch brings it along, under the names and arguments of the flash-attn package.

Where neither flash-attn nor a model hub is at hand these are the same kernels: causality counted from the end,
windows, packed rows, groups of heads; no caps and no sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    left, right = _window(window_size, causal)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        q.shape[1],
        k.shape[1],
        dropout_p,
        causal,
        False,
        scale=softmax_scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return output


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    left, right = _window(window_size, causal)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_k),
        dropout_p,
        causal,
        False,
        scale=softmax_scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return output


def _window(window: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    left, right = (None if side < 0 else side for side in window)
    return left, (0 if causal and left is not None else right)
