# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows inside one frozen attention layer of timm.

timm's layers call `torch.nn.functional.scaled_dot_product_attention` themselves. While a layer's own forward runs, a
`TorchFunctionMode` adds the prompt rows to that call. The mode affects the calling thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models.inspection import parameter_names
from ..models.sites import Site
from .columns import Columns, Harvest, Overheard, join_rows
from .own_attention import OwnSteps
from .transformers_attention import COLUMNS


class _RowsMode(TorchFunctionMode):
    """Adds prompt rows to calls of `scaled_dot_product_attention`, or records keys and values there."""

    def __init__(self, columns: Columns | Overheard) -> None:
        super().__init__()
        self.columns = columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        columns = self.columns
        if isinstance(columns, Harvest):
            return _catch(columns, *args, **kwargs)
        if isinstance(columns, Overheard):
            columns.note(*args[1:3])
            return func(*args, **kwargs)
        return _attend(columns.arrive(), *args, **kwargs)


def _catch(harvest: Harvest, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return harvest.catch(query, key, value)


def _attend(
    columns: Columns,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    if is_causal:
        raise ValueError(
            "Prompts join timm's bidirectional attention only, but this layer was called with is_causal=True."
        )
    if not columns.chosen and query.requires_grad:
        # Keys and values are copied together with the rows. A query that stays a view would keep all three parts of
        # the fused projection in memory for the backward pass.
        query = query.clone()
    joined = join_rows(columns, query, key, value, attn_mask, scale)
    output = F.scaled_dot_product_attention(
        joined.query, joined.key, joined.value, joined.mask, dropout_p, scale=joined.scaling
    )
    return joined.finish(output.transpose(1, 2)).transpose(1, 2)


class JoinedForward:
    """Replaces an attention layer's forward by one that takes prompt rows. Without rows it calls the original.

    Args:
        forward: the layer's forward as found.
        replaced: whether it was an attribute of the layer itself (of a wrapper) instead of its class.
        site: the layer, if it computes attention step by step. None for timm layers, which call a kernel.
    """

    def __init__(self, forward: Callable[..., Any], replaced: bool, site: Site | None = None) -> None:
        self.forward = forward
        self.replaced = replaced
        self.site = site
        self._names = parameter_names(site.attention) if site is not None else ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        columns = kwargs.pop(COLUMNS, None)
        if columns is None:
            return self.forward(*args, **kwargs)
        with self._mode(columns, dict(zip(self._names, args, strict=False)) | kwargs):
            return self.forward(*args, **kwargs)

    def _mode(self, columns: Columns | Overheard, bound: dict[str, Any]) -> TorchFunctionMode:
        if self.site is None or self.site.own is None or isinstance(columns, Overheard):
            return _RowsMode(columns)
        return OwnSteps(columns, self.site, bound)


def open_forward(site: Site) -> None:
    """Let the layer's forward take prompt rows."""
    attention = site.attention
    own = site if site.own is not None else None
    attention.forward = JoinedForward(attention.forward, "forward" in vars(attention), own)


def close_forward(attention: nn.Module) -> None:
    """Restore the layer's own forward. If other code has wrapped it since, the replacement stays but does nothing."""
    joined = vars(attention).get("forward")
    if not isinstance(joined, JoinedForward):
        return
    del attention.forward
    if joined.replaced:
        attention.forward = joined.forward


def check_fused(attention: Any, path: str) -> None:
    """Raise ValueError for layers that do not call `scaled_dot_product_attention`."""
    if not getattr(attention, "fused_attn", True):
        raise ValueError(
            f"{path!r} computes attention without scaled_dot_product_attention, which prompts need. Call "
            "timm.layers.set_fused_attn(True) before you create the model."
        )
