# SPDX-License-Identifier: Apache-2.0
"""Heads of image models, which PEFT cannot name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .patches import Patches

# Heads of transformers' vision models, children of the model itself; timm's are asked for by `get_classifier`.
HEADS = (
    "classifier",
    "cls_classifier",
    "distillation_classifier",
    "head",
    "decode_head",
    "auxiliary_head",
    "fpn",
    "neck",
)


def vision_heads(model: nn.Module, patches: Patches) -> list[str]:
    """Names of the heads of an image model that train along with prompts."""
    # A bare encoder has no head; what is called so there (SigLIP) pools.
    bare = any(child is patches.owner for child in model.children()) or patches.owner is model
    children = [] if bare else model.named_children()
    found = [name for name, child in children if name in HEADS and _has_parameters(child)]
    backbone: Any = getattr(model, "timm_model", model)
    if not hasattr(backbone, "get_classifier"):
        return found
    heads = backbone.get_classifier()
    wanted = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,)) if _has_parameters(head)}
    return found + [name for name, module in model.named_modules() if id(module) in wanted]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None
