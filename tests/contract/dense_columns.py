# SPDX-License-Identifier: Apache-2.0
"""Token routing in its plain form: every expert's rows are columns, closed to tokens that did not choose them."""

from __future__ import annotations

import pytest
import torch

from peft_promptmoe.engine import key_value
from peft_promptmoe.engine.columns import Columns, Rows
from peft_promptmoe.routing.record import Chosen
from peft_promptmoe.routing.router import spread_gates


def dense_columns_of(rows: Rows, choice: Chosen | None) -> Columns:
    """Columns of all rows, with gates added to their scores by the mask."""
    if choice is None or rows.experts is None:
        return Columns(rows.key, rows.value)
    experts = rows.experts
    key = experts.key
    if experts.turn is not None:
        key = experts.turn.there(key.expand(experts.turn.cos.shape[0], -1, -1, -1))
    batch = max(key.shape[0], rows.key.shape[0])
    gates = spread_gates(choice.log_gates, choice.experts, choice.of)
    return Columns(
        torch.cat([part.expand(batch, -1, -1, -1) for part in (key, rows.key)], dim=2),
        torch.cat([part.expand(batch, -1, -1, -1) for part in (experts.value, rows.value)], dim=2),
        gates=gates.repeat_interleave(experts.slots, dim=-1),
    )


def use_dense_columns(patch: pytest.MonkeyPatch) -> None:
    """Let key/value layers take the plain form."""
    patch.setattr(key_value, "columns_of", dense_columns_of)
