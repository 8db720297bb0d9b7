# SPDX-License-Identifier: Apache-2.0
"""ProMotion's unit written down a second time, in float64 and with loops, to compare the package with.

Nothing here imports the package. A plain model is run as it is; a hook behind each block takes the block's output
apart, image by image and patch by patch, and adds what section 3 of the specification says. Sinkhorn runs on
probabilities, not on their logarithms, so temperatures must not be small.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORM_EPS, DIRECTION_EPS, SHORTEST = 1e-5, 1e-6, 1e-6
Rows = list[Tensor]


@dataclass(frozen=True)
class Settings:
    """The settings of one run, under the names of ProMotionConfig."""

    bottleneck_dim: int = 8
    denoiser: str = "both"
    num_heads: int = 2
    denoise_steps: int = 2
    center: bool = True
    num_prototypes: int = 2
    proposal: str = "bank"
    estimation_rounds: int = 2
    sinkhorn_rounds: int = 3
    sinkhorn_eps: float = 0.5
    balance: float = 1.0
    read_temperature: float = 0.4
    read_top: int | None = None
    feedback: bool = True
    unit_scale: float = 0.6


@dataclass(frozen=True)
class Unit:
    """The tensors of one block's unit; of the denoiser's by step."""

    gain: Tensor
    shift: Tensor
    down: Tensor
    down_bias: Tensor
    denoiser: dict[str, Tensor]
    project: Tensor
    bank: Tensor | None
    up: Tensor
    up_bias: Tensor


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Row by row."""
    return torch.stack([(row * vector).sum() for row in matrix])


def compress(token: Tensor, unit: Unit) -> Tensor:
    centred = token - token.sum() / len(token)
    variance = (centred * centred).sum() / len(token)
    normed = centred / torch.sqrt(variance + NORM_EPS) * unit.gain + unit.shift
    return times(unit.down, normed) + unit.down_bias


def attend(tokens: Rows, subspace: Tensor, output: Tensor, gain: Tensor, heads: int) -> Rows:
    """Tokens look at all tokens of the image, in each head by its own part of the one projection."""
    size = len(tokens[0]) // heads
    parts = [times(subspace, token) for token in tokens]
    result = []
    for number, token in enumerate(tokens):
        seen = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = [(parts[number][own] * other[own]).sum() / math.sqrt(size) for other in parts]
            total = sum(torch.exp(score) for score in scores)
            seen.append(sum(torch.exp(score) / total * other[own] for score, other in zip(scores, parts, strict=True)))
        result.append(token + gain * times(output, torch.cat(seen)))
    return result


def each_token(token: Tensor, step: dict[str, Tensor]) -> Tensor:
    hidden = times(step["hidden_weight"], token) + step["hidden_bias"]
    inner = torch.stack([0.5 * value * (1.0 + torch.erf(value / math.sqrt(2.0))) for value in hidden])
    return token + times(step["token_weight"], inner) + step["token_bias"]


def denoise(tokens: Rows, tensors: dict[str, Tensor], settings: Settings) -> Rows:
    for number in range(settings.denoise_steps):
        step = {name: tensor[number] for name, tensor in tensors.items()}
        if settings.denoiser != "tokens":
            tokens = attend(tokens, step["subspace"], step["output"], step["gain"], settings.num_heads)
        if settings.denoiser != "attention":
            tokens = [each_token(token, step) for token in tokens]
    return tokens


def directions(tokens: Rows, project: Tensor, center: bool) -> Rows:
    projected = [times(project, token) for token in tokens]
    mean = sum(projected) / len(projected) if center else torch.zeros_like(projected[0])
    return [(row - mean) / torch.sqrt(((row - mean) ** 2).sum() + DIRECTION_EPS) for row in projected]


def unit_length(row: Tensor, otherwise: Tensor) -> Tensor:
    length = torch.sqrt((row * row).sum())
    return row / length if float(length) > SHORTEST else otherwise


