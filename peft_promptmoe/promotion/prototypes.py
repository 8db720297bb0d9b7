# SPDX-License-Identifier: Apache-2.0
"""Pure functions for the prototypes of an image's patches.

Letters: `B` images, `N` patches, `d` unit width, `K` prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTION_EPS = 1e-6  # added under the root: a patch of zeros gets the direction zero
SHORTEST = 1e-6  # a shorter sum of patches counts as having no direction


def directions(z: Tensor, projection: Tensor, center: bool) -> Tensor:
    """Directions of patches, in the space where they are compared with prototypes.

    Args:
        z: (B, N, d) denoised patches.
        projection: (d, d) projection into this space.
        center: whether the mean over each image's patches is subtracted first. All patches share one direction, and
            their differences are small compared with it.

    Returns:
        (B, N, d) vectors of length one, or zero.
    """
    v = F.linear(z, projection.to(z))
    if center:
        v = v - v.mean(dim=1, keepdim=True)
    return v * torch.rsqrt(v.square().sum(dim=-1, keepdim=True) + DIRECTION_EPS)


def unit_rows(rows: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Rows scaled to length one. Rows shorter than `SHORTEST` or not finite are replaced.

    Args:
        rows: (..., K, d).
        otherwise: (..., K, d) replacements. None: zeros.

    Returns:
        (..., K, d).
    """
    square = rows.square().sum(dim=-1, keepdim=True)
    is_long = (square > SHORTEST**2) & torch.isfinite(square)
    # The inner `where` keeps NaN out of the gradient of the replaced rows.
    scaled = torch.where(is_long, rows, 0.0) * torch.rsqrt(torch.where(is_long, square, 1.0))
    return torch.where(is_long, scaled, torch.zeros_like(rows) if otherwise is None else otherwise)


def sinkhorn(scores: Tensor, rounds: int, balance: float = 1.0) -> Tensor:
    """Soft assignment of each image's patches to prototypes of (nearly) equal mass, by Sinkhorn-Knopp.

    Computed with logarithms, because exp(1 / 0.05) is too large for half precision. Each image is balanced separately,
    so that its output does not depend on the other images of the batch.

    Args:
        scores: (B, N, K) cosines divided by the temperature.
        rounds: how often columns and rows are scaled. Rows are scaled last and sum to one exactly.
        balance: 1: equal masses 1 / K. 0: softmax over prototypes. Between: masses are partly balanced.

    Returns:
        (B, N, K) assignment in at least float32. Rows sum to one.
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
    """Estimate the prototypes of each image: assign patches, take the direction of their weighted sum, and repeat.

    No gradient flows through the assignment. It flows through the patches of the last sum.

    Args:
        u: (B, N, d) directions of patches.
        start: (B or 1, K, d) initial prototypes.
        rounds: number of repetitions.
        eps: temperature of the assignment.
        sinkhorn_rounds: Sinkhorn iterations per assignment.
        balance: as in `sinkhorn`.

    Returns:
        Prototypes (B, K, d) of length one, and the last assignment (B, N, K), whose rows sum to one.
    """
    prototypes = start.expand(u.shape[0], -1, -1)
    fixed = u.detach()
    for last in [False] * (rounds - 1) + [True]:
        assignment = sinkhorn(cosines(fixed, prototypes.detach()) / eps, sinkhorn_rounds, balance)
        patches = u if last else fixed
        prototypes = unit_rows(assignment.transpose(1, 2).to(u.dtype) @ patches, prototypes.detach())
    return prototypes, assignment


def cosines(u: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines (B, N, K) of patches (B, N, d) with prototypes (B, K, d)."""
    return u @ prototypes.transpose(1, 2)


def read_back(similarity: Tensor, prototypes: Tensor, temperature: float, top: int | None) -> Tensor:
    """What patches read from the prototypes, at the scale of denoised patches.

    Args:
        similarity: (B, N, K) cosines.
        prototypes: (B, K, d) prototypes.
        temperature: temperature of the softmax over prototypes.
        top: number of nearest prototypes that a patch reads. None: all.

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
        grid: (rows, columns) of patches.
        count: number of prototypes K, a square number.

    Returns:
        (B, K, d).
    """
    # Contiguous: a single image could pass for channels-last, and pooling would then add in another order.
    maps = u.transpose(1, 2).unflatten(2, grid).contiguous()
    return unit_rows(F.adaptive_avg_pool2d(maps, math.isqrt(count)).flatten(2).transpose(1, 2))


def margin_loss(similarity: Tensor, assigned: Tensor, margin: float, temperature: float) -> Tensor:
    """Cross-entropy of each patch's own prototype, with `margin` subtracted from its cosine.

    Args:
        similarity: (B, N, K) cosines.
        assigned: (B, N) number of each patch's prototype.
        margin: the margin.
        temperature: temperature of the softmax.

    Returns:
        ().
    """
    own = F.one_hot(assigned, similarity.shape[-1]).to(similarity.dtype)
    return F.cross_entropy(((similarity - margin * own) / temperature).flatten(0, 1), assigned.flatten())


def compactness(similarity: Tensor, assigned: Tensor) -> Tensor:
    """Mean of (1 - cosine)^2 of patches and their prototypes, (). Arguments as for `margin_loss`."""
    return (1.0 - similarity.gather(-1, assigned[..., None])).square().mean()
