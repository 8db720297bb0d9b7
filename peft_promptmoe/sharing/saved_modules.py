# SPDX-License-Identifier: Apache-2.0
"""Removes the modules saved with an adapter from a model that keeps adapters of other methods."""

from __future__ import annotations

from collections.abc import Collection

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def saved_modules(model: nn.Module) -> list[nn.Module]:
    """PEFT's wrappers of the modules in `modules_to_save`."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def take_saved_modules_out(model: nn.Module, adapters: Collection[str], but: Collection[nn.Module]) -> None:
    """Unload the modules saved with some adapters. As in PEFT's `unload`, an active adapter's head is kept.

    Args:
        model: the base model.
        adapters: names of the adapters.
        but: wrappers to skip, because they belong to another method's adapter of the same name.
    """
    others = {id(module) for module in but}
    for path, module in list(model.named_modules()):
        wraps = isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in others
        if not wraps or module._adapters.isdisjoint(adapters):
            continue
        if module._adapters <= set(adapters):
            kept = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            model.set_submodule(path, kept)
            continue
        left = sorted(module._adapters - set(adapters))
        for adapter in module._adapters & set(adapters):
            module.delete_adapter(adapter, left[:1])
