# SPDX-License-Identifier: Apache-2.0
"""Base of the adapters that change the patch outputs of a whole vision transformer block."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.patches import Grid, Patches
from ..models.sites import Site
from ..routing.record import Assignment
from .prompt_layer import PromptLayer


class BlockLayer(PromptLayer):
    """Adapters of one block. The layer is a child of the block's attention layer, like all prompt layers.

    Attributes:
        last_assignment: for each adapter, the assignment of patches to prototypes in the last forward pass, if any.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.last_assignment: dict[str, Assignment] = {}
        self._names = parameter_names(site.block)

    @abstractmethod
    def behind(self, x: Tensor, grid: Grid | None = None) -> Tensor | None:
        """The block's output with the adapter.

        Args:
            x: (B, T, D) the block's own output, prefix tokens first.
            grid: (rows, columns) of the patches. None if unknown.

        Returns:
            (B, T', D). None: the block's own output is kept.
        """

    def hook(self) -> list[Any]:
        # Before all other hooks: transformers captures hidden states and feature maps with hooks on the blocks.
        return [self.site.block.register_forward_hook(self._after_block, prepend=True, with_kwargs=True)]

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        tokens = own.flatten(1, 2) if own.ndim == 4 else own  # timm's Swin has rows and columns
        x = self.behind(tokens, self._grid(dict(zip(self._names, args, strict=False)) | kwargs, own))
        if x is None:
            return None
        if own.ndim == 4:
            x = x.unflatten(1, own.shape[1:3])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _grid(self, bound: dict[str, Any], own: Tensor) -> Grid | None:
        """(rows, columns) of the patches: by the block's call in models with stages, else by the images."""
        if self.patches.stage is not None:
            rows, columns = own.shape[1:3] if own.ndim == 4 else bound["input_dimensions"]
            return rows, columns
        if self.grids is None:
            return None
        if any(map(self.uses_grid, self.working_adapters())):
            return self.grids.of(own.shape[1] - self.patches.prefix)
        return self.grids.last

    @property
    def patches(self) -> Patches:
        """The patch embedding of the block's tower."""
        assert self.site.patches is not None
        return self.site.patches
