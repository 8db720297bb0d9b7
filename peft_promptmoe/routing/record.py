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
        log_gates: (B, T, K), best first.
        experts: (B, T, K).
        of: number of experts, E.
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
        gates: log-gates (B, E) of samples, or what was chosen for every token.
        real: (B, T) which tokens are real; None for all. Of no meaning to sample routing.
        training: whether the layer was in training mode.
    """

    gates: Tensor | Chosen
    real: Tensor | None
    training: bool

    def __len__(self) -> int:
        """B."""
        return len(self.gates if isinstance(self.gates, Tensor) else self.gates.experts)

    @property
    def by_token(self) -> bool:
        """Whether every token has chosen for itself."""
        return not isinstance(self.gates, Tensor)

    @property
    def log_gates(self) -> Tensor:
        """(B, E) or (B, T, E), minus infinity for experts that were not chosen."""
        if isinstance(self.gates, Tensor):
            return self.gates
        return spread_gates(self.gates.log_gates, self.gates.experts, self.gates.of)


@dataclass
class Assignment:
    """Which prototypes the patches of a forward were assigned to.

    Attributes:
        similarity: (B, N, K) cosines of patches and prototypes.
        prototypes: (B, K, d).
        grid: rows and columns of the patches; None where they are not known.
    """

    similarity: Tensor
    prototypes: Tensor
    grid: tuple[int, int] | None


def joined(records: list[RoutingRecord]) -> list[RoutingRecord]:
    """The records of the steps of one generation, as one if they are of the same samples.

    Small tensors take a lot of memory on a GPU, and a long generation has one for each token and layer.
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


# Called with the path of the attention layer, the adapter and the record.
Observer = Callable[[str, str, RoutingRecord], None]
