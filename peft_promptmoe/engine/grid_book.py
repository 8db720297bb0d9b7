# SPDX-License-Identifier: Apache-2.0
"""The patch grids of the images that a patch embedding has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.patches import Grid, Patches, hides_patches, says_hidden


class GridBook:
    """The patch grids that have come through one patch embedding, by their number of patches.

    A layer sees tokens in a row and asks here how many rows and columns they are. What is written is never changed, so
    threads, checkpointed blocks that are run again and later forwards read the same.

    Args:
        patches: the tower's patch embedding.

    Attributes:
        grids: rows and columns by number of patches.
        last: rows and columns of the last images, for reports.
        readers: the layers that may read here; nothing is written or changed while none of them does.
    """

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.grids: dict[int, Grid] = {}
        self.last: Grid | None = None
        self.readers: list[Any] = []
        self._names = parameter_names(patches.owner)
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [
            self.patches.embedding.register_forward_hook(self._after_embedding),
            self.patches.owner.register_forward_pre_hook(self._before_owner, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, patches: int) -> Grid:
        """Grid of a number of patches.

        Raises:
            ValueError: no image of so many patches has come through the patch embedding: patches were dropped.
        """
        count = _number(patches)
        grid = self.grids.get(count)
        if grid is None:
            raise ValueError(
                f"The prompts are made from the whole patch grid, and this layer got {count} patches, but the images "
                f"so far have the grids {sorted(self.grids.values())}: patches were dropped on the way. "
                "Switch patch dropout and masking off."
            )
        return grid

    def _readers(self) -> list[tuple[Any, str]]:
        return [(reader, name) for reader in self.readers for name in reader.working_adapters()]

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        readers = self._readers()
        if not any(reader.needs_patches(name) for reader, name in readers):
            return
        rows, columns = map(_number, output.shape[-2:])
        self.last = (rows, columns)
        if not any(reader.uses_grid(name) for reader, name in readers):
            return
        known = self.grids.get(rows * columns)
        if known is None:
            known = self.grids.setdefault(rows * columns, (rows, columns))
        if known != (rows, columns):
            raise ValueError(
                f"This model has seen images of {known[0]} x {known[1]} patches and now gets {rows} x {columns}, the "
                "same number in another shape, and its layers cannot tell these apart. Bring all images to one shape."
            )

    def _before_owner(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the patches in order where the model would shuffle them (ViT-MAE)."""
        if "noise" not in self._names or not any(reader.needs_patches(name) for reader, name in self._readers()):
            return None
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        if hides_patches(owner) or bound.get("noise") is not None:
            raise ValueError(says_hidden(owner))
        pixels = bound["pixel_values"]
        rows, columns = self.patches.grid(tuple(pixels.shape[-2:]))
        noise = torch.arange(rows * columns, device=pixels.device).expand(pixels.shape[0], -1)
        position = self._names.index("noise")
        if len(args) > position:
            return (*args[:position], noise, *args[position + 1 :]), kwargs
        return args, {**kwargs, "noise": noise}


def _number(size: int) -> int:
    """A size as a number: `torch.jit.trace` makes tensors of sizes, which no dictionary finds again."""
    return int(size) if torch.jit.is_tracing() else size
