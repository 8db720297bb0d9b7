# SPDX-License-Identifier: Apache-2.0
"""Attention of every token to the slots of its chosen experts. The cost does not grow with the number of experts.

A token attends to text, shared slots and its own experts' slots in one softmax. The computation is split in two.
First, attention to the chosen experts' slots is computed separately, in products grouped by expert (`chosen_slots`).
For each head this gives an output o and the log-sum-exp l of the scores. Then one extra column stands for all these
slots in the attention over everything else. Queries get extra features with the value l / scale, and the column has a
1 in these features, so its score is l. Values get a feature that is 1 in this column only, so the kernel returns the
column's weight w together with its output. The result is output + w * o. This is exact, and the standard fused kernel
differentiates it.

For the backward pass only the queries with their features, which the kernel stores anyway, and w are stored. Scores
and o are computed again, which costs less than storing them. Attention dropout, if a model has it, drops a token's
chosen slots together.

Letters, in addition to those of `chosen_slots`: `A` adapters with routed experts in this layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing.router import without_autocast
from .blocks import Order, group_of, in_blocks
from .chosen_slots import ChosenSlots, Rotate, SlotBlocks, Turn

# Bounds of the columns' scores before the scale. They are (nearly) powers of two, exact in bfloat16 and float16. With
# any usual scale the exponential of the lower bound is zero in float64.
LEAST, MOST_IN_FLOAT16 = -(2.0**15), 7 * 2.0**13
HALVES = 2  # features per score: in bfloat16 a single one would have an error of half a percent
CUDA_UNIT = 8  # fused kernels on a GPU need widths that are multiples of this


@dataclass
class Joined:
    """Result of `attend_chosen`.

    Attributes:
        query: (B, Hq, lead + T, width) queries with the score features. The first `lead` queries are blank.
        score: (A, B, T, Hq) log-sum-exp of the scores of each adapter's chosen slots, including log-gates.
        finish: function that turns the kernel's output (B, lead + T, Hq, width) into attention's (B, T, Hq, v).
    """

    query: Tensor
    score: Tensor
    finish: Callable[[Tensor], Tensor]


class Settings(NamedTuple):
    """The settings of one call that are not tensors: see `attend_chosen`.

    `widths` are those of a head's queries and values, `most` is the largest score in the kernel's dtype. Slots and
    rotation are given for each part.
    """

    scale: float
    cap: float | None
    lead: int
    width: int
    widths: tuple[int, int]
    most: float
    slots: tuple[int, ...]
    rotations: tuple[Rotate | None, ...]


PER_PART = 9  # tensors per part: key, value, log-gates, bias, cosines, sines, and three for the order in blocks


def joined_width(query: Tensor, value: Tensor, adapters: int) -> int:
    """Width of queries, keys and values including the extra features."""
    needed = max(query.shape[-1] + HALVES * adapters, value.shape[-1] + adapters)
    return needed + -needed % (CUDA_UNIT if query.device.type == "cuda" else HALVES)


def attend_chosen(
    query: Tensor, value: Tensor, parts: list[ChosenSlots], scale: float, lead: int = 0, cap: float | None = None
) -> Joined:
    """Compute attention to the chosen experts' slots separately, and write its scores into the queries.

    Args:
        query: (B, Hq, T, d) queries.
        value: (B, H, S, v) values of the text. The result has their width.
        parts: chosen slots, one item per adapter.
        scale: factor of the scores.
        lead: number of blank queries to put in front.
        cap: scores become cap * tanh(score / cap) before gates are added (Gemma 2). None: no cap.
    """
    slots, rotations = tuple(part.slots for part in parts), tuple(part.turn and part.turn.rotate for part in parts)
    width, widths = joined_width(query, value, len(parts)), (query.shape[-1], value.shape[-1])
    settings = Settings(scale, cap, lead, width, widths, _most(query), slots, rotations)
    tensors: list[Tensor | None] = []
    for part in parts:
        cos, sin = part.turn[:2] if part.turn is not None else (None, None)
        order = in_blocks(*group_of(part.experts, part.key, part.slots))
        tensors += [part.key, part.value, part.log_gates, part.bias, cos, sin, *order]
    if torch.jit.is_tracing():  # tracing does not support autograd functions with their own backward
        joined, score, output = _attend(query, settings, tensors)
        return Joined(joined, score, lambda found: _finish(found, output, settings)[0])
    joined, score, output = _Attend.apply(query, settings, *tensors)
    return Joined(joined, score, lambda found: _Finish.apply(found, output, joined.detach(), settings, *tensors))


def _most(query: Tensor) -> float:
    dtype, kind = query.dtype, query.device.type
    if not query.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return MOST_IN_FLOAT16 if dtype == torch.float16 else torch.finfo(torch.bfloat16).max / 2


def _attend(query: Tensor, settings: Settings, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with features (B, Hq, lead + T, width), and scores and outputs of each adapter's chosen slots."""
    with without_autocast(query):
        found = [blocks.merged() for blocks in _blocks(settings, tensors, query)]
        joined = _with_features(query, [score for score, _ in found], settings)
    scores, outputs = (torch.stack(each) for each in zip(*found, strict=True))
    return joined, scores, outputs.to(query.dtype)


