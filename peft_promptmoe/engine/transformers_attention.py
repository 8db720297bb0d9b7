# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows inside one frozen attention layer of transformers.

A deep prompt is replaced at the next layer, so the text sees only its keys and values in this layer's attention. They
are computed in `projection`. Here they reach the layer's call of the public `AttentionInterface`, and one of `kernels`
puts them in front of the text's keys and values. Everything that a call needs is passed as keyword arguments. No
module is changed per call, so threads and `torch.compile` are safe.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from ..models.inspection import compares, unwrapped_forward
from ..models.sites import Site
from .columns import Harvest, MaskWithRows, Overheard
from .kernels import find_kernel, known_kernel
from .kernels.kernel import PlainModule

INTERFACE = "promptmoe"
COLUMNS = "promptmoe_columns"


class KernelName(str):
    """Name of this package's attention function that compares equal to the name of the real kernel.

    DeepSeek's sparse attention builds its mask only for kernel names that it knows.
    """

    real: str | None = None

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.real == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class ConfigView:
    """View of a layer's config with another attention implementation. Everything else is the real config.

    Args:
        real: the config.
        compared: whether the layer compares the name of its kernel. (Compiled code does not support `KernelName`.)
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
        if name == "real" or name.startswith("__"):  # does not exist yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __reduce__(self) -> tuple[type[ConfigView], tuple[Any, bool]]:
        return ConfigView, (self.real, self.compared)


def config_view(site: Site) -> ConfigView:
    """The view of an attention layer's config with which its prompt rows reach the kernel."""
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
    """Attention of a prompted layer: the model's own kernel on the prompt rows and the text.

    Without rows (adapter disabled, another method's layer) the call is passed on unchanged.
    """
    columns = kwargs.pop(COLUMNS, None)
    if isinstance(attention_mask, MaskWithRows):
        columns, attention_mask = attention_mask.columns, attention_mask.mask
    view: Any = module.config
    name = view.real._attn_implementation
    function = _function(module, name)
    if isinstance(columns, Harvest):
        return columns.catch(query, key, value).transpose(1, 2).contiguous(), None
    if isinstance(columns, Overheard):
        columns.note(key, value)
        columns = None
    if columns is None:
        known = known_kernel(name)
        # Kernels that do not read the config compile better without a replacement module.
        seen = module if known is not None and not known.reads_config else PlainModule(module)
        return function(seen, query, key, value, attention_mask, **kwargs)
    kernel = find_kernel(name)
    seen = PlainModule(module) if kernel.reads_config else module
    output, weights = kernel.attend(function, seen, query, key, value, attention_mask, columns.arrive(), kwargs)
    return output.contiguous(), weights  # contiguous as from other kernels, because some layers call view()


AttentionInterface.register(INTERFACE, promptmoe_attention)


def _function(module: nn.Module, name: str | None) -> Any:
    eager = unwrapped_forward(module).__globals__["eager_attention_forward"]
    return eager if name in (None, "eager") else AttentionInterface().get_interface(name, eager)
