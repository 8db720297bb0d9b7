# SPDX-License-Identifier: Apache-2.0
"""Refusals for transformers' continuous batching, raised before its thread starts.

It packs many texts into one row and runs the model in a thread of its own, where an error ends in empty answers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .kernels import known_kernel
from .kernels.flash import FLASH
from .prompt_layer import PromptLayer

ENTRY = "init_continuous_batching"  # of all ways in


class CheckedStart:
    """Stands before a model's own `init_continuous_batching`.

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
        manager = getattr(type(model), ENTRY)(model, *args, **kwargs)  # which may change the kernel
        if any(layer.working_adapters() for layer in self._hooks.layers):
            _check_kernel(model, kernel)
        return manager


def guard(model: nn.Module, hooks: Any) -> None:
    """Check every start of continuous batching on a model, if it is one that has it."""
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
                    f"Continuous batching packs many texts into one row, and the prompts of adapter {name!r} depend "
                    "on all of a row (routing='sample'). Use routing='token' or static prompts (num_experts=1), or "
                    "generate() without continuous batching."
                )


def _check_kernel(model: Any, before: str) -> None:
    """Refuse flash kernels, whose paged form keeps keys where no rows can be put in front of them."""
    name = model.config._attn_implementation
    if known_kernel(name) is not FLASH:
        return
    if name != before:
        model.set_attn_implementation(before)
    raise ValueError(
        f"Prompts do not join the paged cache that {name!r} keeps in continuous batching. Load the model with "
        "attn_implementation='sdpa' and pass ContinuousBatchingConfig(auto_switch_to_flash=False)."
    )
