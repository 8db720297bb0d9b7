# SPDX-License-Identifier: Apache-2.0
"""Prompts as real tokens of a vision transformer's block, for blocks whose prompt outputs the next block reads.

They stand behind the prefix tokens and are taken out behind the block, so that the model sees no more tokens than
before.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.sites import Site
from .block_layer import BlockLayer


class TokenLayer(BlockLayer):
    """Prompts that pass through the whole block of a vision transformer as real tokens behind its prefix tokens."""

    joins_as = "its prompts are tokens of whole blocks"
    note_name = "_promptmoe_carried"  # left by the block, what it has made of its prompts

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._names = parameter_names(site.block)

    @abstractmethod
    def tokens(self, adapter: str, patches: Tensor, carried: Tensor | None) -> Tensor:
        """Prompt tokens of the block's input.

        Args:
            patches: (B, N, D) the block's input at the patches.
            carried: (B, P, D) what the block before has made of its prompts; None if it had none or they are dropped.

        Returns:
            (B, P, D).
        """

    @abstractmethod
    def takes_over(self, adapter: str) -> TokenLayer | None:
        """The layer of the block before whose prompts are read here; None where none are."""

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
                f"{self.method} works with one active adapter at a time, and {working} are active. Activate one with "
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
                    f"The input of {self.site.name!r} is not what the block before it put out, so its prompts cannot "
                    "be carried on. If the model checkpoints activations, do so with use_reentrant=False; if FSDP "
                    "shards it, train with DDP; otherwise set carry_prompts=False."
                )
        prefix = self.patches.prefix
        prompts = self.tokens(adapter, x[:, prefix:], carried).to(x.dtype)
        x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self._names[0]: x})

    def _is_checkpointed(self) -> bool:
        """Whether the block runs again alone, or will, so that the last note is of another block's run."""
        call = self.calls.call
        return call is None or call.learns != torch.is_grad_enabled()

    def behind(self, x: Tensor) -> Tensor | None:
        adapter = self.working_adapter()
        if adapter is None:
            return None
        start = self.patches.prefix
        stop = start + self.prompt_config[adapter].num_virtual_tokens
        kept = torch.cat([x[:, :start], x[:, stop:]], dim=1)
        self.notes.leave(kept, x[:, start:stop], self.calls)
        return kept

    def _after_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the prompts out of the attention weights that a model is asked for, as everywhere else."""
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
