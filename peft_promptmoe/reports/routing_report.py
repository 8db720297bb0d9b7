# SPDX-License-Identifier: Apache-2.0
"""What the routers chose: as a table, as pictures, and over a data set.

Letters: `L` prompted layers, `E` experts, `C` classes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..adapter_state import SharedLayer
from ..engine.model_hooks import prompt_layers
from ..engine.prompt_layer import PromptLayer
from ..routing.record import RoutingRecord

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class RoutingReport:
    """Load, gate and entropy of the experts of every layer.

    Attributes:
        layers: numbers of the layers, length L.
        load: (L, E) share of all choices that fell on an expert; rows sum to 1.
        gate: (L, E) mean gate of an expert, zero where it was not chosen.
        entropy: (L,) entropy of the load as a share of its maximum: 1 is perfect balance, 0 one expert for everything.
    """

    layers: list[int]
    load: Tensor
    gate: Tensor
    entropy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.entropy = normalized_entropy(self.load)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and expert: layer, expert, load, gate, entropy (of the layer)."""
        import pandas as pd

        experts = self.load.shape[1]
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(experts)],
                "expert": list(range(experts)) * len(self.layers),
                "load": self.load.flatten().tolist(),
                "gate": self.gate.flatten().tolist(),
                "entropy": self.entropy.repeat_interleave(experts).tolist(),
            }
        )

    def __str__(self) -> str:
        head = "layer  entropy  load of experts"
        rows = [
            f"{layer:5d}  {entropy:7.3f}  " + "  ".join(f"{share:.3f}" for share in load)
            for layer, entropy, load in zip(self.layers, self.entropy.tolist(), self.load.tolist(), strict=True)
        ]
        return "\n".join([head, *rows])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a heat map of the load, layers by experts, to an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.5 + 0.6 * self.load.shape[1], 1.8 + 0.35 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.load.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_xticks(range(self.load.shape[1]))
        axes.set_yticks(
            range(len(self.layers)), [f"{n}  (H {h:.2f})" for n, h in zip(self.layers, self.entropy, strict=True)]
        )
        axes.set_xlabel("expert")
        axes.set_ylabel("layer  (load entropy)")
        figure.colorbar(image, label="share of choices")
        figure.savefig(path, dpi=150)


def normalized_entropy(load: Tensor) -> Tensor:
    """Entropy over the last axis as a share of its maximum; (..., E) to (...)."""
    return torch.special.entr(load).sum(dim=-1) / math.log(load.shape[-1])


def tally(record: RoutingRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over one record per sample: choices (B, E), gates (B, E) and the number of routed inputs (B,).

    A choice of K experts counts 1/K for each, so that an input counts once; padding counts nothing.
    """
    gates = record.log_gates.float().exp()
    chosen = torch.isfinite(record.log_gates).float()
    chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    if gates.ndim == 2:
        return chosen, gates, torch.ones(gates.shape[0], device=gates.device)
    real = record.real.float() if record.real is not None else torch.ones(gates.shape[:2], device=gates.device)
    weight = real[..., None]
    return (chosen * weight).sum(dim=1), (gates * weight).sum(dim=1), real.sum(dim=1)


def find_routed(model: nn.Module, adapter: str | None) -> list[tuple[PromptLayer, str]]:
    """The prompt layers that have a router, with the adapter asked for (by default the first active one)."""
    found = []
    for layer in prompt_layers(model):
        names = [adapter] if adapter is not None else layer.active_adapters[:1]
        found += [(layer, name) for name in names if name in layer.prompt_config and layer.has_router(name)]
    return found


def routed_layers(model: nn.Module, adapter: str | None) -> list[tuple[PromptLayer, str]]:
    """As `find_routed`.

    Raises:
        ValueError: there is none.
    """
    found = find_routed(model, adapter)
    if not found:
        raise ValueError(
            "The model has no prompt layer with a router"
            + (f" for adapter {adapter!r}" if adapter is not None else "")
            + ": nothing is routed without an adapter of peft_promptmoe, or with num_experts=1."
        )
    return found


def routing_report(model: nn.Module, adapter: str | None = None) -> RoutingReport:
    """Report of the last forward pass.

    Args:
        model: a model with an adapter of this package.
        adapter: which adapter; by default the first active one.

    Raises:
        ValueError: nothing is routed, or there has been no forward yet.
    """
    for shared in model.modules():
        if isinstance(shared, SharedLayer):
            names = [adapter] if adapter is not None else shared.active_adapters[:1]
            own = [shared.report(name) for name in names if name in shared.prompt_config]
            if own and own[0] is not None:
                return own[0]
    loads, gates, numbers = [], [], []
    for layer, name in routed_layers(model, adapter):
        record = layer.last_routing.get(name)
        if record is None:
            raise ValueError("No forward pass has been routed yet; run the model once before asking for a report.")
        chosen, gate, count = (part.sum(dim=0).cpu() for part in tally(record))
        loads.append(chosen / count.clamp(min=1.0))
        gates.append(gate / count.clamp(min=1.0))
        numbers.append(layer.site.index)
    return RoutingReport(numbers, torch.stack(loads), torch.stack(gates))
