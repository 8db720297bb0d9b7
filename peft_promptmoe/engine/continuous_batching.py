# SPDX-License-Identifier: Apache-2.0
"""Checks for transformers' continuous batching, before its thread starts.

Continuous batching packs many texts into one row and runs the model in its own thread. An error there would only give
empty answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .kernels import known_kernel
from .kernels.flash import FLASH
from .prompt_layer import PromptLayer

ENTRY = "init_continuous_batching"  # all ways to start it call this method


class CheckedStart:
    """Replaces a model's `init_continuous_batching`: checks the prompt layers first, then calls the original.

    Args:
        model: the base model.
        hooks: its `ModelHooks`, which know the prompt layers.
    """

    def __init__(self, model: Any, hooks: Any) -> None:
        self._model = model
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check_rows(self._hooks.layers)
        model, kernel = self._model, self._model.config._attn_implementation
        manager = getattr(type(model), ENTRY)(model, *args, **kwargs)  # this may change the kernel
        if any(layer.working_adapters() for layer in self._hooks.layers):
            _check_kernel(model, kernel)
        return manager


def guard(model: nn.Module, hooks: Any) -> None:
    """Check every start of continuous batching on a model, if the model supports it."""
    if hasattr(type(model), ENTRY):
        setattr(model, ENTRY, CheckedStart(model, hooks))


def release(model: nn.Module) -> None:
    """Undo `guard`."""
    vars(model).pop(ENTRY, None)


def _check_rows(layers: list[PromptLayer]) -> None:
    for layer in layers:
        for name in layer.working_adapters():
            if layer.pools_rows(name):
                raise ValueError(
                    f"Continuous batching packs many texts into one row, but the prompts of adapter {name!r} depend "
                    "on the whole row (routing='sample'). Use routing='token' or static prompts (num_experts=1), or "
                    "generate() without continuous batching."
                )


def _check_kernel(model: Any, before: str) -> None:
    """Raise ValueError for flash kernels: prompt rows cannot be put in front of the keys in their paged cache."""
    name = model.config._attn_implementation
    if known_kernel(name) is not FLASH:
        return
    if name != before:
        model.set_attn_implementation(before)
    raise ValueError(
        f"Prompts do not join the paged cache that {name!r} keeps in continuous batching. Load the model with "
        "attn_implementation='sdpa' and pass ContinuousBatchingConfig(auto_switch_to_flash=False)."
    )
