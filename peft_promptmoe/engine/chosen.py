# SPDX-License-Identifier: Apache-2.0
"""Attention of every token over the slots of the experts it chose, at a cost that does not grow with their number.

Attention of a token over text, shared slots and its own experts' slots is one softmax. It is split here: the slots of
the chosen experts are attended apart, in products grouped by expert (`blocks`), which gives each head its output `o`
and the log of the summed exponentials of its scores, `l`. One further column stands for all of them in the attention
over everything else. Queries get features that hold l / scale, that column a 1 in these features, so its score is l;
values get a feature that is 1 in that column alone, so the kernel returns the column's weight w beside its output.
What all columns together would have given is output + w * o: exact, and differentiable by the stock fused kernel.

Letters, beside those of `blocks`: `B` batch, `T` tokens, N = B * T, `v` width of a head's values, `A` adapters whose
experts are chosen among in this layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Heads, Order, group_of, in_blocks, rows_of_blocks, sum_of_blocks, to_blocks, to_choices
from ..routing.router import routing_dtype, without_autocast

# Scores of the column that stands for the chosen experts, before the scale: what float16 can hold. Times any usual
# scale the exponential of the least is zero in float64, too.
LEAST, MOST_IN_FLOAT16 = -3e4, 6e4
HALVES = 2  # features for one score: in bfloat16 a single one would be off by half a percent of it
Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class ChosenSlots:
    """The experts' slots of one adapter in one attention call, and which of them every token chose.

    Attributes:
        key: (1 or B, H, E * P, d), expert by expert; turned by their positions as far as `turn` leaves that to them.
        value: (1 or B, H, E * P, v).
        log_gates: (B, T, K).
        experts: (B, T, K).
        slots: P.
        bias: (1 or B, Hq, T, P) relative position bias, alike for all experts, in models that have one.
        turn: by what queries are turned before they meet these keys, so that keys need not be turned by where each
            sample begins; None where they are.
    """

    key: Tensor
    value: Tensor
    log_gates: Tensor
    experts: Tensor
    slots: int
    bias: Tensor | None = None
    turn: Turn | None = None


class Turn(NamedTuple):
    """A rotation: cosines and sines, each (1 or B, 1, r), and the model's own function, which applies them."""

    cos: Tensor
    sin: Tensor
    rotate: Rotate

    def there(self, rows: Tensor) -> Tensor:
        """Rows (B, heads, T, d) turned by the angle."""
        return self._by(self.sin, rows)

    def back(self, rows: Tensor) -> Tensor:
        """Rows turned by the opposite angle, which is the transpose of `there`."""
        return self._by(-self.sin, rows)

    def _by(self, sin: Tensor, rows: Tensor) -> Tensor:
        # The function turns queries and keys; the keys are of no head here.
        return self.rotate(rows, rows[:, :0], self.cos.to(rows.dtype), sin.to(rows.dtype))[0]


class Joined(NamedTuple):
    """What `attend_chosen` gives.

    Attributes:
        query: (B, Hq, lead + T, width) with the features that hold the scores; the first `lead` are blank.
        score: (A, B, T, Hq) log-sum-exp of the scores of each adapter's chosen slots, log-gates included.
        output: (A, B, T, Hq, v) what each head reads of these slots.
    """

    query: Tensor
    score: Tensor
    output: Tensor


class Settings(NamedTuple):
    """What is no tensor in one call: see `attend_chosen`; `most` is the largest score that the kernel's dtype holds."""

    scale: float
    cap: float | None
    lead: int
    width: int
    most: float
    slots: tuple[int, ...]
    rotations: tuple[Rotate | None, ...]


def joined_width(query: int, value: int, adapters: int) -> int:
    """Width of queries, keys and values with the columns' features: a multiple of 8, which fused kernels take."""
    needed = max(query + HALVES * adapters, value + adapters)
    return needed + -needed % 8


def attend_chosen(
    query: Tensor, parts: list[ChosenSlots], scale: float, width: int, lead: int = 0, cap: float | None = None
) -> Joined:
    """Attend the chosen experts' slots apart, and write the scores of what was found into the queries.

    Args:
        query: (B, Hq, T, d).
        parts: one for each adapter.
        scale: factor of the scores.
        width: of the queries returned, see `joined_width`.
        lead: blank queries to put in front.
        cap: scores become cap * tanh(score / cap) before gates are added (Gemma 2); None leaves them.
    """
    slots, rotations = tuple(part.slots for part in parts), tuple(part.turn and part.turn.rotate for part in parts)
    settings = Settings(scale, cap, lead, width, _most(query), slots, rotations)
    tensors: list[Tensor | None] = []
    for part in parts:
        cos, sin = part.turn[:2] if part.turn is not None else (None, None)
        tensors += [part.key, part.value, part.log_gates, part.bias, part.experts, cos, sin]
    return Joined(*_AttendChosen.apply(query, settings, *tensors))


def _most(query: Tensor) -> float:
    dtype, kind = query.dtype, query.device.type
    if not query.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return MOST_IN_FLOAT16 if dtype == torch.float16 else torch.finfo(torch.bfloat16).max / 2


