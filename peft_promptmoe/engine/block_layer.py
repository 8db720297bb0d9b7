# SPDX-License-Identifier: Apache-2.0
"""Base of the adapters that change the patch outputs of a whole vision transformer block."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from ..models.patches import Patches
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

    @abstractmethod
    def behind(self, x: Tensor) -> Tensor | None:
        """The block's output with the adapter.

        Args:
            x: (B, T, D) the block's own output, prefix tokens first.

        Returns:
            (B, T', D). None: the block's own output is kept.
        """

    def hook(self) -> list[Any]:
        # Before all other hooks: transformers captures hidden states and feature maps with hooks on the blocks.
        return [self.site.block.register_forward_hook(self._after_block, prepend=True)]

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = self.behind(output[0] if isinstance(output, tuple) else output)
        if x is None:
            return None
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @property
    def patches(self) -> Patches:
        """The patch embedding of the block's tower."""
        assert self.site.patches is not None
        return self.site.patches
