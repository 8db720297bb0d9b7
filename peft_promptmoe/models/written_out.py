# SPDX-License-Identifier: Apache-2.0
"""Older models of transformers, whose attention layers compute scores, softmax and sum step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .own_attention import Asked, Attribute, OwnAttention, TwoProjections, always, if_decoder, not_scaled


def _openai_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention.c_attn(x).split(attention.split_size, dim=2)
    return attention.split_heads(key), attention.split_heads(value)


def _openai_scale(attention: Any) -> float:
    return float(attention.n_head**0.5 / attention.split_size**0.5)


def _mpnet_bias(asked: Asked) -> Tensor:
    """Bias of MPNet: entries of the table of relative positions (key - query) that all layers share."""
    owner = asked.owner
    buckets = owner.relative_position_bucket(
        -asked.distance(), num_buckets=owner.relative_attention_bias.num_embeddings
    )
    bias: Tensor = owner.relative_attention_bias(buckets).permute(0, 3, 1, 2)
    return bias


def _eomt_bias(asked: Asked) -> Tensor:
    """Bias of EoMT: its mask adds 1, not 0, where attention is open."""
    mask = asked.bound.get("attention_mask")
    return asked.query.new_zeros(1, 1, 1, 1) if mask is None else mask.amax(dim=-1, keepdim=True)


GPT_NEO = OwnAttention(TwoProjections("k_proj", "v_proj"), scale=not_scaled, causal=always)
XGLM = GPT_NEO  # scales its queries first
OPENAI_GPT = OwnAttention(_openai_project, scale=_openai_scale, causal=always)
BERT_LIKE = OwnAttention(TwoProjections("key", "value"), causal=if_decoder)
MPNET = OwnAttention(TwoProjections("k", "v"), bias=_mpnet_bias)
VIDEOMAE = OwnAttention(TwoProjections("key", "value"))
EOMT = OwnAttention(TwoProjections("k_proj", "v_proj"), scale=Attribute("scale"), bias=_eomt_bias)
VJEPA2 = VIDEOMAE  # its rotary embedding is by frame, row and column; prompts have none of these and are not turned


def _neox_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention.query_key_value(x).unflatten(-1, (attention.num_attention_heads, -1)).chunk(3, dim=-1)
    return key.transpose(1, 2), value.transpose(1, 2)


def _neox_scale(attention: Any) -> float:
    return 1.0 / float(attention.norm_factor)


def _of_words_and_entities(lefts: list[Tensor]) -> Tensor:
    """LUKE has separate queries for words and for entities. Prompts count as words."""
    return lefts[0] if len(lefts) == 1 else torch.cat([lefts[0], lefts[2]], dim=2)


GPT_NEOX_JAPANESE = OwnAttention(
    _neox_project,
    scale=_neox_scale,
    causal=always,
    turns=always,
    turned=Attribute("rotary_ndims"),
)
CTRL = OwnAttention(TwoProjections("Wk", "Wv"), scale=Attribute("scaling"), causal=always)
BART_LIKE = OwnAttention(TwoProjections("k_proj", "v_proj"), scale=not_scaled, causal=if_decoder)
PROPHETNET = OwnAttention(TwoProjections("key_proj", "value_proj"), scale=not_scaled)
LUKE = OwnAttention(TwoProjections("key", "value"), query=_of_words_and_entities)
