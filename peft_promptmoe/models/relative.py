# SPDX-License-Identifier: Apache-2.0
"""Speech encoders (conformers, WavLM, SpeechT5): scores depend on the distance between query and key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .own_attention import Asked, Attribute, OwnAttention, TwoProjections, if_decoder, last_of, not_scaled


def _of_sinusoids(asked: Asked, encoding: Any, weights: Any, content: Tensor, position: Tensor) -> Tensor:
    """(B, H, T, R) terms b and d of Transformer-XL (arXiv 1901.02860, section 3.3).

    Args:
        encoding: computes sinusoids (1, 2 * L - 1, D) of the distances L - 1 down to 1 - L, for a text (1, L, ...).
        weights: projection of the sinusoids.
        content, position: (H, d) biases u (already added to the queries) and v.
    """
    attention = asked.attention
    length = asked.keys + asked.offsets.shape[0] + 1  # larger than any distance
    table = weights(encoding(asked.query.new_zeros(1, length, 1)))[0].unflatten(-1, content.shape).transpose(0, 1)
    scores = (asked.query + (position - content)[:, None]) @ table.transpose(-1, -2)
    places = (length - 1 - asked.distance())[:, None]
    return scores.gather(-1, places.expand(*scores.shape[:3], -1)) * attention.scaling


def _of_distances(asked: Asked) -> Tensor:
    """(B, H, T, R) products of queries with one entry for each distance (arXiv 1803.02155, section 3.2)."""
    attention = asked.attention
    left, right = attention.left_max_position_embeddings, attention.right_max_position_embeddings
    table = attention.distance_embedding.weight.to(asked.query.dtype)
    scores = asked.query @ table.transpose(-1, -2)
    places = ((-asked.distance()).clamp(-left, right) + left)[:, None]
    return scores.gather(-1, places.expand(*scores.shape[:3], -1)) * attention.scaling


def _conformer_bias(asked: Asked) -> Tensor:
    attention = asked.attention
    if attention.position_embeddings_type is None:
        return asked.query.new_zeros(1, 1, 1, 1)
    if attention.position_embeddings_type == "relative_key":
        return _of_distances(asked)
    encoding = asked.owner.embed_positions
    return _of_sinusoids(asked, encoding, attention.linear_pos, attention.pos_bias_u, attention.pos_bias_v)


def _parakeet_bias(asked: Asked) -> Tensor:
    attention = asked.attention
    encoding = asked.owner.encode_positions
    return _of_sinusoids(asked, encoding, attention.relative_k_proj, attention.bias_u, attention.bias_v)


def _turns_its_input(attention: Any) -> str | None:
    turns = attention.position_embeddings_type == "rotary"
    return (
        "position_embeddings_type='rotary' applies the rotary embedding to the input of the key projection"
        if turns
        else None
    )


def _grouped(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated for all query heads that share them."""
    key, value = TwoProjections("k_proj", "v_proj")(attention, x)
    groups = attention.num_key_value_groups
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _tokens(mask: Tensor) -> Tensor:
    """Mask (B, S) as (B, 1, 1, S)."""
    return mask[:, None, None].to(torch.bool)


def _wavlm_bias(asked: Asked) -> Tensor:
    """Bias of WavLM: entries of the first layer's table of distances, times a gate from each query's input."""
    attention = asked.attention
    buckets = attention._relative_positions_bucket(-asked.distance())
    bias = asked.owner.rel_attn_embed(buckets).permute(0, 3, 1, 2)
    by_head = asked.bound["hidden_states"].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    pair = torch.sigmoid(attention.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1))
    one, other = pair.chunk(2, dim=-1)
    gate: Tensor = one * (other * attention.gru_rel_pos_const - 1.0) + 2.0
    return gate * bias


def _speecht5_bias(asked: Asked) -> Tensor:
    """Bias of SpeechT5: products of (already scaled) queries with one entry per distance (arXiv 1803.02155)."""
    table, limit = asked.owner.pe_k.weight, asked.owner.max_length
    entries = table[asked.distance().clamp(-limit, limit - 1) + limit].to(asked.query.dtype)
    return (asked.query.transpose(1, 2) @ entries.transpose(-1, -2)).transpose(1, 2)


def _turn(x: Tensor, columns: Tensor) -> Tensor:
    """Rotary embedding of rows (B or 1, H, R, d) at positions (B or 1, R), with one angle per pair of neighbours."""
    width = x.shape[-1]
    places = torch.arange(0, width, 2, device=x.device, dtype=torch.float32)
    angles = columns[:, None, :, None] * torch.exp(-math.log(10000.0) / width * places)
    cos, sin = (part.repeat_interleave(2, dim=-1).to(x.dtype) for part in (angles.cos(), angles.sin()))
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + across * sin


def _roformer_bias(asked: Asked) -> Tensor:
    """Bias of RoFormer: what the rotary embedding adds to the rows' scores. The model itself only turns tokens."""
    added = _turn(asked.key, asked.columns()) - asked.key
    return asked.query @ added.to(asked.query.dtype).transpose(-1, -2) / math.sqrt(asked.attention.attention_head_size)


def _turns_values(attention: Any) -> str | None:
    return "rotary_value=True applies the rotary embedding to values, too" if attention.rotary_value else None


CONFORMER = OwnAttention(
    TwoProjections("linear_k", "linear_v"),
    scale=Attribute("scaling"),
    bias=_conformer_bias,
    query=last_of,
    table="embed_positions",
    why_not=_turns_its_input,
)
PARAKEET = OwnAttention(
    _grouped,
    scale=Attribute("scaling"),
    bias=_parakeet_bias,
    query=last_of,
    table="encode_positions",
)
WAVLM = OwnAttention(
    TwoProjections("k_proj", "v_proj"),
    scale=Attribute("scaling"),
    bias=_wavlm_bias,
    opens=_tokens,
    table="rel_attn_embed",
)
SPEECHT5 = OwnAttention(TwoProjections("k_proj", "v_proj"), scale=not_scaled, bias=_speecht5_bias, table="pe_k")
ROFORMER = OwnAttention(
    TwoProjections("key", "value"),
    bias=_roformer_bias,
    causal=if_decoder,
    why_not=_turns_values,
)
