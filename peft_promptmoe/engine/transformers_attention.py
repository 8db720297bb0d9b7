# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows inside one frozen attention layer of transformers.

A deep prompt is overwritten at the next layer, so the text sees only its keys and values in this layer's attention.
They are made in `projection`; here they meet the layer's call of the public `AttentionInterface`, and one of `kernels`
puts them in front of the text's. What a call needs travels in its keyword arguments; no module is changed per call,
which is what makes threads and `torch.compile` safe.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from ..models.inspection import unwrapped_forward
from .columns import Harvest, MaskWithRows
from .kernels import find_kernel
from .kernels.kernel import PlainModule

INTERFACE = "promptmoe"
COLUMNS = "promptmoe_columns"
DENSE = (None, "sdpa", "eager")  # kernels that never look at the config, and compile best without a stand-in


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
    name = view.real._attn_implementation
    function = _function(module, name)
    if isinstance(columns, Harvest):
        columns.key, columns.value = key, value
        # Of the shape that the output projection takes; heads may be narrower in values than in keys.
        return query.transpose(1, 2)[..., :1].expand(-1, -1, -1, value.shape[-1]), None
    if columns is None:
        seen = module if name in DENSE else PlainModule(module)
        return function(seen, query, key, value, attention_mask, **kwargs)
    kernel = find_kernel(name)
    columns.arrived += 1
    seen = PlainModule(module) if kernel.reads_config else module
    return kernel.attend(function, seen, query, key, value, attention_mask, columns, kwargs)


AttentionInterface.register(INTERFACE, promptmoe_attention)


def _function(module: nn.Module, name: str | None) -> Any:
    eager = unwrapped_forward(module).__globals__["eager_attention_forward"]
    return eager if name in (None, "eager") else AttentionInterface().get_interface(name, eager)
