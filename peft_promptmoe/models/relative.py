# SPDX-License-Identifier: Apache-2.0
"""Speech encoders (conformers, WavLM, SpeechT5), whose scores depend on the distance between query and key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .own_attention import Asked, Attribute, OwnAttention, TwoProjections, if_decoder, last_of, not_scaled


def _of_sinusoids(asked: Asked, encoding: Any, weights: Any, content: Tensor, position: Tensor) -> Tensor:
    """(B, H, T, R) terms b and d of Transformer-XL (arXiv 1901.02860, section 3.3).

    Args:
        encoding: gives sinusoids (1, 2 * L - 1, D) of the distances from L - 1 down to 1 - L of a text (1, L, ...).
        weights: projects them.
        content, position: (H, d) the biases u, which the queries have, and v.
    """
    attention = asked.attention
    length = asked.keys + asked.offsets.shape[0] + 1  # the farthest is less away
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
    return "position_embeddings_type='rotary' turns the input before keys are made of it" if turns else None


def _grouped(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated for all queries that share them."""
    key, value = TwoProjections("k_proj", "v_proj")(attention, x)
    groups = attention.num_key_value_groups
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _tokens(mask: Tensor) -> Tensor:
    """(B, 1, 1, S) of a mask (B, S)."""
    return mask[:, None, None].to(torch.bool)


def _wavlm_bias(asked: Asked) -> Tensor:
    """Entries of the first layer's table of distances, times a gate that each head of a query makes of its input."""
    attention = asked.attention
    buckets = attention._relative_positions_bucket(-asked.distance())
    bias = asked.owner.rel_attn_embed(buckets).permute(0, 3, 1, 2)
    by_head = asked.bound["hidden_states"].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    pair = torch.sigmoid(attention.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1))
    one, other = pair.chunk(2, dim=-1)
    gate: Tensor = one * (other * attention.gru_rel_pos_const - 1.0) + 2.0
    return gate * bias


def _speecht5_bias(asked: Asked) -> Tensor:
    """Products of queries, which it scales before, with one entry for each distance (arXiv 1803.02155)."""
    table, limit = asked.owner.pe_k.weight, asked.owner.max_length
    entries = table[asked.distance().clamp(-limit, limit - 1) + limit].to(asked.query.dtype)
    return (asked.query.transpose(1, 2) @ entries.transpose(-1, -2)).transpose(1, 2)


def _turn(x: Tensor, columns: Tensor) -> Tensor:
    """Rows (B or 1, H, R, d) turned to positions (B or 1, R), neighbouring features by one angle each."""
    width = x.shape[-1]
    places = torch.arange(0, width, 2, device=x.device, dtype=torch.float32)
    angles = columns[:, None, :, None] * torch.exp(-math.log(10000.0) / width * places)
    cos, sin = (part.repeat_interleave(2, dim=-1).to(x.dtype) for part in (angles.cos(), angles.sin()))
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + across * sin


def _roformer_bias(asked: Asked) -> Tensor:
    """What turning the rows to their columns adds to their scores; the model turns tokens before it multiplies."""
    added = _turn(asked.key, asked.columns()) - asked.key
    return asked.query @ added.to(asked.query.dtype).transpose(-1, -2) / math.sqrt(asked.attention.attention_head_size)


def _turns_values(attention: Any) -> str | None:
    return "rotary_value=True turns values, too" if attention.rotary_value else None


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
