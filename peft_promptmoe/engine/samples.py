# SPDX-License-Identifier: Apache-2.0
"""Batches with several adapters: split a layer's input by adapter, and join the results.

An adapter's rows are made of its own samples alone. They become columns of all samples, closed to those of others, so
what a sample gets is what it would get in a batch of its own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing.prompt_call import GivenQuery, PromptCall
from ..routing.record import Chosen
from .chosen_slots import ChosenSlots
from .columns import Columns, Slots
from .rows import Rows

BASE = "__base__"  # PEFT's name for samples without an adapter
CLOSED = -1e30  # a log-gate that weighs nothing; minus infinity minus itself would be no number


def of_samples(names: tuple[str, ...], batch: int) -> list[str]:
    """The name of each sample of a batch."""
    if not names or batch % len(names):
        raise ValueError(f"adapter_names has {len(names)} names, and this batch has {batch} samples.")
    return [name for name in names for _ in range(batch // len(names))]


def samples_by_adapter(names: tuple[str, ...], batch: int, device: torch.device) -> dict[str, Tensor]:
    """Numbers of the samples of each adapter."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(of_samples(names, batch)):
        found.setdefault(name, []).append(number)
    return {name: torch.tensor(numbers, device=device) for name, numbers in found.items() if name != BASE}


class Given(NamedTuple):
    """What an attention layer is given in one call.

    Attributes:
        x: (B, T, D) its input, before the block's norm.
        real: (B, T) which tokens are no padding; None for all.
        bound: its arguments by name.
        call: what the model's forward tells its layers.
    """

    x: Tensor
    real: Tensor | None
    bound: dict[str, Any]
    call: PromptCall | None

    def of(self, index: Tensor) -> Given:
        """The part of some samples."""
        batch, call = self.x.shape[0], None
        if self.call is not None:
            call = copy.copy(self.call)
            call.query = _narrow(call.query, index, batch)
            if call.given is not None:
                call.given = GivenQuery(_narrow(call.given.tokens, index, batch))
        bound = {name: _narrow(value, index, batch) for name, value in self.bound.items()}
        return Given(self.x[index], _narrow(self.real, index, batch), bound, call)


def _narrow(value: Any, index: Tensor, batch: int) -> Any:
    """Some samples of a value; what is the same for all stays."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch > 1 else value
    if isinstance(value, (tuple, list)) and all(isinstance(part, Tensor) for part in value):
        return type(value)(_narrow(part, index, batch) for part in value)
    return value


def spread_rows(rows: Rows, index: Tensor, batch: int) -> Rows:
    """Rows of some samples among those of the whole batch; the others' are nothing, and closed to them."""
    return rows.changed(lambda part: part.new_zeros(batch, *part.shape[1:]).index_copy(0, index, part))


def spread_choice(choice: Chosen | None, index: Tensor, batch: int) -> Chosen | None:
    """A choice of some samples' tokens among those of the whole batch, in which the others choose nothing."""
    if choice is None:
        return None
    gates, experts = choice.log_gates, choice.experts
    none = gates.new_full((batch, *gates.shape[1:]), CLOSED)
    first = experts.new_zeros(batch, *experts.shape[1:])
    return Chosen(none.index_copy(0, index, gates), first.index_copy(0, index, experts), choice.of)


def close_to_others(columns: Columns, index: Tensor, batch: int, tokens: int) -> None:
    """Close an adapter's columns to all samples but its own."""
    for number, slots in enumerate(columns.slots):
        if slots.key.shape[2] == 0:
            continue
        closed = slots.key.new_full((batch, 1, 1), -torch.inf).index_fill(0, index, 0.0)
        gates = closed.expand(-1, tokens, slots.key.shape[2])
        columns.slots[number] = Slots(slots.key, slots.value, gates if slots.gates is None else slots.gates + gates)


def merge_choices(parts: list[ChosenSlots]) -> list[ChosenSlots]:
    """The choices of adapters of which each sample has one, as few choices among the experts of several.

    What is attended apart then costs as much as with one adapter. Only adapters of like shapes go together.
    """
    alike: dict[tuple[Any, ...], list[ChosenSlots]] = {}
    for part in parts:
        kind = (part.slots, part.experts.shape[-1], part.turn is None, None if part.bias is None else part.bias.shape)
        alike.setdefault(kind, []).append(part)
    return [_merged(group) for group in alike.values()]


def _merged(parts: list[ChosenSlots]) -> ChosenSlots:
    """One table of all adapters' experts; a sample's own choice is the one that weighs anything."""
    first, batch = parts[0], max(part.key.shape[0] for part in parts)
    log_gates, experts, before = first.log_gates, first.experts, first.key.shape[2] // first.slots
    for part in parts[1:]:
        theirs = part.log_gates > log_gates
        experts = torch.where(theirs, part.experts + before, experts)
        log_gates = torch.maximum(part.log_gates, log_gates)
        before += part.key.shape[2] // part.slots
    key, value = (
        torch.cat([rows.expand(batch, -1, -1, -1) for rows in tables], dim=2)
        for tables in ([part.key for part in parts], [part.value for part in parts])
    )
    return replace(first, key=key, value=value, log_gates=log_gates, experts=experts)