class _AttendChosen(torch.autograd.Function):
    """Keeps the queries that it returns, as the attention kernel does anyway, and computes scores anew."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        scores, outputs, orders = [], [], []
        with without_autocast(query):
            for part in _parts(settings, tensors):
                order = in_blocks(*group_of(part.experts, part.key, part.slots))
                blocks = _Blocks(settings, part, order, query)
                score, output = blocks.merged(part.log_gates)
                scores.append(score)
                outputs.append(output.to(query.dtype))
                orders += order
            joined = _with_features(query, scores, settings)
        ctx.settings, ctx.width = settings, query.shape[-1]
        ctx.save_for_backward(joined, *orders, *tensors)
        ctx.set_materialize_grads(False)
        return joined, torch.stack(scores), torch.stack(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        of_joined, of_score, of_output = gradients
        joined, *kept = ctx.saved_tensors
        query = joined[:, :, settings.lead :, : ctx.width]
        of_query = None if of_joined is None else of_joined[:, :, settings.lead :, : ctx.width]
        found: list[Tensor | None] = []
        with without_autocast(query):
            orders = kept[: 3 * len(settings.slots)]
            for number, part in enumerate(_parts(settings, kept[len(orders) :])):
                blocks = _Blocks(settings, part, Order(*orders[3 * number : 3 * number + 3]), query)
                score, needed = None, ctx.needs_input_grad[2 + PER_PART * number :]
                if of_joined is not None:
                    score = _score_of_features(of_joined, joined, number, ctx.width, settings)
                if of_score is not None:
                    score = of_score[number] if score is None else score + of_score[number]
                output = None if of_output is None else of_output[number]
                more, *of_part = blocks.gradients(part, score, output, needed)
                of_query = more if of_query is None else of_query + more
                found += [*of_part, None, None, None]
        assert of_query is not None
        return of_query.to(query.dtype), None, *found


PER_PART = 7  # tensors of one adapter: key, value, log-gates, bias, experts, cosines, sines


def _parts(settings: Settings, tensors: Any) -> Iterator[ChosenSlots]:
    for number, (slots, rotate) in enumerate(zip(settings.slots, settings.rotations, strict=True)):
        key, value, log_gates, bias, experts, cos, sin = tensors[PER_PART * number : PER_PART * (number + 1)]
        turn = None if rotate is None else Turn(cos, sin, rotate)
        yield ChosenSlots(key, value, log_gates, experts, slots, bias, turn)


def _with_features(query: Tensor, scores: list[Tensor], settings: Settings) -> Tensor:
    """(B, Hq, lead + T, width) queries and the scores (B, T, Hq) of the columns, each as a coarse and a fine half."""
    batch, heads, length, width = query.shape
    # Of the layout that projections give queries in, by which heads of one token lie together.
    joined = query.new_zeros(batch, settings.lead + length, heads, settings.width)
    text = joined[:, settings.lead :]
    text[..., :width] = query.transpose(1, 2)
    for number, score in enumerate(scores):
        value = (score / settings.scale).clamp(LEAST, settings.most)
        coarse = value.to(torch.bfloat16).to(value.dtype)
        text[..., width + HALVES * number] = coarse.to(query.dtype)
        text[..., width + HALVES * number + 1] = (value - coarse).to(query.dtype)
    return joined.transpose(1, 2)


def _score_of_features(gradient: Tensor, joined: Tensor, number: int, width: int, settings: Settings) -> Tensor:
    """(B, T, Hq) gradient of a column's score; both of its features have the same, and where it was cut it has none."""
    place = width + HALVES * number
    value = joined[:, :, settings.lead :, place]
    inside = (value > LEAST) & (value < settings.most)
    return (gradient[:, :, settings.lead :, place] * inside / settings.scale).transpose(1, 2)


