# SPDX-License-Identifier: Apache-2.0
"""What a model card says about the base model, read from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BaseModelCard:
    """What a model card says about the base model.

    Attributes:
        num_labels: number of outputs of its head.
        class_names: names of these outputs, in order. Empty if the user gave none.
        timm_weights: name and tag of timm's weights. None for models of transformers.
        trained: False for a timm model that still has its initial random weights.
        image_size: (rows, columns) in pixels. None for text models.
        resized: whether `image_size` differs from the size of timm's weights.
        channels: number of channels of an image.
        classifies_images: whether the outputs are scores of image classes.
        own_class: whether the model's class is of this package. PEFT must then be told to import it.
    """

    num_labels: int = 2
    class_names: tuple[str, ...] = ()
    timm_weights: str | None = None
    trained: bool = True
    image_size: tuple[int, int] | None = None
    resized: bool = False
    channels: int = 3
    classifies_images: bool = False
    own_class: bool = False


def base_model_card(model: Any) -> BaseModelCard:
    """Read from a model what its card says about it."""
    if type(model).__module__.split(".")[0] == __package__.split(".")[0]:
        return BaseModelCard(own_class=True)
    timm = getattr(model, "pretrained_cfg", None)
    if timm and not hasattr(model, "config"):
        return _of_timm(model, timm)
    config = getattr(model, "config", None)
    return BaseModelCard(
        num_labels=getattr(config, "num_labels", 2),
        class_names=_class_names(config),
        image_size=_sides(getattr(config, "image_size", None)),
        channels=getattr(config, "num_channels", 3),
        classifies_images=type(model).__name__.endswith("ForImageClassification"),
    )


def _of_timm(model: Any, timm: Any) -> BaseModelCard:
    usual = tuple(timm.get("input_size", ()))
    own = _sides(getattr(getattr(model, "patch_embed", None), "img_size", None)) or usual[1:]
    return BaseModelCard(
        num_labels=getattr(model, "num_classes", 0),
        timm_weights=".".join(part for part in (timm.get("architecture"), timm.get("tag")) if part),
        trained=not _is_untouched(model),
        image_size=(own[0], own[1]) if len(own) == 2 else None,
        resized=tuple(own) != usual[1:],
        channels=usual[0] if usual else 3,
        classifies_images=getattr(model, "num_classes", 0) > 0,
    )


def _is_untouched(model: nn.Module) -> bool:
    """Whether all biases of the model's linear layers are still zero, their initial value in timm.

    timm does not store whether `pretrained=True` was used.
    """
    biases = [layer.bias for layer in model.modules() if isinstance(layer, nn.Linear) and layer.bias is not None]
    biases = [bias for bias in biases if not bias.is_meta]
    return bool(biases) and not any(bool(bias.detach().any()) for bias in biases)


def _class_names(config: Any) -> tuple[str, ...]:
    """Class names that a user gave. transformers' default names (`LABEL_0`, ...) do not count."""
    named = getattr(config, "id2label", None) or {}
    names = tuple(str(named[number]) for number in sorted(named))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _sides(size: Any) -> tuple[int, int] | None:
    """(rows, columns) from a size given as one side or as both."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None
