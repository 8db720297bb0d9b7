# SPDX-License-Identifier: Apache-2.0
"""Finds the blocks of a vision model whose patch outputs are read."""

from __future__ import annotations

from typing import Any

from torch import nn

EVERY = 3


def read_blocks(model: nn.Module, blocks: list[int]) -> list[int]:
    """Blocks whose feature maps a backbone returns or a model's heads read.

    Args:
        model: a backbone of transformers, a model around one, or a model whose attribute `read_blocks` says what it
            reads.
        blocks: numbers of the model's blocks.

    Returns:
        The numbers in order. If neither is known: every third block, counted back from the last.
    """
    own = getattr(model, "read_blocks", None)  # a model of somebody else may call anything so
    found = sorted(set(own if isinstance(own, list) else put_out(model)) & set(blocks))
    return found or sorted(blocks)[::-1][::EVERY][::-1]


def put_out(model: nn.Module) -> list[int]:
    """Numbers of the blocks after which a model's backbone takes its feature maps. Empty if there is no backbone."""
    return next((_stages(module) for module in model.modules() if hasattr(module, "stage_names")), [])


def _stages(backbone: Any) -> list[int]:
    """Numbers of the blocks after which a backbone takes its feature maps. The stem is -1."""
    stages = list(backbone.stage_names)
    offset = 1 if stages[:1] == ["stem"] else 0
    return [stages.index(name) - offset for name in backbone.out_features]
