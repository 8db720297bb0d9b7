# SPDX-License-Identifier: Apache-2.0
"""Attention of tokens to the slots of their chosen experts, in blocks by expert.

Letters as in `blocks`, and: `B` batch, `T` tokens of a sample, N = B * T, `v` width of a head's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..routing.router import routing_dtype
from .blocks import Heads, Order, group_for, rows_for_blocks, rows_for_choices, rows_of_blocks, sum_of_blocks

Rotate = Callable[..., tuple[Tensor, Tensor]]


class Turn(NamedTuple):
    """A rotary embedding: cosines and sines, each (1 or B, T or 1, r), and the model's function that applies them."""

    cos: Tensor
    sin: Tensor
    rotate: Rotate

    def there(self, rows: Tensor) -> Tensor:
        """Rotate rows (B, heads, T, d) by the angle."""
        return self._by(self.sin, rows)

    def back(self, rows: Tensor) -> Tensor:
        """Rotate rows by the opposite angle, the transpose of `there`."""
        return self._by(-self.sin, rows)

    def _by(self, sin: Tensor, rows: Tensor) -> Tensor:
        # The function needs queries and keys; the keys here have no head.
        return self.rotate(rows, rows[:, :0], self.cos.to(rows.dtype), sin.to(rows.dtype))[0]


@dataclass
class ChosenSlots:
    """The experts' slots of one adapter in one attention call, and which of them every token chose.

    Attributes:
        key: (1 or B, H, E * P, d) keys, expert by expert, with rotary positions except for what `turn` says.
        value: (1 or B, H, E * P, v) values.
        log_gates: (B, T, K) log-gates.
        experts: (B, T, K) chosen experts.
        slots: slots per expert P.
        bias: (1 or B, Hq, T, P) relative position bias, the same for all experts, in models that have one.
        turn: rotation to the start of each sample, (1 or B, 1, r). Queries are rotated back by it, so that keys need
            not be rotated for each sample. None: keys have their full positions.
    """

    key: Tensor
    value: Tensor
    log_gates: Tensor
    experts: Tensor
    slots: int
    bias: Tensor | None = None
    turn: Turn | None = None


