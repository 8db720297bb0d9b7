# SPDX-License-Identifier: Apache-2.0
"""The attention kernels of transformers that prompt rows can join: one file each, and this table.

A kernel differs from another in the masks that it takes and in how rows get past them. It is known by the name that a
model's config gives it, or by the function that stands behind a name (kernels from the Hub).
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface

from . import dense, flash, flex
from .kernel import Kernel

KERNELS: dict[str, Kernel] = {
    "sdpa": dense.SDPA,
    "eager": dense.EAGER,
    "paged|eager": dense.EAGER,  # of continuous batching
    "flash_attention_2": flash.FLASH,
    "flash_attention_3": flash.FLASH,
    "flash_attention_4": flash.FLASH,
    "flex_attention": flex.FLEX,
}


def find_kernel(name: str | None) -> Kernel:
    """How rows join under the attention implementation `name` of a model's config.

    Raises:
        ValueError: its conventions are not known.
    """
    found = known_kernel(name)
    if found is None:
        raise ValueError(
            f"Prompts join attention under {', '.join(KERNELS)} and flash kernels from the Hub, and this model uses "
            f"{name!r}. Load it with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')."
        )
    return found


def known_kernel(name: str | None) -> Kernel | None:
    """As `find_kernel`, with None for one that is not known."""
    name = name or "eager"
    return KERNELS.get(name) or _by_function(name)


def _by_function(name: str) -> Kernel | None:
    """The kernel of the table that shares its function with `name`, as flash kernels from the Hub do."""
    functions: Any = AttentionInterface()
    function = functions.get(name)
    if function is None:
        return None
    return next((kernel for known, kernel in KERNELS.items() if functions.get(known) is function), None)
