# SPDX-License-Identifier: Apache-2.0
"""Kernels that take 4-D masks: `sdpa`, and the `eager` attention of each model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...models.call_arguments import real_tokens
from ...models.sites import caps_scores
from ..columns import Columns, gates_of, join_rows
from .kernel import Function, Kernel, caps_unsaid, with_bias_of_rows


def _attend(
    function: Function,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    columns: Columns,
    kwargs: dict[str, Any],
    *,
    cuts_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    length, cap = query.shape[2], kwargs.get("softcap")
    is_causal = kwargs.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    bias, lead = kwargs.get("position_bias"), 0
    if mask is None and is_causal and length > 1 and cuts_keys:
        # The standard kernel would now cut the keys to the number of queries, prompts included.
        key, value = key[:, :, :length], value[:, :, :length]
        if columns.number <= length and bias is None and gates_of(columns.slots) is None:
            # A blank query per prompt column makes queries and keys equally many, so the kernel stays causal without a
            # mask. With a mask it would be slower, and transformers would repeat grouped keys and values.
            lead = columns.number
        else:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if bias is not None:
        kwargs = {**kwargs, "position_bias": with_bias_of_rows(columns, module, bias)}
    if columns.chosen and cap is None and caps_scores(module):
        raise ValueError(caps_unsaid(module))
    joined = join_rows(columns, query, key, value, mask, kwargs.get("scaling"), lead, cap)
    if joined.scaling is not None:
        kwargs = {**kwargs, "scaling": joined.scaling}
    output, weights = function(module, joined.query, joined.key, joined.value, joined.mask, **kwargs)
    # The prompt columns of the weights belong to no token, so they are removed.
    return joined.finish(output), None if weights is None else weights[..., columns.number :]


SDPA = Kernel(real_tokens, partial(_attend, cuts_keys=True))
EAGER = Kernel(real_tokens, partial(_attend, cuts_keys=False))