def _finish(found: Tensor, output: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The output of attention over all rows, and the weights of the extra columns."""
    width = settings.widths[1]
    text = found[:, settings.lead :]
    weights = text[..., width : width + len(output)].clone()
    result = text[..., :width]
    for number, part in enumerate(output):
        result = torch.addcmul(result, weights[..., number, None], part.to(result.dtype))
    return result, weights


class _Attend(torch.autograd.Function):
    """Autograd function: queries to queries with features, scores and outputs of the chosen slots."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        joined, scores, outputs = _attend(query, settings, tensors)
        ctx.settings = settings
        ctx.save_for_backward(joined, *tensors)
        ctx.set_materialize_grads(False)
        return joined, scores, outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        joined, *tensors = ctx.saved_tensors
        query = _queries(joined, settings)
        of_joined, of_score, of_output = gradients
        of_query = joined.new_zeros(query.shape) if of_joined is None else _queries(of_joined, settings)
        found: list[Tensor | None] = []
        with without_autocast(query):
            for number, blocks in enumerate(_blocks(settings, tensors, query)):
                shape = (query.shape[0], query.shape[2], query.shape[1])
                score = query.new_zeros(shape) if of_score is None else of_score[number]
                if of_joined is not None:
                    score = score + _score_of_features(of_joined, joined, number, settings)
                output = query.new_zeros(*shape, settings.widths[1]) if of_output is None else of_output[number]
                needed = ctx.needs_input_grad[2 + PER_PART * number :]
                more, *of_part = blocks.gradients(score, output, needed)
                assert more is not None
                of_query = of_query + more
                found += [*of_part, *[None] * (PER_PART - len(of_part))]
        return of_query.to(query.dtype), None, *found


class _Finish(torch.autograd.Function):
    """Autograd function: the kernel's output and those of the chosen slots to the output over all rows."""

    @staticmethod
    def forward(
        ctx: Any, found: Tensor, output: Tensor, joined: Tensor, settings: Settings, *tensors: Tensor | None
    ) -> Tensor:
        result, weights = _finish(found, output, settings)
        ctx.settings, ctx.length = settings, found.shape[1]
        ctx.save_for_backward(weights, joined, *tensors)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        settings, gradient = ctx.settings, gradients[0]
        weights, joined, *tensors = ctx.saved_tensors
        query = _queries(joined, settings)
        of_found = gradient.new_zeros(len(gradient), ctx.length, gradient.shape[2], settings.width)
        of_text, width = of_found[:, settings.lead :], settings.widths[1]
        of_text[..., :width] = gradient
        with without_autocast(query):
            for number, blocks in enumerate(_blocks(settings, tensors, query)):
                of_text[..., width + number] = blocks.output_times(gradient)
        of_output = torch.stack([gradient * weights[..., number, None] for number in range(weights.shape[-1])])
        return of_found, of_output.to(query.dtype), None, None, *[None for _ in tensors]


def _queries(joined: Tensor, settings: Settings) -> Tensor:
    return joined[:, :, settings.lead :, : settings.widths[0]]


def _blocks(settings: Settings, tensors: Any, query: Tensor) -> list[SlotBlocks]:
    found = []
    for number, (slots, rotate) in enumerate(zip(settings.slots, settings.rotations, strict=True)):
        key, value, log_gates, bias, cos, sin, *order = tensors[PER_PART * number : PER_PART * (number + 1)]
        turn = None if rotate is None else Turn(cos, sin, rotate)
        part = ChosenSlots(key, value, log_gates, log_gates, slots, bias, turn)
        found.append(SlotBlocks(part, Order(*order), query, settings.scale, settings.cap))
    return found


def _with_features(query: Tensor, scores: list[Tensor], settings: Settings) -> Tensor:
    """Queries (B, Hq, lead + T, width) with each column's score (B, T, Hq) as a coarse and a fine feature."""
    batch, heads, length, width = query.shape
    # Memory layout as from projections: the heads of one token lie together.
    joined = query.new_zeros(batch, settings.lead + length, heads, settings.width)
    text = joined[:, settings.lead :]
    text[..., :width] = query.transpose(1, 2)
    for number, score in enumerate(scores):
        value = (score / settings.scale).clamp(LEAST, settings.most)
        coarse = value.to(torch.bfloat16).to(value.dtype)
        text[..., width + HALVES * number] = coarse.to(query.dtype)
        text[..., width + HALVES * number + 1] = (value - coarse).to(query.dtype)
    return joined.transpose(1, 2)


def _score_of_features(gradient: Tensor, joined: Tensor, number: int, settings: Settings) -> Tensor:
    """Gradient of a column's score, (B, T, Hq). Both of its features have it; a clipped score has none."""
    place = settings.widths[0] + HALVES * number
    value = joined[:, :, settings.lead :, place]
    inside = (value > LEAST) & (value < settings.most)
    return (gradient[:, :, settings.lead :, place] * inside / settings.scale).transpose(1, 2)
