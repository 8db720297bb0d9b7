# SPDX-License-Identifier: Apache-2.0
"""Which prototypes the patches of an image went to: as a table and as a picture.

Letters: `U` units, `K` prototypes, `B` images, `N` patches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
    """How the units of ProMotion group patches.

    Attributes:
        layers: numbers of the blocks, length U.
        use: (U, K) share of the patches that are nearest to a prototype; rows sum to 1.
        entropy: (U,) entropy of the use as a share of its maximum: 1 if all serve alike, 0 if one has everything.
        margin: (U,) by how much the nearest prototype's cosine exceeds the second one's, mean over patches.
        nearest: (U,) cosine with the nearest prototype, mean over patches.
        between: (U,) cosine between two prototypes of an image, mean over pairs; near 1 they have fallen together.
        denoising: (U,) denoising loss over the noise's variance in the last training forward; below 1 noise is taken
            away. NaN where there was none.
        maps: of every unit, (B, N) nearest prototypes.
        grids: of every unit, rows and columns of the patches; None where they are not known.
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
        """One row per unit: layer, entropy, margin, nearest, between, denoising, used (prototypes with a patch)."""
        with extra("report", "to_dataframe()"):
            import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in FIGURES}
        return pd.DataFrame({"layer": self.layers, **columns, "used": self._used()})

    @property
    def over(self) -> str:
        """What the figures stand on, in words."""
        images = len(self.maps[0])
        return f"over {images:,} image{'' if images == 1 else 's'} of {self.maps[0].shape[1]:,} patches"

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

    def plot(self, path: str | os.PathLike[str] | None = None, images: Sequence[int] = (0,)) -> Picture:
        """Maps of some images of the last batch; a colour is a prototype.

        Args:
            path: of an image file to write; unset for none. Notebooks show what is returned.
            images: numbers in the batch. A `FlowModel` runs both frames of its B pairs at once, so pair 0 is (0, B).

        Raises:
            ValueError: the patches' rows and columns are not known, or there is no such image.
        """
        with extra("report", "plot()"):
            from .pictures import draw_maps, finish

        for image in images:
            if not 0 <= image < len(self.maps[0]):
                raise ValueError(f"The last batch had the images 0 to {len(self.maps[0]) - 1}, and not {image}.")
        maps = []
        for nearest, grid in zip(self.maps, self.grids, strict=True):
            if grid is None or math.prod(grid) != nearest.shape[1]:
                raise ValueError("The patches' rows and columns are not known: some of them were dropped on the way.")
            maps.append(nearest.unflatten(1, grid))
        return finish(draw_maps(self.layers, maps, self._used(), self.use.shape[1], list(images)), path)


FIGURES = ("entropy", "margin", "nearest", "between", "denoising")


def assigned_layers(model: nn.Module, adapter: str | None) -> list[tuple[BlockLayer, str]]:
    """The units that have assigned patches, with the adapter asked for (by default the first active one)."""
    found = []
    for layer in prompt_layers(model):
        names = [adapter] if adapter is not None else layer.active_adapters[:1]
        if isinstance(layer, BlockLayer):
            found += [(layer, name) for name in names if name in layer.last_assignment]
    return found


def assignment_report(model: nn.Module, adapter: str | None = None) -> AssignmentReport:
    """Report of the last forward pass of a model with ProMotion.

    Args:
        model: the model.
        adapter: which adapter; by default the first active one.

    Raises:
        ValueError: the model has no units, or there has been no forward yet.
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
    other = layers[0].method if layers else None
    instead = f"; it has one of {other}, which routing_report may report of" if other is not None else ""
    return f"The model has no ProMotion adapter{named}, so no patches are assigned to prototypes{instead}."


def measure(record: Assignment) -> dict[str, Tensor]:
    """Use (K,), margin, nearest and between () of one unit."""
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
