# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of the backbone's blocks, through the methods that the Trainer and PEFT call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Checkpointed:
    """transformers' methods for checkpointing, under their new and their old names (PEFT and transformers 5.23)."""

    backbone: Any

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether checkpointing of the backbone's blocks is on."""
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
        """Turn on checkpointing of the backbone's blocks.

        Args:
            activation_checkpointing_kwargs: arguments for `torch.utils.checkpoint.checkpoint`. timm chooses its own.
            more: further arguments of transformers' method of this name (`every_n_layers`, `offload`).

        Raises:
            ValueError: the backbone is a timm model, and `more` asks for something that timm does not have.
        """
        backbone, arguments = self.backbone, activation_checkpointing_kwargs
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(arguments, **more)
        elif hasattr(backbone, "gradient_checkpointing_enable"):
            backbone.gradient_checkpointing_enable(arguments, **more)
        elif more.get("every_n_layers", 1) != 1 or more.get("offload"):
            raise ValueError(
                "timm models checkpoint every block and do not offload. Leave every_n_layers and offload out."
            )
        else:
            backbone.set_grad_checkpointing(True)
        if (arguments or {}).get("use_reentrant"):
            # Reentrant checkpointing gives a block no gradients unless its input needs one; adapters would not train.
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
        """Older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Make the input of the first block require a gradient, as `use_reentrant=True` needs."""
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
        if _require_grad not in first._forward_hooks.values():
            first.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
