# SPDX-License-Identifier: Apache-2.0
"""The attention kernels of transformers that prompt rows can join: one file each, and this table.

Kernels differ in the masks that they take and in how prompt rows join. A kernel is found by its name in the model's
config, or by the function registered under a name (kernels from the Hub).
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface

from ...models.inspection import gives, unwrapped_forward
from ...models.sites import caps_scores
from ..chosen import HALVES
from . import dense, flash, flex
from .kernel import CAPPED_TWICE, Kernel, caps_unsaid, check_width

KERNELS: dict[str, Kernel] = {
    "sdpa": dense.SDPA,
    "eager": dense.EAGER,
    "paged|eager": dense.EAGER,  # of continuous batching
    "flash_attention_2": flash.FLASH,
    "flash_attention_3": flash.FLASH,
    "flash_attention_4": flash.FLASH,
    "flex_attention": flex.FLEX,
}


WIDTHS = ("qk_head_dim", "head_dim", "attention_head_size", "head_size")  # of one head of queries and keys


def find_kernel(name: str | None) -> Kernel:
    """How rows join under the attention implementation `name` of a model's config.

    Raises:
        ValueError: this kernel is not supported.
    """
    found = known_kernel(name)
    if found is None:
        raise ValueError(
            f"Prompts join attention under {', '.join(KERNELS)} and flash kernels from the Hub, but this model uses "
            f"{name!r}. Load it with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')."
        )
    return found


def known_kernel(name: str | None) -> Kernel | None:
    """Like `find_kernel`, but None for a kernel that is not supported."""
    name = name or "eager"
    return KERNELS.get(name) or _by_function(name)


def check_chosen(attention: Any) -> None:
    """Check early that the layer's kernel supports token routing, as far as the layer shows it.

    Raises:
        ValueError: the kernel caps scores, or heads would be wider than it supports.
    """
    kernel = find_kernel(attention.config._attn_implementation_internal)
    if caps_scores(attention):
        if not kernel.adds_mask:
            raise ValueError(CAPPED_TWICE)
        if not gives(unwrapped_forward(attention), "softcap"):
            raise ValueError(caps_unsaid(attention))
    # Not from the config: Gemma 4's config has a different width for each kind of layer.
    width = next((found for name in WIDTHS if isinstance(found := getattr(attention, name, None), int)), None)
    if width is not None:
        check_width(width + HALVES, width, kernel.widest)


def _by_function(name: str) -> Kernel | None:
    """The kernel of the table with the same function as `name`, as for flash kernels from the Hub."""
    functions: Any = AttentionInterface()
    function = functions.get(name)
    if function is None:
        return None
    return next((kernel for known, kernel in KERNELS.items() if functions.get(known) is function), None)
