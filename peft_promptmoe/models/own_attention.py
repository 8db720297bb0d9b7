# SPDX-License-Identifier: Apache-2.0
"""Attention layers with their own attention code: what the engine must know of each so that prompt rows can join.

Such a layer multiplies queries with keys, takes a softmax and multiplies with values in its own forward, or calls
`scaled_dot_product_attention` itself. The engine intercepts these steps and adds the prompt rows. An entry of this
table says what the intercepted steps do not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """One call of one attention layer, for which the position bias of its prompt rows is computed.

    Attributes:
        attention: the layer.
        bound: the call's arguments by name.
        query: (B, H, T, d) queries as the layer multiplies them with keys.
        key: (B or 1, H or 1, R, d) keys of the prompt rows.
        offsets: (R,) positions of the rows relative to the first real token.
        first: (B,) column of the first real token. None: column 0 for all samples.
        keys: number of text columns S, including those in the cache.
        owner: module with the model's table of relative positions, or None.
    """

    attention: Any
    bound: dict[str, Any]
    query: Tensor
    key: Tensor
    offsets: Tensor
    first: Tensor | None
    keys: int
    owner: Any = None

    def columns(self) -> Tensor:
        """Positions of the rows in columns of the text, (B or 1, R). Negative in front of the text."""
        return self.offsets[None] + (0 if self.first is None else self.first[:, None])

    def distance(self) -> Tensor:
        """Position of each query minus position of each row, (B or 1, T, R)."""
        queries = torch.arange(self.keys - self.query.shape[2], self.keys, device=self.offsets.device)
        return queries[None, :, None] - self.columns()[:, None, :]


def scale_by_width(attention: Any) -> float:
    """1 / sqrt(d), with d the head width."""
    return 1.0 / math.sqrt(head_width(attention))


def head_width(attention: Any) -> int:
    """Width d of one head, under any of its names."""
    names = ("attention_head_size", "head_size", "head_dim")
    return next(width for name in names if (width := getattr(attention, name, None)) is not None)


def not_scaled(attention: Any) -> float:
    """1, for layers that scale queries or keys before the multiplication, or not at all."""
    return 1.0


def is_causal(attention: Any) -> bool:
    """Whether queries attend to earlier positions only, read from the layer's attribute."""
    return bool(getattr(attention, "is_causal", False))


def always(attention: Any) -> bool:
    """True, for layers of a decoder."""
    return True


def never(attention: Any) -> bool:
    """False, for layers without rotary embeddings."""
    return False


def nothing(attention: Any) -> None:
    """None, for entries without a number or a reason."""
    return None


def first_of(lefts: list[Tensor]) -> Tensor:
    """The first left factor of the multiplications: the query."""
    return lefts[0]


def last_of(lefts: list[Tensor]) -> Tensor:
    """The last left factor, for layers that first multiply queries with positions."""
    return lefts[-1]


def if_decoder(attention: Any) -> bool:
    """Whether the config turns an encoder into a decoder (`is_decoder`)."""
    return bool(getattr(attention, "is_decoder", False))


def as_it_is(mask: Tensor) -> Tensor:
    """The mask itself: open where it is True or near zero, as in transformers."""
    return mask


@dataclass(frozen=True)
class Attribute:
    """Reads a number from an attribute of the attention layer. (torch.compile does not support `attrgetter`.)"""

    name: str

    def __call__(self, attention: Any) -> Any:
        return getattr(attention, self.name)


@dataclass(frozen=True)
class TwoProjections:
    """Computes keys and values with two linear layers of the attention layer, given by name."""

    key: str
    value: str

    def __call__(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        width = head_width(attention)
        names = (self.key, self.value)
        made = (getattr(attention, name)(x).unflatten(-1, (-1, width)).transpose(1, 2) for name in names)
        return next(made), next(made)


@dataclass(frozen=True)
class OwnAttention:
    """Entry for one class of attention layers. It is pickled with models, so all its functions are named functions.

    Attributes:
        project: computes keys (B, H, R, d) and values (B, H, R, dv) from normed rows (B, R, D).
        scale: factor that the layer applies to the product of query and key after the multiplication.
        bias: computes what is added to the scores of the rows, (B or 1, H, T or 1, R). None: nothing.
        causal: whether queries attend to earlier positions only.
        opens: converts the layer's mask to one that is True, or near zero, where attention is open.
        turns: whether the layer applies the rotary embedding it is given to its keys.
        turned: number of features of a head that the rotary embedding turns. None: all.
        table: attribute of the module with the model's table of relative positions. `bias` gets this module as owner.
        query: picks the queries, (B, H, T, d) or (B * H, T, d), from the left factors of all multiplications before
            the softmax, in their order.
        why_not: returns the reason if an option of the model rules prompts out, else None.
    """

    project: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    scale: Callable[[Any], float] = scale_by_width
    bias: Callable[[Asked], Tensor] | None = None
    causal: Callable[[Any], bool] = is_causal
    opens: Callable[[Tensor], Tensor] = as_it_is
    turns: Callable[[Any], bool] = never
    turned: Callable[[Any], int | None] = nothing
    table: str = "relative_attention_bias"
    query: Callable[[list[Tensor]], Tensor] = first_of
    why_not: Callable[[Any], str | None] = nothing
