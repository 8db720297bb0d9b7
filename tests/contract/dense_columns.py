# SPDX-License-Identifier: Apache-2.0
"""Token routing in its plain form: every expert's rows are columns, closed to tokens that did not choose them."""

from __future__ import annotations

import pytest

from peft_promptmoe.engine import key_value
from peft_promptmoe.engine.columns import Columns, Slots
from peft_promptmoe.engine.rows import Rows
from peft_promptmoe.routing.record import Chosen
from peft_promptmoe.routing.router import spread_gates


def dense_columns_of(rows: Rows, choice: Chosen | None, gathers: bool = True) -> Columns:
    """Columns of all rows, with gates added to their scores by the mask."""
    if choice is None or rows.experts is None:
        return Columns([Slots(rows.key, rows.value)])
    experts = rows.experts
    key = experts.key
    if experts.turn is not None:
        key = experts.turn.there(key.expand(experts.turn.cos.shape[0], -1, -1, -1))
    gates = spread_gates(choice.log_gates, choice.experts, choice.of).repeat_interleave(experts.slots, dim=-1)
    return Columns([Slots(key, experts.value, gates), Slots(rows.key, rows.value)])


def use_dense_columns(patch: pytest.MonkeyPatch) -> None:
    """Let key/value layers take the plain form."""
    patch.setattr(key_value, "columns_of", dense_columns_of)