class SlotBlocks:
    """The queries of one call in blocks with the slots of their experts, and the attention weights of these slots.

    Args:
        part: the slots. Its `experts` are not used.
        order: the place of every choice in the blocks.
        query: (B, Hq, T, d) queries.
        scale: factor of the scores.
        cap: scores become cap * tanh(score / cap). None: no cap.
    """

    def __init__(self, part: ChosenSlots, order: Order, query: Tensor, scale: float, cap: float | None) -> None:
        self.part, self.order, self.scale, self.dtype = part, order, scale, routing_dtype(query)
        self.heads = Heads(part.key.shape[1], query.shape[1] // part.key.shape[1])
        self.shape, self.active, self.number = part.log_gates.shape[:2], part.log_gates.shape[2], len(order.group)
        # Index tensors are built once, because many small operations slow a GPU down.
        choice = order.source.clamp(min=0)
        self.token = choice // self.active if self.active > 1 else choice
        self.from_tokens = rows_for_blocks(self.token, self.heads, self.number)
        several = self.active > 1
        self.from_choices = rows_for_blocks(choice, self.heads, self.number) if several else self.from_tokens
        self.to_choices = rows_for_choices(order, self.heads)
        self.query = self._of_tokens((query if part.turn is None else part.turn.back(query)).transpose(1, 2))
        self.key, self.value = self._slots(part.key), self._slots(part.value)
        scores = torch.bmm(self.query, self.key.transpose(1, 2)) * scale
        self.slope: Tensor | None = None
        if cap is not None:
            squashed = torch.tanh(scores / cap)
            self.slope, scores = 1 - squashed.square(), squashed * cap
        if part.bias is not None:
            # (T or B * T, Hq, P)
            index = self.token % self.shape[1] if part.bias.shape[0] == 1 else self.token
            scores = scores + self._blocked(
                part.bias.transpose(1, 2).flatten(0, 1), rows_for_blocks(index, self.heads, self.number)
            )
        self.scores, self.weights = scores, torch.softmax(scores, dim=-1)

    # -- between tokens, choices and blocks ---------------------------------------------------------------------------

    def _blocked(self, rows: Tensor, index: Tensor) -> Tensor:
        """(M * H, C * g, w) of rows (R, Hq, w)."""
        found = rows.reshape(-1, rows.shape[-1]).index_select(0, index)
        return found.view(self.number * self.heads.groups, -1, rows.shape[-1]).to(self.dtype)

    def _of_tokens(self, by_token: Tensor) -> Tensor:
        """(M * H, C * g, w) of (B, T, Hq, w)."""
        return self._blocked(by_token, self.from_tokens)

    def _of_choices(self, by_choice: Tensor) -> Tensor:
        """(M * H, C * g, 1) of (N, K, Hq)."""
        return self._blocked(by_choice[..., None], self.from_choices)

    def _choices(self, blocked: Tensor) -> Tensor:
        """(N, K, Hq, w) of (M * H, C * g, w)."""
        found = blocked.reshape(-1, blocked.shape[-1]).index_select(0, self.to_choices)
        return found.view(-1, self.active, self.heads.number, blocked.shape[-1])

    def _sum(self, choices: Tensor) -> Tensor:
        """(N, ...) of (N, K, ...)."""
        return choices[:, 0] if self.active == 1 else choices.sum(dim=1)

    def _slots(self, rows: Tensor) -> Tensor:
        group = group_for(rows, self.part.key, self.order.group, self.part.slots)
        return rows_of_blocks(rows, group, self.part.slots).to(self.dtype)

    def _sum_of_slots(self, blocked: Tensor, like: Tensor) -> Tensor:
        group = group_for(like, self.part.key, self.order.group, self.part.slots)
        return sum_of_blocks(blocked, group, like, self.part.slots).to(like.dtype)

    # -- forward ------------------------------------------------------------------------------------------------------

    def _scores(self) -> Tensor:
        """Log-sum-exp of the scores of each choice, (N, K, Hq), including its log-gate."""
        # From the best slot, whose weight is at least 1 / P.
        log_sum = self.scores.amax(dim=-1, keepdim=True) - self.weights.amax(dim=-1, keepdim=True).log()
        return self._choices(log_sum)[..., 0] + self.part.log_gates.flatten(0, 1)[..., None].to(self.dtype)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Score (B, T, Hq) and output (B, T, Hq, v) of all choices of a token together."""
        scores, output = self._scores(), self._choices(torch.bmm(self.weights, self.value))
        if self.active == 1:
            return scores[:, 0].unflatten(0, self.shape), output[:, 0].unflatten(0, self.shape)
        score = scores.logsumexp(dim=1)
        output = (torch.exp(scores - score[:, None])[..., None] * output).sum(dim=1)
        return score.unflatten(0, self.shape), output.unflatten(0, self.shape)

    # -- backward -----------------------------------------------------------------------------------------------------

    def _inner(self, of_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the output (B, T, Hq, v) in blocks, gradients of the weights for a single choice, and for each
        row the product of output and gradient."""
        output = self._of_tokens(of_output)
        of_weights = torch.bmm(output, self.value.transpose(1, 2))
        return output, of_weights, (self.weights * of_weights).sum(dim=-1, keepdim=True)

    def output_times(self, of_output: Tensor) -> Tensor:
        """Dot products (B, T, Hq) of the output with a tensor (B, T, Hq, v)."""
        inner = self._choices(self._inner(of_output)[2])[..., 0]
        if self.active > 1:
            inner = torch.softmax(self._scores(), dim=1) * inner
        return self._sum(inner).unflatten(0, self.shape)

    def gradients(self, of_score: Tensor, of_output: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, log-gates and bias.

        Args:
            of_score: (B, T, Hq) gradient of the score.
            of_output: (B, T, Hq, v) gradient of the output.
            needed: whether the gradients of key, value, log-gates and bias are needed.
        """
        part = self.part
        score = of_score.flatten(0, 1)[:, None].to(self.dtype)
        output, of_weights, inner = self._inner(of_output)
        of_slots, weights = of_weights - inner, self.weights
        if self.active > 1:
            share, inner = torch.softmax(self._scores(), dim=1), self._choices(inner)[..., 0]
            score = share * (score + inner - (share * inner).sum(dim=1, keepdim=True))
            blocked_share = self._of_choices(share)
            of_slots, output = of_slots * blocked_share, output * blocked_share
        # Padded rows get no gradient.
        filled = (self.order.source >= 0).to(self.dtype).view(self.number, 1, -1, 1)
        filled = filled.expand(-1, self.heads.groups, -1, self.heads.each).reshape(len(weights), -1, 1)
        weights = weights * filled
        of_slots = weights * (of_slots + self._of_choices(score))
        of_bias = self._of_bias(of_slots, part.bias) if needed[3] and part.bias is not None else None
        of_products = of_slots * self.scale if self.slope is None else of_slots * self.slope * self.scale
        of_query = self._sum(self._choices(torch.bmm(of_products, self.key))).unflatten(0, self.shape)
        of_query = of_query.transpose(1, 2)
        of_query = of_query if part.turn is None else part.turn.there(of_query)
        of_key = of_value = of_log_gates = None
        if needed[0]:
            of_key = self._sum_of_slots(torch.bmm(of_products.transpose(1, 2), self.query), part.key)
        if needed[1]:
            of_value = self._sum_of_slots(torch.bmm(weights.transpose(1, 2), output), part.value)
        if needed[2]:
            of_log_gates = score.sum(dim=-1).view(part.log_gates.shape).to(part.log_gates.dtype)
        return of_query, of_key, of_value, of_log_gates, of_bias

    def _of_bias(self, of_slots: Tensor, bias: Tensor) -> Tensor:
        found = self._sum(self._choices(of_slots)).unflatten(0, self.shape).transpose(1, 2)
        found = found if bias.shape[0] > 1 else found.sum(dim=0, keepdim=True)
        return found.to(bias.dtype)
