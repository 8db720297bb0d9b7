# SPDX-License-Identifier: Apache-2.0
"""Prompts as real tokens in a block of a vision transformer, so that the next block can read their outputs.

They are inserted after the prefix tokens and removed after the block, so the rest of the model sees as many tokens as
before.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..models.patches import Grid
from .block_layer import BlockLayer


class TokenLayer(BlockLayer):
    """Base of the layers whose prompts pass through a whole block as real tokens, after the prefix tokens."""

    joins_as = "its prompts are tokens that pass through whole blocks"
    note_name = "_promptmoe_carried"  # the block leaves its outputs at the prompt positions here

    @abstractmethod
    def tokens(self, adapter: str, patches: Tensor, carried: Tensor | None) -> Tensor:
        """Compute the prompt tokens of the block's input.

        Args:
            adapter: name of the adapter.
            patches: (B, N, D) the block's input at the patches.
            carried: (B, P, D) the previous block's outputs at the prompt positions. None if there are none.

        Returns:
            (B, P, D).
        """

    @abstractmethod
    def takes_over(self, adapter: str) -> TokenLayer | None:
        """The previous block's layer, if its outputs at the prompt positions are read here, else None."""

    def hook(self) -> list[Any]:
        return [
            self.site.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            *super().hook(),
            self.site.attention.register_forward_hook(self._after_attention, prepend=True),
        ]

    def working_adapter(self) -> str | None:
        """The active adapter that has prompts here.

        Raises:
            ValueError: there are several.
        """
        working = self.working_adapters()
        if len(working) > 1:
            raise ValueError(
                f"{self.method} works with one active adapter at a time, but {working} are active. Activate one with "
                "set_adapter()."
            )
        return working[0] if working else None

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        adapter = self.working_adapter()
        if adapter is None:
            return None
        x = args[0] if args else kwargs[self._names[0]]
        carried = None
        before = self.takes_over(adapter)
        if before is not None:
            carried = before.notes.on(x)
            if carried is None and not self._is_checkpointed():
                carried = before.notes.beside(x, self.calls)
            before.notes.forget()
            if carried is None:
                raise RuntimeError(
                    f"The input of {self.site.name!r} is not the output of the previous block, so prompts cannot be "
                    "carried on. With gradient checkpointing, set use_reentrant=False. With FSDP, train with DDP "
                    "instead. Otherwise set carry_prompts=False."
                )
        prefix = self.patches.prefix
        prompts = self.tokens(adapter, x[:, prefix:], carried).to(x.dtype)
        x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self._names[0]: x})

    def _is_checkpointed(self) -> bool:
        """Whether the block is checkpointed: it then runs again alone, and the last note is of another block."""
        call = self.calls.call
        return call is None or call.learns != torch.is_grad_enabled()

    def behind(self, x: Tensor, grid: Grid | None = None) -> Tensor | None:
        adapter = self.working_adapter()
        if adapter is None:
            return None
        start = self.patches.prefix
        stop = start + self.prompt_config[adapter].num_virtual_tokens
        kept = torch.cat([x[:, :start], x[:, stop:]], dim=1)
        self.notes.leave(kept, x[:, start:stop], self.calls)
        return kept

    def _after_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prompts from returned attention weights."""
        adapter = self.working_adapter()
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if adapter is None or not isinstance(weights, Tensor):
            return None
        start = self.patches.prefix
        stop = start + self.prompt_config[adapter].num_virtual_tokens
        for dim in (-2, -1):
            before, behind = weights.narrow(dim, 0, start), weights.narrow(dim, stop, weights.shape[dim] - stop)
            weights = torch.cat([before, behind], dim=dim)
        return output[0], weights, *output[2:]
