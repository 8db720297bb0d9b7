# SPDX-License-Identifier: Apache-2.0
"""Heads of models: image heads, which PEFT does not know, and heads that would stay frozen unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..adapter_state import PROMPT_CHILD
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
    """Names of the heads of an image model that train along with prompts; a model may say so itself (`head_names`)."""
    if isinstance(named := getattr(model, "head_names", None), list):
        return named
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


def text_heads(model: Any, paths: list[str]) -> list[str]:
    """Names of the heads of a model that has no vocabulary to put out: they are new, and useless until they train.

    Args:
        model: a model of transformers, or a user's own around one.
        paths: of the attention layers that prompts join.
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
    """Whether the model puts out words, by a head that was trained along with it."""
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def takes(name: str, path: str) -> bool:
    """Whether PEFT takes a module for one that `name` in `modules_to_save` means: any whose path ends so."""
    return path.endswith(name)


def apart(model: nn.Module, names: Iterable[str], own: Iterable[str]) -> list[str]:
    """Names for `modules_to_save` none of which takes a module and also a part of it, or a part of an adapter.

    PEFT would wrap both (a "head" and the "head" within it), and such an adapter does not load. In the place of the
    outer one come its parts, which hold all of its weights. A name that our own modules end with ("router") is written
    as the whole paths of the others that do.

    Args:
        model: the base model.
        names: as the user or we have them.
        own: names of our modules.

    Raises:
        ValueError: the outer one has weights beside those of its parts.
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
            # A path that the outer one ends with would take it again.
            new += _parts(model, path) if takes(path, outer) else [path]
        found = list(dict.fromkeys([*found[:at], *new, *found[at + 1 :]]))


def _parts(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    if next(module.parameters(recurse=False), None) is not None:
        raise ValueError(
            f"modules_to_save takes every module whose path ends as it says, so {path!r} and also a part of it, and "
            "such an adapter could not be loaded. Name parts of it in modules_to_save that hold no other."
        )
    return [f"{path}.{name}" for name, child in module.named_children() if _has_parameters(child)]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None
