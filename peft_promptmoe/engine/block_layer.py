# SPDX-License-Identifier: Apache-2.0
"""Adapters that work on the patch outputs of a whole vision transformer block."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from ..models.patches import Patches
from ..models.sites import Site
from ..routing.record import Assignment
from .prompt_layer import PromptLayer


class BlockLayer(PromptLayer):
    """An adapter of one block; it is a child of the block's attention layer, as all adapters are.

    Attributes:
        last_assignment: by adapter, which prototypes the patches of the last forward went to, if there are any.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.last_assignment: dict[str, Assignment] = {}

    @abstractmethod
    def behind(self, x: Tensor) -> Tensor | None:
        """What the block puts out with the adapter.

        Args:
            x: (B, T, D) what it puts out without, prefix tokens first.

        Returns:
            (B, T', D); None for what the block puts out.
        """

    def hook(self) -> list[Any]:
        # Before all others: transformers captures hidden states and feature maps by hooks of its own on the blocks.
        return [self.site.block.register_forward_hook(self._after_block, prepend=True)]

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = self.behind(output[0] if isinstance(output, tuple) else output)
        if x is None:
            return None
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @property
    def patches(self) -> Patches:
        """How the block's tower makes tokens of an image."""
        assert self.site.patches is not None
        return self.site.patches
