# SPDX-License-Identifier: Apache-2.0
"""Refuses images of a size that the model does not accept."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names, unwrapped_forward
from ..models.patches import Patches
from .prompt_layer import PromptLayer

RESIZES = "interpolate_pos_encoding"


class ImageSizeCheck:
    """Raises an error that names the image size and the fix, before the model's own error.

    Args:
        model: the base model.
        patches: patch embedding of one of its towers.
        layers: prompt layers of this tower.
    """

    def __init__(self, model: nn.Module, patches: Patches, layers: list[PromptLayer]) -> None:
        self.model, self.patches, self.layers = model, patches, layers
        self._names = parameter_names(patches.owner)

    def attach(self) -> Any:
        return self.patches.owner.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = self.patches.image_size
        if own is None or torch.compiler.is_compiling() or not any(layer.working_adapters() for layer in self.layers):
            return
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        pixels = next((value for value in bound.values() if isinstance(value, Tensor) and value.ndim == 4), None)
        if pixels is None or tuple(pixels.shape[-2:]) == own:
            return
        rows, columns = pixels.shape[-2:]
        fix = self._fix(owner, bound, rows, columns)
        if fix is not None:
            raise ValueError(
                f"These images have {rows} x {columns} pixels, and the image_size of {type(self.model).__name__} is "
                f"{own[0]} x {own[1]}. Resize the images, as the model's image processor does, or {fix}."
            )

    def _fix(self, owner: nn.Module, bound: dict[str, Any], rows: int, columns: int) -> str | None:
        """How to make the model accept such images. None if it accepts them, or if no way is known."""
        if RESIZES in self._names:
            default = inspect.signature(unwrapped_forward(owner)).parameters[RESIZES].default
            return None if bound.get(RESIZES, default) else f"pass {RESIZES}=True with them"
        parts = (part for part in owner.modules() if getattr(part, "proj", None) is self.patches.embedding)
        if getattr(next(parts, None), "strict_img_size", False):  # timm
            return f"make the model with img_size=({rows}, {columns}) or dynamic_img_size=True"
        return None


def image_size_checks(model: nn.Module, layers: list[PromptLayer]) -> list[ImageSizeCheck]:
    """Make one check for each vision tower with prompts."""
    towers: dict[int, list[PromptLayer]] = {}
    for layer in layers:
        if layer.site.patches is not None:
            towers.setdefault(id(layer.site.patches.embedding), []).append(layer)
    found = []
    for own in towers.values():
        assert own[0].site.patches is not None
        found.append(ImageSizeCheck(model, own[0].site.patches, own))
    return found
