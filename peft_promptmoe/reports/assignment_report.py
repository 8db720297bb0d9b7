# SPDX-License-Identifier: Apache-2.0
"""Report on which prototype each patch of an image is assigned to, as a table and as a picture.

Letters: `U` units, `K` prototypes, `B` images, `N` patches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.block_layer import BlockLayer
from ..engine.model_hooks import find_hooks, prompt_layers
from ..extras import extra
from ..routing.record import Assignment
from .routing_report import normalized_entropy
from .table import html_table

if TYPE_CHECKING:
    import pandas as pd

    from .pictures import Picture


@dataclass
class AssignmentReport:
    """How the units of ProMotion group patches. A unit is the trained module behind one frozen block.

    Attributes:
        layers: numbers of the blocks, length U.
        use: (U, K) share of the patches whose nearest prototype is this one. Rows sum to 1.
        entropy: (U,) entropy of `use`, relative to its maximum. 1: all prototypes are used alike. 0: one gets all.
        margin: (U,) cosine with the nearest prototype minus cosine with the second nearest, mean over patches.
        nearest: (U,) cosine with the nearest prototype, mean over patches.
        between: (U,) cosine between two prototypes of an image, mean over pairs. Near 1 the unit has collapsed.
        denoising: (U,) denoising loss divided by the noise's variance, from the last training forward. Below 1 the
            denoiser removes noise. NaN if there was no such forward.
        maps: for every unit, (B, N) number of each patch's nearest prototype.
        grids: for every unit, (rows, columns) of the patch grid. None if unknown.
    """

    layers: list[int]
    use: Tensor
    entropy: Tensor
    margin: Tensor
    nearest: Tensor
    between: Tensor
    denoising: Tensor
    maps: list[Tensor]
    grids: list[tuple[int, int] | None]

    def to_dataframe(self) -> pd.DataFrame:
        """Table, one row per unit: layer, entropy, margin, nearest, between, denoising, used (prototypes in use)."""
        with extra("report", "to_dataframe()"):
            import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in FIGURES}
        return pd.DataFrame({"layer": self.layers, **columns, "used": self._used()})

    @property
    def over(self) -> str:
        """The number of images that the figures are computed from, in words."""
        images = len(self.maps[0])
        counts = sorted({found.shape[1] for found in self.maps})
        patches = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        return f"over {images:,} image{'' if images == 1 else 's'} of {patches} patches"

    def __str__(self) -> str:
        head = "layer  " + "  ".join(f"{name:>9}" for name in FIGURES) + f"  used ({self.over})"
        lines = (f"{n:5d}  " + "  ".join(f"{v:9.3f}" for v in values) + f"  {u:4d}" for n, u, *values in self._rows())
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        rows = [[number, *values, used] for number, used, *values in self._rows()]
        columns = ["layer", *FIGURES, "prototypes used"]
        return html_table(f"Assignment of patches to {self.use.shape[1]} prototypes, {self.over}", columns, rows)

    def _rows(self) -> list[tuple[Any, ...]]:
        figures = [getattr(self, name).tolist() for name in FIGURES]
        return list(zip(self.layers, self._used(), *figures, strict=True))

    def _used(self) -> list[int]:
        return (self.use > 0).sum(dim=1).tolist()

    def plot(self, path: str | os.PathLike[str] | None = None, images: Iterable[int] = (0,)) -> Picture:
        """Draw the nearest prototype of every patch for some images of the last batch. A colour stands for a
        prototype.

        Args:
            path: image file to write. None: no file. A notebook shows the returned picture.
            images: numbers of the images in the batch. A `FlowModel` runs both frames of its B pairs as one batch of
                2B, so the frames of pair 0 are (0, B).

        Raises:
            ValueError: the shape of the patch grid is unknown, the batch has no such image, or none is named.
        """
        with extra("report", "plot()"):
            from .pictures import draw_maps, finish

        images = list(images)
        if not images:
            raise ValueError("images is empty. Name images of the last batch, such as (0,).")
        for image in images:
            if not 0 <= image < len(self.maps[0]):
                raise ValueError(
                    f"images={image} is not in the last batch, which had the images 0 to {len(self.maps[0]) - 1}."
                )
        maps = []
        for nearest, grid in zip(self.maps, self.grids, strict=True):
            if grid is None or math.prod(grid) != nearest.shape[1]:
                raise ValueError(
                    "The shape of the patch grid is not known, so the patches cannot be drawn: the model drops some."
                )
            maps.append(nearest.unflatten(1, grid))
        return finish(draw_maps(self.layers, maps, self._used(), self.use.shape[1], images), path)


FIGURES = ("entropy", "margin", "nearest", "between", "denoising")


def assigned_layers(model: nn.Module, adapter: str | None) -> list[tuple[BlockLayer, str]]:
    """The units that have assigned patches, each with the adapter's name (by default the first active adapter)."""
    found = []
    for layer in prompt_layers(model):
        names = [adapter] if adapter is not None else layer.active_adapters[:1]
        if isinstance(layer, BlockLayer):
            found += [(layer, name) for name in names if name in layer.last_assignment]
    return found


