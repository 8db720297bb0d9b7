# SPDX-License-Identifier: Apache-2.0
"""Records the patch grids of the images that went through a patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.patches import Grid, Patches, hides_patches, says_hidden


class GridBook:
    """The patch grids of one patch embedding, by number of patches.

    A layer sees a sequence of tokens and asks here for its rows and columns. Entries never change, so threads,
    checkpointed blocks that are run again and later forward passes read the same.

    Args:
        patches: the tower's patch embedding.

    Attributes:
        grids: (rows, columns) by number of patches.
        last: (rows, columns) of the last images, for reports.
        readers: layers that may read the grids. While none of them needs them, nothing is recorded.
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
        """(rows, columns) for a number of patches.

        Raises:
            ValueError: no image with this number of patches went through the patch embedding: patches were dropped.
        """
        count = _number(patches)
        grid = self.grids.get(count)
        if grid is None:
            raise ValueError(
                f"The prompts are made from the whole patch grid, but this layer got {count} patches while the images "
                f"so far have the grids {sorted(self.grids.values())}: patches were dropped on the way. "
                "Turn off patch dropout and masking."
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
                "same number in another shape. Its layers cannot tell these apart. Bring all images to one shape."
            )

    def _before_owner(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the patches in order in models that would shuffle them (ViT-MAE)."""
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
    """A size as an int: `torch.jit.trace` turns sizes into tensors, which do not work as dictionary keys."""
    return int(size) if torch.jit.is_tracing() else size
