# SPDX-License-Identifier: Apache-2.0
"""Prototypes of an image's patches: pure functions.

Letters: `B` images, `N` patches, `d` unit width, `K` prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTION_EPS = 1e-6  # under the root, so that a patch of zeros has the direction zero
SHORTEST = 1e-6  # a shorter sum of patches has no direction


def directions(z: Tensor, projection: Tensor, center: bool) -> Tensor:
    """Directions of patches in the space in which prototypes stand apart.

    Args:
        z: (B, N, d) denoised patches.
        projection: (d, d).
        center: whether each image's own mean is taken off before. All patches share one direction, beside which their
            differences are small.

    Returns:
        (B, N, d) of length one, or zero.
    """
    v = F.linear(z, projection.to(z))
    if center:
        v = v - v.mean(dim=1, keepdim=True)
    return v * torch.rsqrt(v.square().sum(dim=-1, keepdim=True) + DIRECTION_EPS)


def unit_rows(rows: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Rows of length one; one shorter than `SHORTEST`, or not finite, is that of `otherwise`, or zero.

    Args:
        rows: (..., K, d).
        otherwise: (..., K, d).

    Returns:
        (..., K, d).
    """
    square = rows.square().sum(dim=-1, keepdim=True)
    is_long = (square > SHORTEST**2) & torch.isfinite(square)
    # The inner `where` keeps NaN out of the gradient of the rows that are not taken.
    scaled = torch.where(is_long, rows, 0.0) * torch.rsqrt(torch.where(is_long, square, 1.0))
    return torch.where(is_long, scaled, torch.zeros_like(rows) if otherwise is None else otherwise)


def sinkhorn(scores: Tensor, rounds: int, balance: float = 1.0) -> Tensor:
    """Soft assignment of each image's patches to prototypes of (nearly) equal mass, by Sinkhorn-Knopp.

    In the logarithm, because exp(1 / 0.05) is too large for half precision. Never across images, whose outputs would
    depend on their mates in the batch.

    Args:
        scores: (B, N, K), divided by the temperature.
        rounds: how often columns and rows are scaled; rows come last and are exact.
        balance: 1 for equal masses 1 / K, 0 for a softmax over prototypes, in between for unequal masses.

    Returns:
        (B, N, K) in at least float32, rows of sum one.
    """
    patches, prototypes = scores.shape[-2:]
    log = scores.to(torch.promote_types(scores.dtype, torch.float32))
    for _ in range(rounds):
        if balance:
            log = log - balance * (log.logsumexp(dim=-2, keepdim=True) + math.log(prototypes))
        log = log - (log.logsumexp(dim=-1, keepdim=True) + math.log(patches))
    return patches * log.exp()


def estimate(
    u: Tensor, start: Tensor, rounds: int, eps: float, sinkhorn_rounds: int, balance: float
) -> tuple[Tensor, Tensor]:
    """Prototypes of each image: assign patches, take the direction of their weighted sum, and again.

    The assignment is no path for the gradient; it flows through the patches of the last sum.

    Args:
        u: (B, N, d) directions of patches.
        start: (B or 1, K, d) directions of the prototypes to begin with.
        rounds: how often.
        eps: temperature of the assignment.

    Returns:
        prototypes (B, K, d) of length one, and the last assignment (B, N, K), rows of sum one.
    """
    prototypes = start.expand(u.shape[0], -1, -1)
    fixed = u.detach()
    for last in [False] * (rounds - 1) + [True]:
        assignment = sinkhorn(cosines(fixed, prototypes.detach()) / eps, sinkhorn_rounds, balance)
        patches = u if last else fixed
        prototypes = unit_rows(assignment.transpose(1, 2).to(u.dtype) @ patches, prototypes.detach())
    return prototypes, assignment


def cosines(u: Tensor, prototypes: Tensor) -> Tensor:
    """(B, N, K) cosines of patches (B, N, d) with prototypes (B, K, d)."""
    return u @ prototypes.transpose(1, 2)


def read_back(similarity: Tensor, prototypes: Tensor, temperature: float, top: int | None) -> Tensor:
    """What patches read of the prototypes, at the spread that denoised patches have.

    Args:
        similarity: (B, N, K) cosines.
        prototypes: (B, K, d).
        temperature: of the softmax over prototypes.
        top: how many of the nearest prototypes are read; None for all.

    Returns:
        (B, N, d).
    """
    scores = similarity / temperature
    if top is not None and top < scores.shape[-1]:
        index = similarity.topk(top, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, index, scores.gather(-1, index))
    return math.sqrt(prototypes.shape[-1]) * (scores.softmax(dim=-1) @ prototypes)


def pool_proposals(u: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """Directions of the means of a square grid of neighbouring patches.

    Args:
        u: (B, N, d) directions of patches, row by row.
        grid: rows and columns of patches.
        count: prototypes K, a square.

    Returns:
        (B, K, d).
    """
    # Contiguous, because pooling adds up in another order where one image alone could pass for channels last.
    maps = u.transpose(1, 2).unflatten(2, grid).contiguous()
    return unit_rows(F.adaptive_avg_pool2d(maps, math.isqrt(count)).flatten(2).transpose(1, 2))


def margin_loss(similarity: Tensor, assigned: Tensor, margin: float, temperature: float) -> Tensor:
    """Cross-entropy of each patch's prototype, whose cosine counts for `margin` less.

    Args:
        similarity: (B, N, K) cosines.
        assigned: (B, N) prototypes.

    Returns:
        ().
    """
    own = F.one_hot(assigned, similarity.shape[-1]).to(similarity.dtype)
    return F.cross_entropy(((similarity - margin * own) / temperature).flatten(0, 1), assigned.flatten())


def compactness(similarity: Tensor, assigned: Tensor) -> Tensor:
    """() mean of (1 - cosine)^2 of patches and their prototypes, of `margin_loss`'s arguments."""
    return (1.0 - similarity.gather(-1, assigned[..., None])).square().mean()
