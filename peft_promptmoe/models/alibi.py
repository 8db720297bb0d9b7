# SPDX-License-Identifier: Apache-2.0
"""Bloom, Falcon and MPT: linear position biases (ALiBi), extended to prompt rows in front of the text."""

from __future__ import annotations

import math
from operator import invert
from typing import Any

import torch
from torch import Tensor

from .own_attention import Asked, Attribute, OwnAttention, always


def slopes(heads: int, device: torch.device) -> Tensor:
    """Slopes (heads,) of the ALiBi paper (arXiv 2108.12409, section 3), for any number of heads."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    rest = [2.0 ** (-4.0 * head / power) for head in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(first + rest, device=device)


def _bias_from_the_first_token(asked: Asked) -> Tensor:
    """Bias of Bloom and Falcon: slope times the key's position, counted from the first real token."""
    heads = slopes(asked.query.shape[1], asked.query.device)
    return (heads[:, None] * asked.offsets)[None, :, None]


def _falcon_bias(asked: Asked) -> Tensor:
    if not asked.attention.config.alibi:
        return asked.query.new_zeros(1, 1, 1, 1)
    return (
        _bias_from_the_first_token(asked) * asked.attention.inv_norm_factor
    )  # Falcon scales the bias together with the scores


def _without_alibi(attention: Any) -> bool:
    return not attention.config.alibi


def _mpt_bias(asked: Asked) -> Tensor:
    """Bias of MPT: columns counted back from the last key, padding included."""
    given = asked.bound["position_bias"]  # (H, 1, length)
    heads = given[:, 0, -1] - given[:, 0, -2]
    return heads[None, :, None, None] * (asked.columns() - (asked.keys - 1))[:, None, None]


def _bloom_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention._reshape(attention.query_key_value(x))
    return key, value


def _falcon_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention._split_heads(attention.query_key_value(x))
    return key.transpose(1, 2), value.transpose(1, 2)


def _mpt_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mixed = attention.Wqkv(x)
    if attention.clip_qkv:
        mixed = mixed.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    _, key, value = mixed.unflatten(-1, (3, attention.n_heads, attention.head_dim)).unbind(-3)
    return key.transpose(1, 2), value.transpose(1, 2)


BLOOM = OwnAttention(
    _bloom_project, scale=Attribute("inv_norm_factor"), bias=_bias_from_the_first_token, causal=always
)
FALCON = OwnAttention(
    _falcon_project,
    scale=Attribute("inv_norm_factor"),
    bias=_falcon_bias,
    causal=always,
    turns=_without_alibi,
)
MPT = OwnAttention(
    _mpt_project,
    scale=Attribute("softmax_scale"),
    bias=_mpt_bias,
    causal=always,
    opens=invert,
)