class _Blocks:
    """Queries of one call in blocks beside their experts' rows, and the weights that they give these rows.

    Args:
        query: (B, Hq, T, d) before `part.turn`.
    """

    def __init__(self, settings: Settings, part: ChosenSlots, order: Order, query: Tensor) -> None:
        self.settings, self.order, self.dtype = settings, order, routing_dtype(query)
        self.heads = Heads(part.key.shape[1], query.shape[1] // part.key.shape[1])
        self.shape, self.active = (query.shape[0], query.shape[2]), part.experts.shape[-1]
        self.number = order.group.shape[0]
        self.filled = order.source >= 0
        self.choice = order.source.clamp(min=0)
        self.token = self.choice // self.active if self.active > 1 else self.choice
        turned = query if part.turn is None else part.turn.back(query)
        self.query = self._rows(turned.transpose(1, 2).flatten(0, 1))
        self.key = rows_of_blocks(part.key, order.group, part.slots).to(self.dtype)
        self.value = rows_of_blocks(part.value, order.group, part.slots).to(self.dtype)
        scores = torch.bmm(self.query, self.key.transpose(1, 2)) * settings.scale
        self.slope: Tensor | None = None
        if settings.cap is not None:
            scores = torch.tanh(scores / settings.cap)
            self.slope, scores = 1 - scores.square(), scores * settings.cap
        if part.bias is not None:
            bias = part.bias.transpose(1, 2).flatten(0, 1)  # (T or B * T, Hq, P)
            index = self.token % self.shape[1] if part.bias.shape[0] == 1 else self.token
            scores = scores + to_blocks(bias, index, self.heads, self.number).to(self.dtype)
        self.log_sum = scores.logsumexp(dim=-1, keepdim=True)
        self.weights = torch.exp(scores - self.log_sum)

    def _rows(self, by_token: Tensor) -> Tensor:
        return to_blocks(by_token, self.token, self.heads, self.number).to(self.dtype)

    def _choices(self, blocked: Tensor) -> Tensor:
        """(N, K, Hq, w) of (M * H, C * g, w)."""
        return to_choices(blocked, self.order, self.heads).unflatten(0, (-1, self.active))

    def _from_choices(self, by_choice: Tensor) -> Tensor:
        """(M * H, C * g, 1) of (N, K, Hq)."""
        return to_blocks(by_choice.flatten(0, 1)[..., None], self.choice, self.heads, self.number)

    def _scores(self, log_gates: Tensor) -> Tensor:
        """(N, K, Hq) log-sum-exp of the scores of each choice."""
        return self._choices(self.log_sum)[..., 0] + log_gates.flatten(0, 1)[..., None].to(self.dtype)

    def merged(self, log_gates: Tensor) -> tuple[Tensor, Tensor]:
        """Score (B, T, Hq) and output (B, T, Hq, v) of all choices of a token together."""
        scores, output = self._scores(log_gates), self._choices(torch.bmm(self.weights, self.value))
        if self.active == 1:
            score, output = scores[:, 0], output[:, 0]
        else:
            score = scores.logsumexp(dim=1)
            output = (torch.exp(scores - score[:, None])[..., None] * output).sum(dim=1)
        return score.unflatten(0, self.shape), output.unflatten(0, self.shape)

    def gradients(
        self, part: ChosenSlots, of_score: Tensor | None, of_output: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, log-gates and bias.

        Args:
            of_score: (B, T, Hq).
            of_output: (B, T, Hq, v).
            needed: of key, value, log-gates and bias, whether theirs is.
        """
        batch, length = self.shape
        tokens, heads = batch * length, self.heads.number
        score = self.log_sum.new_zeros(tokens, heads) if of_score is None else of_score.flatten(0, 1).to(self.dtype)
        if of_output is None:
            of_output = part.value.new_zeros(batch, length, heads, part.value.shape[-1])
        output = self._rows(of_output.flatten(0, 1))
        # Gradients of the weights, and by row what the output contributes: <of_output, output of this choice>.
        of_weights = torch.bmm(output, self.value.transpose(1, 2))
        inner = (self.weights * of_weights).sum(dim=-1, keepdim=True)
        if self.active == 1:
            of_scores = score[:, None]
            share = None
        else:
            scores, inner_of_choice = self._scores(part.log_gates), self._choices(inner)[..., 0]
            weight = torch.softmax(scores, dim=1)
            total = (weight * inner_of_choice).sum(dim=1, keepdim=True)
            of_scores = weight * (score[:, None] + inner_of_choice - total)
            share = self._from_choices(weight)
        weights = self.weights * self.filled.view(self.number, 1, -1, 1).expand(
            -1, self.heads.groups, -1, self.heads.each
        ).reshape(*self.weights.shape[:2], 1)
        inside = of_weights - inner if share is None else share * (of_weights - inner)
        of_slots = weights * (inside + self._from_choices(of_scores))
        of_bias = self._of_bias(of_slots, part.bias) if needed[3] and part.bias is not None else None
        of_raw = of_slots if self.slope is None else of_slots * self.slope
        of_raw = of_raw * self.settings.scale
        of_query = self._choices(torch.bmm(of_raw, self.key)).sum(dim=1).unflatten(0, self.shape).transpose(1, 2)
        of_query = of_query if part.turn is None else part.turn.there(of_query)
        of_key = of_value = of_log_gates = None
        if needed[0]:
            of_key = self._of_rows(torch.bmm(of_raw.transpose(1, 2), self.query), part.key, part.slots)
        if needed[1]:
            weights = weights if share is None else weights * share
            of_value = self._of_rows(torch.bmm(weights.transpose(1, 2), output), part.value, part.slots)
        if needed[2]:
            of_log_gates = of_scores.sum(dim=-1).view(part.log_gates.shape).to(part.log_gates.dtype)
        return of_query, of_key, of_value, of_log_gates, of_bias

    def _of_rows(self, blocked: Tensor, rows: Tensor, slots: int) -> Tensor:
        return sum_of_blocks(blocked, self.order.group, rows, slots).to(rows.dtype)

    def _of_bias(self, of_slots: Tensor, bias: Tensor) -> Tensor:
        found = self._choices(of_slots).sum(dim=1).unflatten(0, self.shape).transpose(1, 2)
        found = found if bias.shape[0] > 1 else found.sum(dim=0, keepdim=True)
        return found.to(bias.dtype)