def assignment_report(model: nn.Module, adapter: str | None = None) -> AssignmentReport:
    """Report how a model with ProMotion assigned patches to prototypes in its last forward pass.

    Args:
        model: the model.
        adapter: name of the adapter. None: the first active one.

    Raises:
        ValueError: the model has no ProMotion adapter, or no forward pass was run yet.
    """
    layers = assigned_layers(model, adapter)
    if not layers:
        raise ValueError(_why_unassigned(model, adapter))
    hooks = find_hooks(model)
    assert hooks is not None
    unknown = torch.tensor(math.nan)
    ratios = [hooks.last_losses.get((layer.site.name, name, "denoise_ratio"), unknown) for layer, name in layers]
    records = [layer.last_assignment[name] for layer, name in layers]
    figures = [measure(record) for record in records]
    return AssignmentReport(
        layers=[layer.site.index for layer, _ in layers],
        use=torch.stack([figure["use"] for figure in figures]),
        entropy=torch.stack([normalized_entropy(figure["use"]).nan_to_num(1.0) for figure in figures]),
        margin=torch.stack([figure["margin"] for figure in figures]),
        nearest=torch.stack([figure["nearest"] for figure in figures]),
        between=torch.stack([figure["between"] for figure in figures]),
        denoising=torch.stack([ratio.float().cpu() for ratio in ratios]),
        maps=[record.similarity.argmax(dim=-1).cpu() for record in records],
        grids=[record.grid for record in records],
    )


def _why_unassigned(model: nn.Module, adapter: str | None) -> str:
    named = f" {adapter!r}" if adapter is not None else ""
    layers = prompt_layers(model)
    if any(isinstance(layer, BlockLayer) and (not named or adapter in layer.prompt_config) for layer in layers):
        return f"The ProMotion adapter{named} has not been run yet, or is not active. Run the model once."
    units = [layer for layer in layers if isinstance(layer, BlockLayer)]
    if units:
        known = " and ".join(sorted({repr(name) for layer in units for name in layer.prompt_config}))
        return f"The model has no ProMotion adapter{named}. It has {known}."
    other = layers[0].method if layers else None
    instead = f" Its adapter is one of {other}: try routing_report." if other is not None else ""
    return f"The model has no ProMotion adapter{named}, so no patches are assigned to prototypes.{instead}"


def measure(record: Assignment) -> dict[str, Tensor]:
    """The figures of one unit: use (K,); margin, nearest and between ()."""
    similarity, prototypes = record.similarity.float().cpu(), record.prototypes.float().cpu()
    count = similarity.shape[-1]
    use = torch.bincount(similarity.argmax(dim=-1).flatten(), minlength=count) / similarity[..., 0].numel()
    best = similarity.topk(min(2, count), dim=-1).values
    pairs = (prototypes @ prototypes.transpose(1, 2))[:, ~torch.eye(count, dtype=torch.bool)]
    return {
        "use": use,
        "nearest": best[..., 0].mean(),
        "margin": (best[..., 0] - best[..., -1]).mean(),
        "between": pairs.mean() if count > 1 else torch.tensor(0.0),
    }
