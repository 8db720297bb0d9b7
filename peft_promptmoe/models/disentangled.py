# SPDX-License-Identifier: Apache-2.0
"""DeBERTa: attention scores from content and from tables of relative positions (arXiv 2006.03654, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .inspection import unwrapped_forward
from .own_attention import Asked, OwnAttention, TwoProjections, not_scaled


def _places(asked: Asked, span: int) -> Tensor:
    """(B or 1, T, R) index into the table of 2 * span relative positions, for each query and row."""
    distance, attention = asked.distance(), asked.attention
    buckets = getattr(attention, "position_buckets", -1)
    if buckets > 0 and attention.max_relative_positions > 0:
        bucket = unwrapped_forward(attention).__globals__["make_log_bucket_position"]
        distance = bucket(distance, buckets, attention.max_relative_positions).long()
    return (distance + span).clamp(0, 2 * span - 1)


def _of_position(asked: Asked, table: Tensor, places: Tensor) -> Tensor:
    """(B, H, T, R) products of queries (B, H, T, d) with the entries of a table (H, 2 * span, d)."""
    scores = asked.query @ table.transpose(-1, -2).to(asked.query.dtype)
    return scores.gather(-1, places[:, None].expand(*scores.shape[:3], -1))


def _to_position(asked: Asked, key: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """(B or 1, H, T, R) products of rows (B or 1, H, R, d) with the entries of a table (H, 2 * span, d)."""
    scores = (key @ table.transpose(-1, -2).to(key.dtype)).transpose(-1, -2)  # by entry and row
    batch = max(scores.shape[0], places.shape[0])
    index = places[:, None].expand(batch, scores.shape[1], -1, -1)
    return scores.expand(batch, -1, -1, -1).gather(-2, index)


def _split_heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(-2, -3)


def _bias_v2(asked: Asked) -> Tensor:
    attention = asked.attention
    if not attention.relative_attention:
        return asked.query.new_zeros(1, 1, 1, 1)
    span = attention.pos_ebd_size
    entries = attention.pos_dropout(asked.bound["rel_embeddings"])[: 2 * span]
    shared, kinds, places = attention.share_att_key, attention.pos_att_type, _places(asked, span)
    bias = asked.query.new_zeros(1, 1, 1, 1)
    if "c2p" in kinds:
        table = (attention.key_proj if shared else attention.pos_key_proj)(entries)
        bias = bias + _of_position(asked, _split_heads(attention, table), places) / _divisor(attention)
    if "p2c" in kinds:
        table = (attention.query_proj if shared else attention.pos_query_proj)(entries)
        bias = bias + _to_position(asked, asked.key, _split_heads(attention, table), places) / _divisor(attention)
    return bias


def _divisor(attention: Any) -> float:
    kinds = sum(kind in attention.pos_att_type for kind in ("c2p", "p2c"))
    return math.sqrt(attention.attention_head_size * (1 + kinds))


def _one_by_divisor(attention: Any) -> float:
    return 1.0 / _divisor(attention)


def _bias_v1(asked: Asked) -> Tensor:
    attention = asked.attention
    if not attention.relative_attention:
        return asked.query.new_zeros(1, 1, 1, 1)
    entries = attention.pos_dropout(asked.bound["rel_embeddings"])
    kinds, places = attention.pos_att_type, _places(asked, attention.max_relative_positions)
    bias = asked.query.new_zeros(1, 1, 1, 1)
    if "c2p" in kinds:  # here the queries were divided before
        bias = bias + _of_position(asked, _split_heads(attention, attention.pos_proj(entries)), places)
    if "p2c" in kinds:
        table = _split_heads(attention, attention.pos_q_proj(entries)) / _divisor_v1(attention)
        bias = bias + _to_position(asked, asked.key, table, places)
    return bias


def _divisor_v1(attention: Any) -> float:
    return math.sqrt(attention.attention_head_size * (1 + len(attention.pos_att_type)))


def _project_v1(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention.transpose_for_scores(attention.in_proj(x)).chunk(3, dim=-1)
    return key, value + attention.transpose_for_scores(attention.v_bias[None, None, :])


def _talks(attention: Any) -> str | None:
    return "talking_head=True mixes heads after the softmax" if attention.talking_head else None


def _pairs(mask: Tensor) -> Tensor:
    """Pair mask from a token mask: 1 where both tokens are real."""
    return mask.to(torch.bool)


DEBERTA = OwnAttention(_project_v1, scale=not_scaled, bias=_bias_v1, opens=_pairs, why_not=_talks)
DEBERTA_V2 = OwnAttention(
    TwoProjections("key_proj", "value_proj"),
    scale=_one_by_divisor,
    bias=_bias_v2,
    opens=_pairs,
)
