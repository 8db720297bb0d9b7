# SPDX-License-Identifier: Apache-2.0
"""How a dispatcher makes the prompts of one block of one expert: pure functions.

This is our reading of pMoE, whose equations are not public to us; what the functions read are the three groups of
tokens that a review quotes from section 3.3 of the paper.

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
    """Layer norm without gain and bias, which the linear maps behind it would take in, in at least float32."""
    return F.layer_norm(x.to(routing_dtype(x)), x.shape[-1:], eps=NORM_EPS)


def read_tokens(tokens: Tensor, weight: Tensor) -> Tensor:
    """A linear map of `plain_norm(tokens)` that keeps the tokens for the backward pass and not their norm, too.

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
    """(B, M, D) what a dispatcher reads: all experts' prompts, the carried prompts, the expert's patches.

    Args:
        prompts: K of (P, D), as this expert sees them.
        carried: (B, P, D) or None.
        patches: (B, N, D).
    """
    own = torch.cat(prompts).to(patches.dtype).expand(patches.shape[0], -1, -1)
    return torch.cat([own, patches] if carried is None else [own, carried.to(patches.dtype), patches], dim=1)


def group_shares(shares: Tensor, experts: int, slots: int, carried: bool) -> Tensor:
    """What each group of tokens contributes.

    Args:
        shares: (B, P, M) weights of the tokens, rows that sum to 1.

    Returns:
        (B, K + 2) each expert's prompts, the carried prompts, the patches; rows sum to 1.
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
    """Each prompt a convex combination of all tokens, after the dispatch of Soft-MoE (dispatcher "token").

    A bias per slot, which a linear gate would have, cancels in a softmax over the tokens. Ours stands on the expert's
    own prompt of the same number, so that slots start near their own prompts and not all at the mean of the patches.

    Args:
        tokens: (B, M, D) of `all_tokens`.
        own: where the expert's own prompts start among the tokens.
        weight: (P, D).
        bias: (P,).

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
    """The carried prompts and a mixture of the experts' prompts, weighed for the whole image (dispatcher "expert").

    Args:
        tokens: (B, M, D) of `all_tokens`.
        prompts: K of (P, D).
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
    """The expert's own and carried prompts, and what they attend to among all tokens (dispatcher "attention").

    Args:
        tokens: (B, M, D) of `all_tokens`.
        own: (P, D) the expert's own prompts.
        carried: (B, P, D) or None.
        query, key, down: (r, D).
        up: (D, r).

    Returns:
        (B, P, D) prompts and (B, P, M) weights.
    """
    dtype = routing_dtype(tokens)
    # A copy for each sample: on an expanded view torch's products round by whether the weights want a gradient.
    start = own.to(dtype).repeat(tokens.shape[0], 1, 1) if carried is None else own.to(dtype) + carried
    asked, keys = read_tokens(start, query), read_tokens(tokens, key)
    shares = (asked @ keys.transpose(1, 2) / math.sqrt(query.shape[0])).softmax(dim=-1)
    found = shares @ F.linear(tokens, down.to(tokens.dtype)).to(dtype)
    return start + F.linear(found, up.to(dtype)), shares


def dispatch_sum(prompts: list[Tensor], carried: Tensor | None, batch: int) -> Tensor:
    """The mean of the prompts given, and the carried ones (dispatchers "mean", of all experts, and "none", of one).

    Args:
        prompts: any number of (P, D).
        carried: (B, P, D) or None.

    Returns:
        (B, P, D).
    """
    mean = torch.stack(prompts).mean(dim=0).expand(batch, -1, -1)
    return mean if carried is None else mean + carried
