# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows inside one frozen attention layer of transformers.

A deep prompt is overwritten at the next layer, so all that the real tokens see of it are its key and value rows in
this layer's attention. This module makes those rows with the layer's own norm and projections, places them (rotary
embedding, T5 bias), and appends them at the public `AttentionInterface`. What one call needs travels in that call's
keyword arguments; no module is changed per call, which is what makes threads and `torch.compile` safe.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..models.inspection import unwrapped_forward
from ..models.sites import caps_scores
from .columns import Columns, Harvest, MaskWithRows, join_rows

INTERFACE = "promptmoe"
COLUMNS = "promptmoe_columns"
KERNELS = ("sdpa", "eager")


class ConfigView:
    """A layer's config with the attention interface replaced; everything else reads and writes the real one."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)

    @property
    def _attn_implementation(self) -> str:
        return INTERFACE

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):  # not there yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __reduce__(self) -> tuple[type[ConfigView], tuple[Any]]:
        return ConfigView, (self.real,)


def promptmoe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskWithRows | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a prompted layer: the model's own kernel, over the prompt rows and the text.

    Without rows (adapter disabled, another method's layer) the call passes through untouched.
    """
    columns = kwargs.pop(COLUMNS, None)
    if isinstance(attention_mask, MaskWithRows):
        columns, attention_mask = attention_mask.columns, attention_mask.mask
    view: Any = module.config
    kernel_name = view.real._attn_implementation
    kernel = _kernel(module, kernel_name)
    if columns is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if isinstance(columns, Harvest):
        columns.key, columns.value = key, value
        # Of the shape that the output projection takes; heads may be narrower in values than in keys.
        return query.transpose(1, 2)[..., :1].expand(-1, -1, -1, value.shape[-1]), None
    check_kernel(kernel_name)
    columns.arrived += 1
    return _attend(kernel, kernel_name, module, query, key, value, attention_mask, columns, kwargs)


AttentionInterface.register(INTERFACE, promptmoe_attention)


def check_kernel(name: str | None) -> None:
    """Refuse attention kernels whose mask conventions the engine has not been tested with."""
    if name not in KERNELS:
        raise ValueError(
            f"Prompts join attention under {' and '.join(KERNELS)} only, and this model uses {name!r}. Load it with "
            "attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')."
        )


def _kernel(module: nn.Module, name: str | None) -> Any:
    eager = unwrapped_forward(module).__globals__["eager_attention_forward"]
    return eager if name in (None, "eager") else AttentionInterface().get_interface(name, eager)


def _attend(
    kernel: Any,
    kernel_name: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    columns: Columns,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    length, cap = query.shape[2], kwargs.get("softcap")
    is_causal = kwargs.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    lead = 0
    if mask is None and is_causal and length > 1 and kernel_name == "sdpa":
        # The stock kernel would now cut the keys to as many as there are queries, prompts included.
        key, value = key[:, :, :length], value[:, :, :length]
        if columns.number <= length and kwargs.get("position_bias") is None:
            # A blank query for every prompt column makes them as many again, so the kernel stays causal without a
            # mask: with one it would leave its fast path, and transformers repeat grouped keys and values.
            lead = columns.number
        else:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": _with_prompt_bias(kwargs["position_bias"], columns, module)}
    if columns.chosen and cap is None and caps_scores(module):
        raise ValueError(
            f"{type(module).__name__} caps its attention scores and does not say so to its kernel, so chosen experts "
            "cannot join them. Use routing='sample' with this model."
        )
    joined = join_rows(columns, query, key, value, mask, kwargs.get("scaling"), lead, cap)
    if joined.scaling is not None:
        kwargs = {**kwargs, "scaling": joined.scaling}
    output, weights = kernel(module, joined.query, joined.key, joined.value, joined.mask, **kwargs)
    # The prompt columns of the weights have no token to belong to.
    return joined.finish(output), None if weights is None else weights[..., columns.number :]


def _with_prompt_bias(bias: Tensor, columns: Columns, module: nn.Module) -> Tensor:
    """(B or 1, Hq, T, columns + S) relative position bias; that of chosen slots is in their score."""
    if columns.bias is None:
        raise ValueError(
            f"{type(module).__name__} adds a relative position bias whose table peft_promptmoe cannot find, so "
            "the prompt rows have no bias. This architecture is not supported."
        )
    of_rows = F.pad(columns.bias.to(bias.dtype), (len(columns.chosen), 0))
    common = max(bias.shape[0], of_rows.shape[0])
    return torch.cat([of_rows.expand(common, -1, -1, -1), bias.expand(common, -1, -1, -1)], dim=-1)
