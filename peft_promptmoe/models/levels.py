# SPDX-License-Identifier: Apache-2.0
"""The blocks of a vision model whose patch outputs are read."""

from __future__ import annotations

from typing import Any

from torch import nn

EVERY = 3


def read_blocks(model: nn.Module, blocks: list[int]) -> list[int]:
    """Blocks, of those that there are, whose maps a backbone puts out or a model's heads read.

    Args:
        model: a backbone of transformers, a model around one, or a model that says in `read_blocks` which blocks it
            reads.
        blocks: numbers of its blocks.

    Returns:
        The numbers in order; where nobody says, every third block up to the last.
    """
    own = getattr(model, "read_blocks", None)
    found = sorted(set(put_out(model) if own is None else own) & set(blocks))
    return found or sorted(blocks)[::-1][::EVERY][::-1]


def put_out(model: nn.Module) -> list[int]:
    """Blocks behind which the backbone within a model takes its maps, in their order; none if there is no backbone."""
    return next((_stages(module) for module in model.modules() if hasattr(module, "stage_names")), [])


def _stages(backbone: Any) -> list[int]:
    """Blocks behind which the feature maps of a backbone are taken; the stem is -1."""
    stages = list(backbone.stage_names)
    offset = 1 if stages[:1] == ["stem"] else 0
    return [stages.index(name) - offset for name in backbone.out_features]
