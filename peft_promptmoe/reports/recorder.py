# SPDX-License-Identifier: Apache-2.0
"""Recorder of routing over many forward passes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.prompt_layer import PromptLayer
from ..extras import extra
from ..routing.record import RoutingRecord
from .routing_report import RoutingReport, counted, routed_layers, tally

if TYPE_CHECKING:
    from .pictures import Picture

PANELS = 20  # most classes in a picture, unless they are named


class RoutingRecorder:
    """Sums of routing over many forward passes, by class if labels are given.

    Use [`record_routing`] to make one. Forward passes in training mode are not counted.

    Args:
        layers: the layers to record, each with the name of the adapter.
        labels: class of every sample, in the order in which samples go through the model. None: no classes.

    Attributes:
        classes: the classes, sorted, length C; `[None]` without labels.
    """

    def __init__(self, layers: list[tuple[PromptLayer, str]], labels: Sequence[Any] | None) -> None:
        self.layers = layers
        self.classes = sorted(set(labels)) if labels is not None else [None]
        self._label = [self.classes.index(label) for label in labels] if labels is not None else None
        self._sums: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._by_token = False

    def observe(self, name: str, adapter: str, record: RoutingRecord) -> None:
        """Add the record of one layer's forward pass. Called by the layer.

        Raises:
            ValueError: there are more samples than labels.
        """
        if record.training or (name, adapter) not in {(layer.site.name, own) for layer, own in self.layers}:
            return
        self._by_token = record.by_token
        chosen, gates, count = (part.double().cpu() for part in tally(record))
        start = self._seen.get(name, 0)
        stop = self._seen[name] = start + chosen.shape[0]
        rows = torch.zeros(chosen.shape[0], dtype=torch.long)
        if self._label is not None:
            if stop > len(self._label):
                raise ValueError(
                    f"record_routing got {len(self._label)} labels but {stop} samples. Pass one label per sample, in "
                    "the order in which samples go through the model."
                )
            rows = torch.tensor(self._label[start:stop])
        if name not in self._sums:
            table, column = (len(self.classes), chosen.shape[1]), (len(self.classes),)
            self._sums[name] = [torch.zeros(shape).double() for shape in (table, table, column, column)]
        for total, part in zip(self._sums[name], (chosen, gates, count, torch.ones_like(count)), strict=True):
            total.index_add_(0, rows, part)

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of choices and gates (L, C, E), and numbers of routed inputs and of samples (L, C)."""
        if not self._sums:
            raise ValueError(
                "No forward pass in evaluation mode was recorded. Call model.eval() and run the data in the block."
            )
        sums = [self._sums[layer.site.name] for layer, _ in self.layers]
        chosen, gates, count, samples = (torch.stack(parts) for parts in zip(*sums, strict=True))
        return chosen, gates, count, samples

    def report(self) -> RoutingReport:
        """Return the report over everything recorded."""
        chosen, gates, count, samples = (part.sum(dim=1) for part in self._stacked())
        tokens = count.long().tolist() if self._by_token else None
        count = count[:, None].clamp(min=1.0)
        load, gate = (chosen / count).float(), (gates / count).float()
        return RoutingReport(self._numbers(), load, gate, samples.long().tolist(), tokens)

    def pathways(self) -> Tensor:
        """Return the share of each class's choices that went to each expert, (C, L, E)."""
        chosen, _, count, _ = self._stacked()
        return (chosen / count[..., None].clamp(min=1.0)).transpose(0, 1).float()

    def mutual_information(self) -> Tensor:
        """Return the mutual information of expert and class in bits, (L,). Every class has the same weight."""
        given = self.pathways().double()
        marginal = given.mean(dim=0)
        entropy = torch.special.entr(marginal).sum(dim=-1) - torch.special.entr(given).sum(dim=-1).mean(dim=0)
        return (entropy / math.log(2.0)).clamp(min=0.0).float()

    def plot_pathways(
        self, path: str | os.PathLike[str] | None = None, classes: Sequence[Any] | None = None
    ) -> Picture:
        """Draw one heat map per class (layers by experts): the share of its choices that went to each expert.

        Args:
            path: image file to write. None: no file. A notebook shows the returned picture.
            classes: the classes to show. None: all, or the first 20 if there are more, which the title then says.

        Raises:
            ValueError: a class was not recorded, or nothing was recorded.
        """
        with extra("report", "plot_pathways()"):
            from .pictures import draw_pathways, finish

        shown = list(classes) if classes is not None else self.classes[:PANELS]
        if missing := [each for each in shown if each not in self.classes]:
            raise ValueError(f"classes={missing} were not recorded. The recorded classes are {self.classes}.")
        places = [self.classes.index(each) for each in shown]
        _, _, count, samples = self._stacked()
        counts = [self._over(count[:, place], samples[:, place]) for place in places]
        names = [str(each) if each is not None else "" for each in shown]
        some = "" if len(shown) == len(self.classes) else f" ({len(shown)} of {len(self.classes)} classes)"
        heading = f"Where each class is routed{some}" if self._label is not None else "Where samples are routed"
        return finish(draw_pathways(self._numbers(), self.pathways()[places], names, counts, heading), path)

    def _numbers(self) -> list[int]:
        return [layer.site.index for layer, _ in self.layers]

    def _over(self, count: Tensor, samples: Tensor) -> str:
        return counted((count if self._by_token else samples).long().tolist(), "token" if self._by_token else "sample")

    def __repr__(self) -> str:
        seen = max(self._seen.values(), default=0)
        return f"RoutingRecorder({len(self.layers)} layers, {len(self.classes)} classes, {seen} samples seen)"


@contextmanager
def record_routing(
    model: nn.Module, labels: Sequence[Any] | Tensor | None = None, adapter: str | None = None
) -> Iterator[RoutingRecorder]:
    """Record the routing of all forward passes in evaluation mode inside a `with` block.

    The block gets a [`RoutingRecorder`] with

    - `report()`: a [`RoutingReport`] over everything recorded (`to_dataframe()`, `plot()`),
    - `pathways()`: share of each class's choices that went to each expert, (C, L, E),
    - `mutual_information()`: mutual information of expert and class in bits, (L,),
    - `plot_pathways(path)`: the pathways as a picture,
    - `classes`: the classes, in the order of C.

    Args:
        model: a model with an adapter of this package.
        labels: class of every sample, in the order in which samples go through the model. None: no classes.
        adapter: name of the adapter. None: the first active one.

    Raises:
        ValueError: the adapter has no router.

    Example:

        ```py
        >>> with record_routing(model.eval(), labels=labels) as record, torch.no_grad():
        ...     for batch in batches:
        ...         model(**batch)
        >>> print(record.report())
        >>> record.plot_pathways("pathways.png")
        ```
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
