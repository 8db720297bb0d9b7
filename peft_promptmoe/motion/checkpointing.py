# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of the backbone's blocks, by the methods that Trainer and PEFT ask a model for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Checkpointed:
    """transformers' methods under their new names and, for PEFT and transformers 5.23, under their old ones."""

    backbone: Any

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backbone checkpoints its blocks."""
        for name in ("is_activation_checkpointing", "is_gradient_checkpointing", "grad_checkpointing"):
            if hasattr(self.backbone, name):
                return bool(getattr(self.backbone, name))
        return False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Checkpoint the backbone's blocks.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`; timm decides on them itself.
            more: what transformers' method of this name takes beside them (`every_n_layers`, `offload`).

        Raises:
            ValueError: the backbone is timm's, and `more` asks for what that does not have.
        """
        backbone, arguments = self.backbone, activation_checkpointing_kwargs
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(arguments, **more)
        elif hasattr(backbone, "gradient_checkpointing_enable"):
            backbone.gradient_checkpointing_enable(arguments, **more)
        elif more.get("every_n_layers", 1) != 1 or more.get("offload"):
            raise ValueError("Models of timm checkpoint every block and offload nothing. Leave these settings out.")
        else:
            backbone.set_grad_checkpointing(True)
        if (arguments or {}).get("use_reentrant"):
            # else blocks that get no gradient through their input are run without one, adapters in them too
            self.enable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        backbone = self.backbone
        for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if hasattr(backbone, name):
                getattr(backbone, name)()
                return
        backbone.set_grad_checkpointing(False)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Let a gradient into the first block, as `use_reentrant=True` wants it."""
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
        if _require_grad not in first._forward_hooks.values():
            first.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