def sinkhorn(scores: list[list[float]], rounds: int, balance: float) -> list[list[float]]:
    """Scale columns towards mass 1 / K and rows to mass 1 / N, in turn; rows of the result sum to one."""
    mass = [[math.exp(score) for score in row] for row in scores]
    patches, prototypes = len(mass), len(mass[0])
    for _ in range(rounds):
        columns = [sum(row[k] for row in mass) for k in range(prototypes)]
        mass = [[value / (columns[k] * prototypes) ** balance for k, value in enumerate(row)] for row in mass]
        mass = [[value / (sum(row) * patches) for value in row] for row in mass]
    return [[value * patches for value in row] for row in mass]


def dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum()


def pooled(tokens: Rows, grid: tuple[int, int], count: int) -> Rows:
    """Means of a square grid of neighbourhoods, each as torch's adaptive pooling bounds them."""
    side, (rows, columns) = math.isqrt(count), grid
    found = []
    for i in range(side):
        for j in range(side):
            chosen = [
                tokens[row * columns + column]
                for row in range(i * rows // side, -(-(i + 1) * rows // side))
                for column in range(j * columns // side, -(-(j + 1) * columns // side))
            ]
            mean = sum(chosen) / len(chosen)
            found.append(unit_length(mean, torch.zeros_like(mean)))
    return found


def estimate(u: Rows, start: Rows, settings: Settings) -> tuple[Rows, list[list[float]]]:
    prototypes = start
    for _ in range(settings.estimation_rounds):
        scores = [[float(dot(token, row)) / settings.sinkhorn_eps for row in prototypes] for token in u]
        share = sinkhorn(scores, settings.sinkhorn_rounds, settings.balance)
        sums = [sum(share[i][k] * token for i, token in enumerate(u)) for k in range(len(prototypes))]
        prototypes = [unit_length(total, old) for total, old in zip(sums, prototypes, strict=True)]
    return prototypes, share


def read(token: Tensor, prototypes: Rows, settings: Settings) -> Tensor:
    """Of the prototypes, the nearest ones weighing most; at the spread of denoised patches."""
    scores = [dot(token, row) / settings.read_temperature for row in prototypes]
    order = sorted(range(len(scores)), key=lambda k: -float(scores[k]))[: settings.read_top or len(scores)]
    total = sum(torch.exp(scores[k]) for k in order)
    mixed = sum(torch.exp(scores[k]) / total * prototypes[k] for k in order)
    return math.sqrt(len(token)) * mixed


def added(patches: Tensor, unit: Unit, settings: Settings, grid: tuple[int, int]) -> Tensor:
    """(N, D) what one unit adds to the patches (N, D) of one image."""
    found = denoise([compress(token, unit) for token in patches], unit.denoiser, settings)
    u = directions(found, unit.project, settings.center)
    if settings.proposal == "pool":
        start = [row.detach() for row in pooled(u, grid, settings.num_prototypes)]
    else:
        assert unit.bank is not None
        start = [unit_length(row, torch.zeros_like(row)) for row in unit.bank]
    prototypes, _ = estimate(u, start, settings)
    result = []
    for token, direction in zip(found, u, strict=True):
        feature = token + read(direction, prototypes, settings) if settings.feedback else token
        result.append(settings.unit_scale * (times(unit.up, feature) + unit.up_bias))
    return torch.stack(result)


@contextlib.contextmanager
def units_behind(
    blocks: list[nn.Module], units: list[Unit], settings: Settings, prefix: int, grids: list[tuple[int, int]]
) -> Iterator[None]:
    """Run the plain blocks with the units behind them, each with its grid."""

    def hook(unit: Unit, grid: tuple[int, int]) -> object:
        def behind(block: nn.Module, args: object, output: object) -> object:
            x = output[0] if isinstance(output, tuple) else output
            assert isinstance(x, Tensor)
            images = []
            for image in x.flatten(1, -2):
                changed = image[prefix:] + added(image[prefix:], unit, settings, grid)
                images.append(torch.cat([image[:prefix], changed]))
            whole = torch.stack(images).view_as(x)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return behind

    each = zip(blocks, units, grids, strict=True)
    handles = [block.register_forward_hook(hook(unit, grid), prepend=True) for block, unit, grid in each]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
