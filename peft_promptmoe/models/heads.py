# SPDX-License-Identifier: Apache-2.0
"""Finds heads of models: image heads, which PEFT does not know, and heads that would stay frozen unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..adapter_state import PROMPT_CHILD
from .patches import Patches

# Names of the heads of transformers' vision models. timm models are asked with `get_classifier`.
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
    """Names of the heads of an image model to train with the prompts. A model may name them in `head_names`."""
    if isinstance(named := getattr(model, "head_names", None), list):
        return named
    # An encoder without a task has no head; its module of this name pools tokens (SigLIP).
    bare = any(child is patches.owner for child in model.children()) or patches.owner is model
    children = [] if bare else model.named_children()
    found = [name for name, child in children if name in HEADS and _has_parameters(child)]
    backbone: Any = getattr(model, "timm_model", model)
    if not hasattr(backbone, "get_classifier"):
        return found
    heads = backbone.get_classifier()
    wanted = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,)) if _has_parameters(head)}
    return found + [name for name, module in model.named_modules() if id(module) in wanted]


def text_heads(model: Any, paths: list[str]) -> list[str]:
    """Names of the heads of a model that does not predict vocabulary tokens. Such heads are new and must be trained.

    Args:
        model: a model of transformers, or a user's module around one.
        paths: paths of the attention layers that prompts join.
    """
    tower = getattr(model, "base_model", model) if isinstance(model, PreTrainedModel) else None
    if tower is None:
        tower = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    if tower is model or _writes(model) or _writes(tower):
        return []
    prompted = {path.split(".")[0] for path in paths}
    children = model.named_children()
    return [
        name
        for name, child in children
        if child is not tower and name not in prompted and name != PROMPT_CHILD and _has_parameters(child)
    ]


def _writes(model: Any) -> bool:
    """Whether the model predicts vocabulary tokens, with a head that was trained with the model."""
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def takes(name: str, path: str) -> bool:
    """Whether `name` in `modules_to_save` matches the module at `path`. PEFT matches every path that ends with it."""
    return path.endswith(name)


def apart(model: nn.Module, names: Iterable[str], own: Iterable[str]) -> list[str]:
    """Rewrite names for `modules_to_save` so that none matches a module and a part of it, or a part of an adapter.

    PEFT would wrap both (a "head" and the "head" inside it), and such an adapter cannot be loaded. The outer module is
    replaced by its parts, which hold all of its weights. A name that this package's own modules also have ("router")
    is replaced by the full paths of the model's modules.

    Args:
        model: the base model.
        names: names from the user or from the package.
        own: names of the package's own modules.

    Raises:
        ValueError: the outer module has weights that its parts do not have.
    """
    paths = [path for path, _ in model.named_modules() if path and PROMPT_CHILD not in path.split(".")]
    found = []
    for name in dict.fromkeys(names):
        ours = any(takes(name, part) for part in own)
        found += [path for path in paths if takes(name, path)] if ours else [name]
    while True:
        taken = {path: name for name in reversed(found) for path in paths if takes(name, path)}
        outer = next((path for path in taken if any(other.startswith(f"{path}.") for other in taken)), None)
        if outer is None:
            return found
        name = taken[outer]
        at = found.index(name)
        new: list[str] = []
        for path in (path for path in paths if takes(name, path)):
            # A path with which the outer module's path ends would match the outer module again.
            new += _parts(model, path) if takes(path, outer) else [path]
        found = list(dict.fromkeys([*found[:at], *new, *found[at + 1 :]]))


def _parts(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    if next(module.parameters(recurse=False), None) is not None:
        raise ValueError(
            f"modules_to_save matches every module whose path ends with a name: here {path!r} and also a part of it. "
            "Such an adapter could not be loaded. Name only parts of it in modules_to_save."
        )
    return [f"{path}.{name}" for name, child in module.named_children() if _has_parameters(child)]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None
