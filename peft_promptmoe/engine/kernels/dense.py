# SPDX-License-Identifier: Apache-2.0
"""Kernels that take 4-D masks: `sdpa`, and the `eager` attention of each model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.call_arguments import real_tokens
from ..columns import Columns, join_rows
from .kernel import Function, Kernel, refuse_capped_gates, with_bias_of_rows


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
    refuse_capped_gates(columns, kwargs)
    length, width, rows = query.shape[2], value.shape[3], columns.key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    bias, blank = kwargs.get("position_bias"), 0
    if mask is None and is_causal and length > 1 and cuts_keys:
        # The stock kernel would now cut the keys to as many as there are queries, prompts included.
        key, value = key[:, :, :length], value[:, :, :length]
        if rows <= length and bias is None:
            # A blank query for every prompt row makes them as many again, so the kernel stays causal without a mask:
            # with one it would leave its fast path, and transformers repeat grouped keys and values.
            blank = rows
        else:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if bias is not None:
        kwargs = {**kwargs, "position_bias": with_bias_of_rows(columns, module, bias)}
    scaling = kwargs.get("scaling")
    query, key, value, mask, scaling = join_rows(columns, query, key, value, mask, scaling, maskless=blank > 0)
    query = F.pad(query, (0, 0, blank, 0)) if blank else query
    if scaling is not None:
        kwargs = {**kwargs, "scaling": scaling}
    output, weights = function(module, query, key, value, mask, **kwargs)
    # What was padded to the width comes back as zeros; the prompt columns of the weights have no token to belong to.
    return output[:, blank:, :, :width], None if weights is None else weights[..., rows:]


SDPA = Kernel(real_tokens, partial(_attend, cuts_keys=True))
EAGER = Kernel(real_tokens, partial(_attend, cuts_keys=False))
