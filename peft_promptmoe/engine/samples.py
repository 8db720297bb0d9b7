# SPDX-License-Identifier: Apache-2.0
"""Batches with several adapters: split a layer's input by adapter, and join the results.

An adapter's rows are computed from its own samples only. They become columns for all samples, but the mask hides them
from the others. So the output for a sample is the same as in a separate batch.
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
CLOSED = -1e30  # log-gate with zero weight; minus infinity could give NaN


def of_samples(names: tuple[str, ...], batch: int) -> list[str]:
    """The adapter name of each sample of a batch."""
    if not names or batch % len(names):
        raise ValueError(
            f"adapter_names has {len(names)} names, but this batch has {batch} samples. Pass one name per sample."
        )
    return [name for name in names for _ in range(batch // len(names))]


def samples_by_adapter(names: tuple[str, ...], batch: int, device: torch.device) -> dict[str, Tensor]:
    """For each adapter, the numbers of its samples."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(of_samples(names, batch)):
        found.setdefault(name, []).append(number)
    return {name: torch.tensor(numbers, device=device) for name, numbers in found.items() if name != BASE}


class Given(NamedTuple):
    """The inputs of an attention layer in one call.

    Attributes:
        x: (B, T, D) input before the block's norm.
        real: (B, T) which tokens are not padding. None: all.
        bound: arguments by name.
        call: call of the base model's forward pass.
    """

    x: Tensor
    real: Tensor | None
    bound: dict[str, Any]
    call: PromptCall | None

    def of(self, index: Tensor) -> Given:
        """The inputs of some samples."""
        batch, call = self.x.shape[0], None
        if self.call is not None:
            call = copy.copy(self.call)
            call.query = _narrow(call.query, index, batch)
            if call.given is not None:
                call.given = GivenQuery(_narrow(call.given.tokens, index, batch))
        bound = {name: _narrow(value, index, batch) for name, value in self.bound.items()}
        return Given(self.x[index], _narrow(self.real, index, batch), bound, call)


def _narrow(value: Any, index: Tensor, batch: int) -> Any:
    """The value for some samples. Values without a batch dimension stay unchanged."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch > 1 else value
    if isinstance(value, (tuple, list)) and all(isinstance(part, Tensor) for part in value):
        return type(value)(_narrow(part, index, batch) for part in value)
    return value


def spread_rows(rows: Rows, index: Tensor, batch: int) -> Rows:
    """Rows of some samples as rows of the whole batch. The other samples get zeros and do not see them."""
    return rows.changed(lambda part: part.new_zeros(batch, *part.shape[1:]).index_copy(0, index, part))


def spread_choice(choice: Chosen | None, index: Tensor, batch: int) -> Chosen | None:
    """Choices of some samples as choices of the whole batch. The other samples choose with zero weight."""
    if choice is None:
        return None
    gates, experts = choice.log_gates, choice.experts
    none = gates.new_full((batch, *gates.shape[1:]), CLOSED)
    first = experts.new_zeros(batch, *experts.shape[1:])
    return Chosen(none.index_copy(0, index, gates), first.index_copy(0, index, experts), choice.of)


def close_to_others(columns: Columns, index: Tensor, batch: int, tokens: int) -> None:
    """Hide an adapter's columns from the samples of other adapters."""
    for number, slots in enumerate(columns.slots):
        if slots.key.shape[2] == 0:
            continue
        closed = slots.key.new_full((batch, 1, 1), -torch.inf).index_fill(0, index, 0.0)
        gates = closed.expand(-1, tokens, slots.key.shape[2])
        columns.slots[number] = Slots(slots.key, slots.value, gates if slots.gates is None else slots.gates + gates)


def merge_choices(parts: list[ChosenSlots]) -> list[ChosenSlots]:
    """Merge the choices of several adapters, of which each sample uses one, into one table of experts.

    The cost is then that of one adapter. Only adapters with equal shapes are merged.
    """
    alike: dict[tuple[Any, ...], list[ChosenSlots]] = {}
    for part in parts:
        kind = (part.slots, part.experts.shape[-1], part.turn is None, None if part.bias is None else part.bias.shape)
        alike.setdefault(kind, []).append(part)
    return [_merged(group) for group in alike.values()]


def _merged(parts: list[ChosenSlots]) -> ChosenSlots:
    """One table of all adapters' experts. For each sample, only the choice of its own adapter has weight."""
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
