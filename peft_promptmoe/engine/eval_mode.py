# SPDX-License-Identifier: Apache-2.0
"""Run a model in evaluation mode, then restore the mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_eval(module: nn.Module) -> None:
    """Put a module into evaluation mode, apart from linear layers, which compute the same in both.

    Quantised ones take evaluation for a promise that nobody will differentiate them again: bitsandbytes repacks its
    4-bit weights then, and on CPUs no gradient comes through them any more.
    """
    for child in module.modules():
        child.training = isinstance(child, nn.Linear)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode within the block, as `set_eval` does."""
    modes = {child: child.training for child in module.modules()}
    set_eval(module)
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
