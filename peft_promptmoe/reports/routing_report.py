# SPDX-License-Identifier: Apache-2.0
"""Report on what the routers chose, as a table and as a picture.

Letters: `L` prompted layers, `E` experts, `C` classes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter_state import SharedLayer
from ..engine.model_hooks import prompt_layers
from ..engine.prompt_layer import PromptLayer
from ..extras import extra
from ..routing.record import RoutingRecord
from .dispatch_report import DispatchReport
from .table import Share, html_table

if TYPE_CHECKING:
    import pandas as pd

    from .pictures import Picture


@dataclass
class RoutingReport:
    """Load, gates and load entropy of the experts of every layer.

    Attributes:
        layers: numbers of the layers, length L.
        load: (L, E) share of all choices that went to an expert. Rows sum to 1.
        gate: (L, E) mean gate of an expert over all inputs, counted as zero where it was not chosen.
        samples: for each layer, the number of samples counted.
        tokens: for each layer, the number of tokens counted. None for routing="sample".
        entropy: (L,) entropy of the load, relative to its maximum. 1: perfect balance. 0: one expert gets everything.
    """

    layers: list[int]
    load: Tensor
    gate: Tensor
    samples: list[int]
    tokens: list[int] | None
    entropy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.entropy = normalized_entropy(self.load)

    @property
    def over(self) -> str:
        """The number of samples and tokens that the figures are computed from, in words."""
        if self.tokens is None:
            return f"over {counted(self.samples, 'sample')}, each routed as a whole"
        return f"over {counted(self.tokens, 'token')} of {counted(self.samples, 'sample')}"

    def to_dataframe(self) -> pd.DataFrame:
        """Table, one row per layer and expert: layer, expert, load, gate; the layer's entropy, samples and tokens."""
        with extra("report", "to_dataframe()"):
            import pandas as pd

        experts = self.load.shape[1]
        tokens = self.tokens if self.tokens is not None else [None] * len(self.layers)
        return pd.DataFrame(
            {
                "layer": _each(self.layers, experts),
                "expert": list(range(experts)) * len(self.layers),
                "load": self.load.flatten().tolist(),
                "gate": self.gate.flatten().tolist(),
                "entropy": _each(self.entropy.tolist(), experts),
                "samples": _each(self.samples, experts),
                "tokens": _each(tokens, experts),
            }
        )

    def __str__(self) -> str:
        head = f"layer  entropy  load of experts, {self.over}"
        rows = [
            f"{layer:5d}  {entropy:7.3f}  " + "  ".join(f"{share:.3f}" for share in load)
            for layer, entropy, load in zip(self.layers, self.entropy.tolist(), self.load.tolist(), strict=True)
        ]
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        columns = ["layer", "entropy", *(f"expert {number}" for number in range(self.load.shape[1]))]
        figures = zip(self.layers, self.entropy.tolist(), self.load.tolist(), strict=True)
        rows = [[layer, entropy, *map(Share, load)] for layer, entropy, load in figures]
        return html_table(f"Expert load by layer, {self.over}", columns, rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """Draw a heat map of the load (layers by experts), with the entropy of each layer's load.

        Args:
            path: image file to write. None: no file. A notebook shows the returned picture.
        """
        with extra("report", "plot()"):
            from .pictures import draw_load, finish

        return finish(draw_load(self.layers, self.load, self.entropy, self.over), path)


def counted(numbers: list[int], noun: str) -> str:
    """Numbers in words: "12 tokens", or "9 to 12 tokens" if layers differ."""
    low, high = min(numbers), max(numbers)
    several = f"{low:,} to {high:,}" if low < high else f"{high:,}"
    return f"{several} {noun}{'' if high == 1 else 's'}"


def _each(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]


def normalized_entropy(load: Tensor) -> Tensor:
    """Entropy over the last axis, relative to its maximum: (..., E) to (...)."""
    return torch.special.entr(load).sum(dim=-1) / math.log(load.shape[-1])


def tally(record: RoutingRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample sums of one record: choices (B, E), gates (B, E) and the number of routed inputs (B,).

    Each of the K experts chosen for an input counts 1/K, so that every input counts once. Padding is not counted.
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
    """The prompt layers that have a router, each with the adapter's name (by default the first active adapter)."""
    found = []
    for layer in prompt_layers(model):
        names = [adapter] if adapter is not None else layer.active_adapters[:1]
        found += [(layer, name) for name in names if name in layer.prompt_config and layer.has_router(name)]
    return found


def routed_layers(model: nn.Module, adapter: str | None) -> list[tuple[PromptLayer, str]]:
    """Like `find_routed`, but with an error if there is none.

    Raises:
        ValueError: no layer has a router.
    """
    found = find_routed(model, adapter)
    if not found:
        raise ValueError(why_unrouted(model, adapter))
    return found


def why_unrouted(model: nn.Module, adapter: str | None) -> str:
    """The message that says why there is no router to report on."""
    layers = [layer for layer in prompt_layers(model) if layer.prompt_config]
    if not layers:
        return (
            f"{type(model).__name__} has no adapter of peft_promptmoe, so nothing is routed. Add one with "
            "get_peft_model(model, MEPTConfig(...))."
        )
    held = {name: layer for layer in layers for name in layer.prompt_config}
    if adapter is not None and adapter not in held:
        return f"The model has no adapter {adapter!r} of peft_promptmoe; it has {', '.join(map(repr, held))}."
    name = adapter if adapter is not None else next(iter(layers[0].active_adapters), None)
    if name is None or name not in held:
        return f"No adapter of peft_promptmoe is active. Name one of {', '.join(map(repr, held))}, or activate it."
    return f"The adapter {name!r} is one of {held[name].method}, which {held[name].unrouted}."


def routing_report(model: nn.Module, adapter: str | None = None) -> RoutingReport | DispatchReport:
    """Report what the routers chose in the last forward pass.

    After `generate` with a key/value cache the report covers the whole generation: the prompt and all generated tokens
    that the model has read. Compiled code keeps the last forward pass only. The report says how many tokens it counts.

    Args:
        model: a model with an adapter of this package.
        adapter: name of the adapter. None: the first active one.

    Returns:
        A [`RoutingReport`]. For pMoE, which has dispatchers instead of routers, a [`DispatchReport`].

    Raises:
        ValueError: the adapter has no router, or no forward pass was run yet.
    """
    for shared in model.modules():
        if isinstance(shared, SharedLayer):
            names = [adapter] if adapter is not None else shared.active_adapters[:1]
            own = [shared.report(name) for name in names if name in shared.prompt_config]
            if own and own[0] is not None:
                return own[0]
    found = routed_layers(model, adapter)
    records = [layer.last_routing.get(name, []) for layer, name in found]
    if not all(records):
        raise ValueError("No forward pass was routed yet. Run the model once before asking for a report.")
    loads, gates, samples, tokens = [], [], [], []
    for steps in records:
        parts = [[part.sum(dim=0).cpu() for part in tally(record)] for record in steps]
        chosen, gate, count = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
        loads.append(chosen / count.clamp(min=1.0))
        gates.append(gate / count.clamp(min=1.0))
        samples.append(len(steps[0]))
        tokens.append(int(count))
    by_token = records[0][0].by_token
    layers = [layer.site.index for layer, _ in found]
    return RoutingReport(layers, torch.stack(loads), torch.stack(gates), samples, tokens if by_token else None)
