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

from ..models.inspection import compares, unwrapped_forward
from ..models.sites import Site
from .columns import Columns, Harvest, MaskWithRows, Overheard, join_rows

INTERFACE = "promptmoe"
COLUMNS = "promptmoe_columns"
KERNELS = ("sdpa", "eager")


class KernelName(str):
    """The interface's name for who looks a kernel up, and equal to the real kernel's for who compares names.

    DeepSeek's sparse attention builds its mask under the kernels that it knows by name.
    """

    real: str | None = None

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.real == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class ConfigView:
    """A layer's config with the attention interface replaced; everything else reads and writes the real one.

    Args:
        real: the config.
        compared: whether the layer compares the name of its kernel, which compiled code cannot follow.
    """

    def __init__(self, real: Any, compared: bool = False) -> None:
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "compared", compared)

    @property
    def _attn_implementation(self) -> str:
        if not self.compared:
            return INTERFACE
        name = KernelName(INTERFACE)
        name.real = self.real._attn_implementation
        return name

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):  # not there yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __reduce__(self) -> tuple[type[ConfigView], tuple[Any, bool]]:
        return ConfigView, (self.real, self.compared)


def config_view(site: Site) -> ConfigView:
    """The view of an attention layer's config that opens its way to the kernel for prompt rows."""
    compared = site.family is None and compares(unwrapped_forward(site.attention), "_attn_implementation")
    return ConfigView(site.attention.config, compared)


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
        return columns.catch(query, key, value).transpose(1, 2).contiguous(), None
    if isinstance(columns, Overheard):
        columns.note(key, value)
        return kernel(module, query, key, value, attention_mask, **kwargs)
    check_kernel(kernel_name)
    return _attend(kernel, kernel_name, module, query, key, value, attention_mask, columns.arrive(), kwargs)


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
    length, width, rows = query.shape[2], value.shape[3], columns.key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    blank = 0
    if mask is None and is_causal and length > 1 and kernel_name == "sdpa":
        # The stock kernel would now cut the keys to as many as there are queries, prompts included.
        key, value = key[:, :, :length], value[:, :, :length]
        if rows <= length and kwargs.get("position_bias") is None:
            # A blank query for every prompt row makes them as many again, so the kernel stays causal without a mask:
            # with one it would leave its fast path, and transformers repeat grouped keys and values.
            blank = rows
        else:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    bias = kwargs.get("position_bias")
    if bias is not None:
        if columns.bias is None:
            raise ValueError(
                f"{type(module).__name__} adds a relative position bias whose table peft_promptmoe cannot find, so "
                "the prompt rows have no bias. This architecture is not supported."
            )
        prompt_bias = columns.bias.to(bias.dtype)
        common = max(bias.shape[0], prompt_bias.shape[0])
        bias = torch.cat(
            [prompt_bias.expand(common, *prompt_bias.shape[1:]), bias.expand(common, *bias.shape[1:])], -1
        )
        kwargs = {**kwargs, "position_bias": bias}
    if columns.log_gates is not None and kwargs.get("softcap") is not None:
        raise ValueError(
            "Token routing adds its gates to the attention scores, and this layer caps them afterwards. Use "
            "routing='sample' with this model."
        )
    scaling = kwargs.get("scaling")
    query, key, value, mask, scaling = join_rows(columns, query, key, value, mask, scaling, maskless=blank > 0)
    query = F.pad(query, (0, 0, blank, 0)) if blank else query
    if scaling is not None:
        kwargs = {**kwargs, "scaling": scaling}
    output, weights = kernel(module, query, key, value, mask, **kwargs)
    # What was padded to the width comes back as zeros; the prompt columns of the weights have no token to belong to.
    return output[:, blank:, :, :width].contiguous(), None if weights is None else weights[..., rows:]
