# SPDX-License-Identifier: Apache-2.0
"""Finds the blocks of a vision model whose outputs count."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sites import Site


def blocks_in_use(model: nn.Module, sites: list[Site]) -> list[int]:
    """Blocks up to the last one that counts for a feature map which a backbone returns or a model's heads read.

    Args:
        model: a backbone of transformers, a model around one, or a model whose attribute `read_blocks` says what it
            reads.
        sites: the model's attention layers.

    Returns:
        Their numbers in order. All if neither is known.
    """
    own = getattr(model, "read_blocks", None)  # a model of somebody else may call anything so
    read = [block for block in own if isinstance(block, int)] if isinstance(own, list) else put_out(model)
    last = max([level for level in read if level >= 0] or [site.level for site in sites])  # -1 is the stem
    return sorted({site.index for site in sites if site.level <= last})


def put_out(model: nn.Module) -> list[int]:
    """Numbers of the blocks after which a model's backbone takes its feature maps. Empty if there is no backbone."""
    return next((_stages(module) for module in model.modules() if hasattr(module, "stage_names")), [])


def _stages(backbone: Any) -> list[int]:
    """Numbers of the blocks after which a backbone takes its feature maps. The stem is -1."""
    stages = list(backbone.stage_names)
    offset = 1 if stages[:1] == ["stem"] else 0
    return [stages.index(name) - offset for name in backbone.out_features]
