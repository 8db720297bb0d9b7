# SPDX-License-Identifier: Apache-2.0
"""Lets adapters learn inside re-entrant activation checkpointing, also where nothing in front of them is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .prompt_layer import PromptLayer


class CheckpointedModule:
    """The hook on a block, or a stage of blocks, that transformers may checkpoint.

    Re-entrant checkpointing (`use_reentrant=True`) gives no gradients to what is inside, unless the input of the block
    or stage needs one. In a frozen model it does not: transformers changes that for token ids only, and its
    `enable_input_require_grads` fails on Swin.

    Args:
        layers: the prompt layers inside.
    """

    def __init__(self, layers: list[PromptLayer]) -> None:
        self.layers = layers

    def attach(self, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not may_run_again(module):
            return None
        tensors = [
            index for index, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if not tensors or any(args[index].requires_grad for index in tensors):
            return None
        if not any(layer.working_adapters() for layer in self.layers):
            return None
        first = tensors[0]  # the tokens
        return (*args[:first], args[first].detach().requires_grad_(True), *args[first + 1 :])


def may_run_again(module: Any) -> bool:
    """Whether transformers runs a module's forward again in the backward pass, by the kind of checkpointing that gives
    that run other tensors.

    In front of the module this is known before the forward pass. Inside it is true in the second run only, because the
    first has no gradients. The second run is without the module's own hooks.
    """
    if not (torch.is_grad_enabled() and module.training and getattr(module, "gradient_checkpointing", False)):
        return False
    settings = getattr(module._gradient_checkpointing_func, "keywords", {})
    return settings.get("use_reentrant") is not False


def checkpointed_modules(model: nn.Module, layers: list[PromptLayer]) -> dict[nn.Module, list[PromptLayer]]:
    """The blocks and stages of a model that transformers can checkpoint, with the prompt layers in them."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[nn.Module, list[PromptLayer]] = {}
    for layer in layers:
        path = paths.get(id(layer.site.attention), "")  # no path: in one of pMoE's further backbones
        while path:
            module = model.get_submodule(path)
            if isinstance(module, GradientCheckpointingLayer):
                found.setdefault(module, []).append(layer)
            path = path.rpartition(".")[0]
    return found
