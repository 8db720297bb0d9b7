# SPDX-License-Identifier: Apache-2.0
"""Flash attention as its documentation defines it, written in loops for float64 on a CPU.

It stands behind transformers' own `flash_attention_forward`, so that what transformers makes of a call (unpadding,
packed rows, windows that a text does not fill) is part of what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor

WIDEST, MULTIPLE = 256, 8
Calls = list[tuple[str, dict[str, Any]]]
calls: Calls = []  # of the functions below, with what they were told


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sample: query (T, Hq, d), key and value (S, H, d) to (T, Hq, d)."""
    tokens, heads, width = query.shape
    columns, groups = key.shape[0], heads // key.shape[1]
    if width > WIDEST or not key.shape[-1] == value.shape[-1] == width:
        raise RuntimeError(f"FlashAttention forward only supports head dimension at most {WIDEST}, got {width}")
    output = torch.zeros_like(query)
    for head in range(heads):
        for token in range(tokens):
            last = token + columns - tokens  # aligned at the end
            first = last - window[0] if window[0] >= 0 else 0
            end = last if causal else (last + window[1] if window[1] >= 0 else columns - 1)
            seen = range(max(first, 0), min(end, columns - 1) + 1)
            if not seen:
                continue
            kept = list(seen)
            scores = (key[kept, head // groups] * query[token, head]).sum(-1)
            scores = scores * (scale if scale is not None else width**-0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].to(scores.dtype)])
            weights = scores.softmax(-1)[: len(kept)]
            output[token, head] = weights @ value[kept, head // groups]
    return output


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    calls.append(("fixed", {"causal": causal, "window_size": window_size, "softcap": softcap, "s_aux": s_aux}))
    assert dropout_p == 0.0
    rest = (softmax_scale, causal, window_size, softcap, s_aux)
    return torch.stack([_one(*parts, *rest) for parts in zip(q, k, v, strict=True)])


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
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    calls.append(("varlen", {"causal": causal, "window_size": window_size, "softcap": softcap, "s_aux": s_aux}))
    assert dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == q.shape[0] and int(cu_seqlens_k[-1]) == k.shape[0] == v.shape[0]
    assert int(cu_seqlens_q.diff().max()) <= int(max_seqlen_q) and int(cu_seqlens_k.diff().max()) <= int(max_seqlen_k)
    rest = (softmax_scale, causal, window_size, softcap, s_aux)
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    (begin_q, begin_k), parts = next(bounds), []
    for end_q, end_k in bounds:
        parts.append(_one(q[begin_q:end_q], k[begin_k:end_k], v[begin_k:end_k], *rest))
        begin_q, begin_k = end_q, end_k
    return torch.cat(parts)


@contextmanager
def flash_installed(fixed: Any = flash_attn_func, varlen: Any = flash_attn_varlen_func) -> Iterator[Calls]:
    """While this is open, transformers finds these functions where it looks for flash attention."""

    def found(*_: Any, **__: Any) -> tuple[Any, ...]:
        return fixed, varlen, None, flash_utils._pad_input, flash_utils._unpad_input

    state = ("_lazy_imports", "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn")
    state += ("_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")
    before = {name: getattr(flash_utils, name) for name in state}
    flash_utils._lazy_imports, flash_utils._loaded_implementation = found, None
    calls.clear()
    try:
        yield calls
    finally:
        for name, value in before.items():
            setattr(flash_utils, name, value)


def use(model: Any, implementation: str) -> None:
    """Set the attention implementation of a model and its parts, without transformers' check that it is installed."""
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        config._attn_implementation = implementation
