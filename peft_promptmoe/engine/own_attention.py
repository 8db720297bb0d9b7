# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows in attention layers with their own attention code.

While such a layer's own forward runs, a `TorchFunctionMode` intercepts its steps: the product of queries and keys, the
softmax, the product with values. At the softmax the rows' scores are put in front of the text's. The layer gets back
the text's part, and the rows' part of the output is added to its last product. The layer's masks, biases and dropout
are not changed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models.own_attention import Asked
from ..models.sites import Site
from .columns import Columns, gates_of, join_rows

PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__, torch.einsum)
ADDED_PRODUCTS = (torch.baddbmm, torch.Tensor.baddbmm)
HEADS = inspect.signature(F.multi_head_attention_forward)
SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax)


def _factors(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The two factors of a product."""
    if func not in ADDED_PRODUCTS:
        left, right = args[-2:]  # in einsum they come after the equation
        return left, right
    return (kwargs["batch1"], kwargs["batch2"]) if "batch1" in kwargs else (args[1], args[2])


class OwnSteps(TorchFunctionMode):
    """Adds prompt rows to the steps of one attention layer.

    Args:
        columns: the rows.
        site: the layer.
        bound: the call's arguments by name.
    """

    def __init__(self, columns: Columns, site: Site, bound: dict[str, Any]) -> None:
        super().__init__()
        assert site.own is not None
        self.columns, self.site, self.own, self.bound = columns, site, site.own, bound
        self.batch = next(iter(bound.values())).shape[0]
        self.lefts: list[Tensor] = []  # left factors of the products so far, the query first
        self.weights: Tensor | None = None  # (B, H, T, R) of the rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_with_projections(HEADS.bind(*args, **kwargs).arguments)
        if self.weights is None and func in PRODUCTS + ADDED_PRODUCTS:
            left, right = _factors(func, args, kwargs)
            if left.ndim >= 3 and right.ndim >= 3:  # not a matrix: Falcon's linear layers multiply with one
                self.lefts.append(left)
        elif self.lefts and self.weights is None and func in SOFTMAXES:
            return self._softmax(func, *args, **kwargs)
        elif self.weights is not None and func is F.dropout:
            self.weights = func(self.weights, *args[1:], **kwargs)
        elif self.weights is not None and func in PRODUCTS:
            text = func(*args, **kwargs)
            value = self._of_slots([slots.value for slots in self.columns.slots])
            rows = self.weights.to(text.dtype) @ value.to(text.dtype)
            self.lefts, self.weights = [], None
            self.columns.arrived += 1
            return text + rows.reshape(text.shape)
        return func(*args, **kwargs)

    def _attend_with_projections(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """torch's function for a whole attention layer, on rows and text: (T, B, D) and weights (B, T, S)."""
        number, dropout = given["num_heads"], given["dropout_p"] if given["training"] else 0.0
        biases = given["in_proj_bias"].chunk(3)
        query, key, value = (
            F.linear(given[name], given[f"{name[0]}_proj_weight"], bias)
            .unflatten(-1, (number, -1))
            .permute(1, 2, 0, 3)
            for name, bias in zip(("query", "key", "value"), biases, strict=True)
        )
        scores = query @ key.transpose(-1, -2) * self.own.scale(self.site.attention)
        if (mask := given.get("attn_mask")) is not None:
            scores = scores + self._by_head(mask)
        if (padded := given.get("key_padding_mask")) is not None:
            scores = scores.masked_fill(padded[:, None, None], torch.finfo(scores.dtype).min)
        self.lefts = [query]
        text = F.dropout(self._softmax(F.softmax, scores, dim=-1), dropout)
        assert self.weights is not None
        rows = F.dropout(self.weights, dropout) @ self._of_slots([slots.value for slots in self.columns.slots])
        self.lefts, self.weights = [], None
        self.columns.arrived += 1
        output = (text @ value + rows.to(value.dtype)).permute(2, 0, 1, 3).flatten(-2)
        return F.linear(output, given["out_proj_weight"], given["out_proj_bias"]), text.mean(1)

    def _by_head(self, tensor: Tensor) -> Tensor:
        """The tensor as (B, H, T, d). It may have batch and heads in one dimension."""
        return tensor if tensor.ndim == 4 else tensor.unflatten(0, (self.batch, -1))

    def _softmax(self, func: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention weights of the text (…, T, S). Those of the rows are stored."""
        query = self._by_head(self.own.query(self.lefts))
        key = self._of_slots([slots.key for slots in self.columns.slots]).to(query.dtype)
        rows = query @ key.transpose(-1, -2) * self.own.scale(self.site.attention)
        bias = self._bias(query, scores.shape[-1])
        rows = rows if bias is None else rows + bias.to(rows.dtype)
        gates = gates_of(self.columns.slots)
        if gates is not None:
            rows = rows + F.pad(gates[:, None].to(rows.dtype), (0, rows.shape[-1] - gates.shape[-1]))
        count = rows.shape[-1]
        joint = torch.cat([rows.to(scores.dtype).reshape(*scores.shape[:-1], count), scores], dim=-1)
        weights = func(joint, *args, **kwargs)
        self.weights = self._by_head(weights[..., :count])
        return weights[..., count:].contiguous()

    def _of_slots(self, parts: list[Tensor]) -> Tensor:
        """All rows side by side, (B or 1, H, R, w)."""
        batch = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(batch, -1, -1, -1) for part in parts], dim=2)

    def _bias(self, query: Tensor, keys: int) -> Tensor | None:
        """Position bias that the layer would add to the rows' scores, (B or 1, H or 1, T or 1, R or 1)."""
        if self.own.bias is None or self.columns.offsets is None:
            return None
        columns, site = self.columns, self.site
        assert columns.offsets is not None
        place = (columns.offsets, columns.first, keys, site.bias_owner)
        key = self._of_slots([slots.key for slots in columns.slots])
        asked = Asked(site.attention, self.bound, query, key, *place)
        return self.own.bias(asked)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """The fused kernel on rows and text."""
        if is_causal:  # with as many queries as keys
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attn_mask = seen.tril()[None, None]
        bias, keys, rows = self._bias(query, key.shape[2]), key.shape[2], self.columns.rows
        joined = join_rows(self.columns, query, key, value, attn_mask, scale)
        mask = joined.mask
        if bias is not None:
            bias = F.pad(bias.to(query.dtype).expand(-1, -1, -1, rows), (0, keys))
            closed = torch.finfo(query.dtype).min
            mask = bias if mask is None else bias.where(mask, closed) if mask.dtype == torch.bool else bias + mask
        self.columns.arrived += 1
        output = F.scaled_dot_product_attention(
            joined.query, joined.key, joined.value, mask, dropout_p, scale=joined.scaling
        )
        return joined.finish(output.transpose(1, 2)).transpose(1, 2)
