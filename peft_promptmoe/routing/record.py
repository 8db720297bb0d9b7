# SPDX-License-Identifier: Apache-2.0
"""Records of what routers chose in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .router import spread_gates


class Chosen(NamedTuple):
    """What a router chose for every token.

    Attributes:
        log_gates: (B, T, K) logarithms of the gates, best expert first.
        experts: (B, T, K) numbers of the chosen experts.
        of: number of experts E.
    """

    log_gates: Tensor
    experts: Tensor
    of: int

    def detach(self) -> Chosen:
        return Chosen(self.log_gates.detach(), self.experts, self.of) if self.log_gates.requires_grad else self


@dataclass
class RoutingRecord:
    """What one router chose in one forward pass.

    Attributes:
        gates: log-gates (B, E) per sample, or the choices of every token.
        real: (B, T) which tokens are real. None: all. Not used for sample routing.
        training: whether the layer was in training mode.
    """

    gates: Tensor | Chosen
    real: Tensor | None
    training: bool

    def __len__(self) -> int:
        """Batch size B."""
        return len(self.gates if isinstance(self.gates, Tensor) else self.gates.experts)

    @property
    def by_token(self) -> bool:
        """Whether experts were chosen per token."""
        return not isinstance(self.gates, Tensor)

    @property
    def log_gates(self) -> Tensor:
        """Log-gates (B, E) or (B, T, E), minus infinity for experts that were not chosen."""
        if isinstance(self.gates, Tensor):
            return self.gates
        return spread_gates(self.gates.log_gates, self.gates.experts, self.gates.of)


@dataclass
class Assignment:
    """Assignment of patches to prototypes in one forward pass.

    Attributes:
        similarity: (B, N, K) cosines of patches and prototypes.
        prototypes: (B, K, d) the prototypes.
        grid: (rows, columns) of the patches. None if unknown.
    """

    similarity: Tensor
    prototypes: Tensor
    grid: tuple[int, int] | None


def joined(records: list[RoutingRecord]) -> list[RoutingRecord]:
    """Join the records of a generation's steps into one, if they are of the same samples.

    A long generation has a record for each token and layer, and many small tensors need a lot of GPU memory.
    """
    gates = [record.gates for record in records if isinstance(record.gates, Chosen)]
    if len(gates) < len(records) or len({(part.log_gates.shape[0], part.of) for part in gates}) != 1:
        return records
    both = Chosen(
        torch.cat([part.log_gates for part in gates], 1), torch.cat([part.experts for part in gates], 1), gates[0].of
    )
    real = None
    if any(record.real is not None for record in records):
        real = torch.cat([_real(record) for record in records], 1)
    return [RoutingRecord(both, real, records[-1].training)]


def _real(record: RoutingRecord) -> Tensor:
    assert isinstance(record.gates, Chosen)
    shape = record.gates.experts.shape[:2]
    if record.real is None:
        return torch.ones(shape, dtype=torch.bool, device=record.gates.experts.device)
    return record.real.bool().expand(shape)


# Type of listeners: called with the path of the attention layer, the adapter and the record.
Observer = Callable[[str, str, RoutingRecord], None]
