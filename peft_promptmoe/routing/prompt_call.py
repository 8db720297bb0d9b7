# SPDX-License-Identifier: Apache-2.0
"""What one forward of the base model tells its prompt layers."""

from __future__ import annotations

from torch import Tensor


class PromptCall:
    """What one forward of the base model tells its prompt layers; it travels through the model's keyword arguments.

    So it is there again when a checkpointed block is recomputed, in whatever thread, and two forwards never share one.

    Attributes:
        query: (B, T) the tokens that routers of a causal language model may read; None for all real ones.
        balance: detached balance values of the layers, by layer.
        loss_gradient: gradient of the model's loss, known once its backward pass has begun.
        terms: balance terms with their graph, for compiled code (see `add_balance_loss`).
        centers: router centres as this forward's first pass saw them, by layer and adapter.
    """

    def __init__(self, query: Tensor | None = None) -> None:
        self.query = query
        self.balance: dict[tuple[str, str], Tensor] = {}
        self.loss_gradient: Tensor | None = None
        self.terms: list[Tensor] = []
        self.centers: dict[tuple[str, str], Tensor] = {}
