# SPDX-License-Identifier: Apache-2.0
"""Routing recorded over many forward passes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.prompt_layer import PromptLayer
from ..routing.record import RoutingRecord
from .routing_report import RoutingReport, routed_layers, tally


class RoutingRecorder:
    """Routing summed over many forward passes, by class if the samples' classes are known.

    Args:
        layers: layers to record, with the adapter.
        labels: class of every sample in the order in which they will pass through the model; None for no classes.
    """

    def __init__(self, layers: list[tuple[PromptLayer, str]], labels: Sequence[Any] | None) -> None:
        self.layers = layers
        self.classes = sorted(set(labels)) if labels is not None else [None]
        self._label = [self.classes.index(label) for label in labels] if labels is not None else None
        self._sums: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}

    def observe(self, name: str, adapter: str, record: RoutingRecord) -> None:
        """Take one layer's record in; called by the layer. Training forwards do not count."""
        if record.training or (name, adapter) not in {(layer.site.name, own) for layer, own in self.layers}:
            return
        chosen, gates, count = (part.double().cpu() for part in tally(record))
        start = self._seen.get(name, 0)
        stop = self._seen[name] = start + chosen.shape[0]
        rows = torch.zeros(chosen.shape[0], dtype=torch.long)
        if self._label is not None:
            if stop > len(self._label):
                raise ValueError(
                    f"record_routing got {len(self._label)} labels and has now seen {stop} samples. Pass one label "
                    "for each sample that goes through the model, in order."
                )
            rows = torch.tensor(self._label[start:stop])
        if name not in self._sums:
            shape = (len(self.classes), chosen.shape[1])
            self._sums[name] = [
                torch.zeros(shape).double(),
                torch.zeros(shape).double(),
                torch.zeros(shape[0]).double(),
            ]
        for total, part in zip(self._sums[name], (chosen, gates, count), strict=True):
            total.index_add_(0, rows, part)

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self._sums:
            raise ValueError("No forward pass in evaluation mode was recorded; call model.eval() and run the data.")
        sums = [self._sums[layer.site.name] for layer, _ in self.layers]
        chosen, gates, count = (torch.stack(parts) for parts in zip(*sums, strict=True))
        return chosen, gates, count

    def report(self) -> RoutingReport:
        """Report over everything recorded."""
        chosen, gates, count = (part.sum(dim=1) for part in self._stacked())
        numbers = [layer.site.index for layer, _ in self.layers]
        count = count[:, None].clamp(min=1.0)
        return RoutingReport(numbers, (chosen / count).float(), (gates / count).float())

    def pathways(self) -> Tensor:
        """(C, L, E) share of each class's choices that fell on an expert."""
        chosen, _, count = self._stacked()
        return (chosen / count[..., None].clamp(min=1.0)).transpose(0, 1).float()

    def mutual_information(self) -> Tensor:
        """(L,) bits that the chosen expert tells about the class, every class weighing the same."""
        given = self.pathways().double()
        marginal = given.mean(dim=0)
        entropy = torch.special.entr(marginal).sum(dim=-1) - torch.special.entr(given).sum(dim=-1).mean(dim=0)
        return (entropy / math.log(2.0)).clamp(min=0.0).float()

    def plot_pathways(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of each class's way through the experts: a line over the layers along its favourites."""
        from matplotlib.figure import Figure

        ways = self.pathways()
        count, depth, experts = ways.shape
        figure = Figure(figsize=(2.0 + 0.7 * depth, 1.5 + 0.6 * experts), layout="constrained")
        axes = figure.subplots()
        for number, way in enumerate(ways):
            shift = (number - (count - 1) / 2) * 0.6 / max(count, 1)
            best = way.max(dim=-1)
            line = axes.plot(range(depth), (best.indices + shift).tolist(), label=str(self.classes[number]))[0]
            axes.scatter(
                range(depth), (best.indices + shift).tolist(), s=(120 * best.values).tolist(), color=line.get_color()
            )
        axes.set_xticks(range(depth), [str(layer.site.index) for layer, _ in self.layers])
        axes.set_yticks(range(experts))
        axes.set_ylim(-0.5, experts - 0.5)
        axes.set_xlabel("layer")
        axes.set_ylabel("favourite expert (dot: its share)")
        if self._label is not None:
            axes.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)


@contextmanager
def record_routing(
    model: nn.Module, labels: Sequence[Any] | Tensor | None = None, adapter: str | None = None
) -> Iterator[RoutingRecorder]:
    """Record the routing of all evaluation forwards within the block.

    Args:
        model: a model with an adapter of this package.
        labels: class of every sample, in the order in which they pass through the model, for pathways per class.
        adapter: which adapter; by default the first active one.
    """
    layers = routed_layers(model, adapter)
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    recorder = RoutingRecorder(layers, labels)
    for layer, _ in layers:
        layer.observers.append(recorder.observe)
    try:
        yield recorder
    finally:
        for layer, _ in layers:
            layer.observers.remove(recorder.observe)
