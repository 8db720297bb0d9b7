# SPDX-License-Identifier: Apache-2.0
"""Pure functions of the dispatchers, which make the prompts of one block of one expert.

This is our reading of pMoE, whose equations we could not read. The functions read the three groups of tokens that a
review quotes from section 3.3 of the paper.

Letters: `B` batch, `K` experts, `P` prompts per expert, `N` patches, `D` width of the expert whose prompts are made,
`r` rank, `h` hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.router import routing_dtype

NORM_EPS = 1e-5


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm in at least float32, without gain and bias (the linear map that follows includes them)."""
    return F.layer_norm(x.to(routing_dtype(x)), x.shape[-1:], eps=NORM_EPS)


def read_tokens(tokens: Tensor, weight: Tensor) -> Tensor:
    """Linear map of `plain_norm(tokens)`. Only the tokens are stored for the backward pass, not their norm.

    Args:
        tokens: (B, M, D).
        weight: (r, D).

    Returns:
        (B, M, r) in at least float32.
    """
    dtype = routing_dtype(tokens)
    weight = weight.to(dtype)
    variance, mean = torch.var_mean(tokens.to(dtype), dim=-1, correction=0, keepdim=True)
    return (F.linear(tokens.to(dtype), weight) - mean * weight.sum(dim=-1)) * torch.rsqrt(variance + NORM_EPS)


def all_tokens(prompts: list[Tensor], carried: Tensor | None, patches: Tensor) -> Tensor:
    """Tokens that a dispatcher reads, (B, M, D): all experts' prompts, the carried prompts, the expert's patches.

    Args:
        prompts: K tensors (P, D), mapped to this expert's width.
        carried: (B, P, D) the previous block's outputs at the prompt positions, or None.
        patches: (B, N, D) patches in front of the block.
    """
    own = torch.cat(prompts).to(patches.dtype).expand(patches.shape[0], -1, -1)
    return torch.cat([own, patches] if carried is None else [own, carried.to(patches.dtype), patches], dim=1)


def group_shares(shares: Tensor, experts: int, slots: int, carried: bool) -> Tensor:
    """Share of each group of tokens in the prompts.

    Args:
        shares: (B, P, M) weights of the tokens. Rows sum to 1.
        experts: number of experts K.
        slots: prompts per expert P.
        carried: whether there are carried prompts.

    Returns:
        (B, K + 2) shares of each expert's prompts, the carried prompts and the patches. Rows sum to 1.
    """
    mean = shares.mean(dim=1)
    edge = experts * slots
    parts = [mean[:, :edge].unflatten(1, (experts, slots)).sum(dim=-1)]
    rest = mean[:, edge:]
    if carried:
        parts += [rest[:, :slots].sum(dim=1, keepdim=True), rest[:, slots:].sum(dim=1, keepdim=True)]
    else:
        parts += [torch.zeros_like(mean[:, :1]), rest.sum(dim=1, keepdim=True)]
    return torch.cat(parts, dim=1)


def dispatch_tokens(tokens: Tensor, own: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Dispatcher "token": each prompt is a convex combination of all tokens, like the dispatch of Soft-MoE.

    A bias per slot, as in a linear gate, would cancel in the softmax over tokens. So the bias is added only to the
    score of the expert's own prompt of the same number. Slots then start near their own prompts, not all near the mean
    of the patches.

    Args:
        tokens: (B, M, D) from `all_tokens`.
        own: index of the expert's first own prompt among the tokens.
        weight: (P, D) gate weight.
        bias: (P,) bias of the own prompts.

    Returns:
        (B, P, D) prompts and (B, P, M) weights.
    """
    scores = read_tokens(tokens, weight).transpose(1, 2)
    slots = weight.shape[0]
    scores = scores + F.pad(torch.diag(bias.to(scores.dtype)), (own, tokens.shape[1] - own - slots))
    shares = scores.softmax(dim=-1)
    return torch.matmul(shares.to(tokens.dtype), tokens), shares


def dispatch_experts(
    tokens: Tensor,
    prompts: list[Tensor],
    carried: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Dispatcher "expert": the carried prompts plus a mixture of the experts' prompts, with one weight per expert.

    Args:
        tokens: (B, M, D) from `all_tokens`.
        prompts: K tensors (P, D).
        carried: (B, P, D) or None.
        hidden_weight: (h, D), hidden_bias: (h,).
        weight: (K, h), bias: (K,).

    Returns:
        (B, P, D) prompts and (B, K) gates.
    """
    dtype = routing_dtype(tokens)
    hidden = F.gelu(F.linear(plain_norm(tokens.to(dtype).mean(dim=1)), hidden_weight.to(dtype), hidden_bias.to(dtype)))
    gates = F.linear(hidden, weight.to(dtype), bias.to(dtype)).softmax(dim=-1)
    mixed = torch.einsum("bk,kpd->bpd", gates, torch.stack(prompts).to(dtype))
    return mixed if carried is None else mixed + carried, gates


def dispatch_attention(
    tokens: Tensor, own: Tensor, carried: Tensor | None, query: Tensor, key: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Dispatcher "attention": the expert's own and carried prompts, plus what they attend to among all tokens.

    Args:
        tokens: (B, M, D) from `all_tokens`.
        own: (P, D) the expert's own prompts.
        carried: (B, P, D) or None.
        query, key, down: (r, D).
        up: (D, r).

    Returns:
        (B, P, D) prompts and (B, P, M) weights.
    """
    dtype = routing_dtype(tokens)
    # A copy per sample: on an expanded view the rounding would depend on whether the weights need a gradient.
    start = own.to(dtype).repeat(tokens.shape[0], 1, 1) if carried is None else own.to(dtype) + carried
    asked, keys = read_tokens(start, query), read_tokens(tokens, key)
    shares = (asked @ keys.transpose(1, 2) / math.sqrt(query.shape[0])).softmax(dim=-1)
    found = shares @ F.linear(tokens, down.to(tokens.dtype)).to(dtype)
    return start + F.linear(found, up.to(dtype)), shares


def dispatch_sum(prompts: list[Tensor], carried: Tensor | None, batch: int) -> Tensor:
    """Dispatchers "mean" and "none": the mean of the prompts passed in, plus the carried prompts.

    Args:
        prompts: any number of tensors (P, D): all experts' for "mean", the own ones for "none".
        carried: (B, P, D) or None.
        batch: batch size B.

    Returns:
        (B, P, D).
    """
    mean = torch.stack(prompts).mean(dim=0).expand(batch, -1, -1)
    return mean if carried is None else mean + carried
