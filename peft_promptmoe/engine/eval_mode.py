# SPDX-License-Identifier: Apache-2.0
"""Runs a model in evaluation mode and then restores the mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_eval(module: nn.Module) -> None:
    """Put a module into evaluation mode, except its linear layers, which compute the same in both modes.

    In evaluation mode bitsandbytes repacks 4-bit weights of quantised linear layers. On CPUs no gradient passes
    through them after that.
    """
    for child in module.modules():
        child.training = isinstance(child, nn.Linear)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode inside the block, as with `set_eval`."""
    modes = {child: child.training for child in module.modules()}
    set_eval(module)
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
