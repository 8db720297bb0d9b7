# SPDX-License-Identifier: Apache-2.0
"""Attention layers with their own attention code: what the engine must know of each so that rows can join.

Such a layer multiplies queries with keys, takes a softmax and multiplies with values in its own forward, or calls
`scaled_dot_product_attention` itself. The engine adds the rows' part to these steps where they happen; an entry says
what cannot be seen there.
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
    """One call of one attention layer, of which the bias of its prompt rows is asked.

    Attributes:
        attention: the layer.
        bound: the call's arguments by name.
        query: (B, H, T, d) as the layer multiplies it with keys.
        key: (B or 1, H or 1, R, d) of the rows.
        offsets: (R,) positions of the rows relative to the first real token.
        first: (B,) column of the first real token; None for column 0 of all.
        keys: columns of the text S, those before this call's tokens among them.
        owner: the module that holds the model's table of relative positions; None if it has none.
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
        """(B or 1, R) where the rows stand, in columns of the text; those in front of it have negative numbers."""
        return self.offsets[None] + (0 if self.first is None else self.first[:, None])

    def distance(self) -> Tensor:
        """(B or 1, T, R) position of each query minus that of each row."""
        queries = torch.arange(self.keys - self.query.shape[2], self.keys, device=self.offsets.device)
        return queries[None, :, None] - self.columns()[:, None, :]


def scale_by_width(attention: Any) -> float:
    """1 / sqrt(d) of the head width."""
    return 1.0 / math.sqrt(head_width(attention))


def head_width(attention: Any) -> int:
    """Width d of one head, under any of its names."""
    names = ("attention_head_size", "head_size", "head_dim")
    return next(width for name in names if (width := getattr(attention, name, None)) is not None)


def not_scaled(attention: Any) -> float:
    """1: queries or keys are scaled before they are multiplied, or not at all."""
    return 1.0


def is_causal(attention: Any) -> bool:
    """Whether a query sees earlier positions only, as the layer says it."""
    return bool(getattr(attention, "is_causal", False))


def always(attention: Any) -> bool:
    """As all layers of a decoder's stack."""
    return True


def never(attention: Any) -> bool:
    """As layers that know no rotary tables."""
    return False


def nothing(attention: Any) -> None:
    """No number, or no reason."""
    return None


def first_of(lefts: list[Tensor]) -> Tensor:
    """The first left factor: the query."""
    return lefts[0]


def last_of(lefts: list[Tensor]) -> Tensor:
    """The last left factor, in layers that multiply queries with positions before."""
    return lefts[-1]


def if_decoder(attention: Any) -> bool:
    """Whether the config makes a decoder of what is an encoder otherwise."""
    return bool(getattr(attention, "is_decoder", False))


def as_it_is(mask: Tensor) -> Tensor:
    """The mask, which is open where it is True or near zero, as transformers' masks are."""
    return mask


@dataclass(frozen=True)
class Attribute:
    """A number that the attention layer holds under a name. (Torch's compiler cannot look into an `attrgetter`.)"""

    name: str

    def __call__(self, attention: Any) -> Any:
        return getattr(attention, self.name)


@dataclass(frozen=True)
class TwoProjections:
    """Keys and values of two linear layers of the attention layer, by their names."""

    key: str
    value: str

    def __call__(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        width = head_width(attention)
        names = (self.key, self.value)
        made = (getattr(attention, name)(x).unflatten(-1, (-1, width)).transpose(1, 2) for name in names)
        return next(made), next(made)


@dataclass(frozen=True)
class OwnAttention:
    """What is to be known of one class of attention layers. Models are pickled with it, so functions have names.

    Attributes:
        project: gives keys (B, H, R, d) and values (B, H, R, dv) of normed rows (B, R, D).
        scale: factor of a product of query and key that the layer applies behind the multiplication.
        bias: gives what is added to the scores of the rows, (B or 1, H, T or 1, R); None if nothing is.
        causal: whether a query sees earlier positions only.
        opens: makes of the layer's mask one that is True, or near zero, where attention is open.
        turns: whether the layer turns its keys by the rotary tables it is given, and
        turned: how many features of a head it turns; None for all.
        table: attribute of the module that holds the model's relative positions, which `bias` is handed as the owner.
        query: gives what multiplies the rows, (B, H, T, d) or (B * H, T, d), of all left factors up to the softmax
            in their order.
        why_not: says why an option of the model rules prompts out; None where nothing does.
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
