# SPDX-License-Identifier: Apache-2.0
"""What a model card says about the base model, read from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BaseModelCard:
    """What a card has to say of the base model.

    Attributes:
        num_labels: outputs of its head.
        class_names: of its outputs, in order; empty where nobody has named them.
        timm_weights: name and tag of timm's weights; None for models of transformers.
        trained: False for a timm model that still has the weights it was initialised with.
        image_size: rows and columns of pixels; None for text.
        resized: whether `image_size` is another than that of timm's weights.
        channels: of an image.
        classifies_images: whether its outputs are scores of an image's classes.
        own_class: whether it is a class of this package, which PEFT imports only where it is told to.
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
    """Read off a model what its card has to say."""
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
    """Whether no bias of the model's linear layers has left the zero at which timm starts it.

    timm keeps no note of whether `pretrained=True` was asked for.
    """
    biases = [layer.bias for layer in model.modules() if isinstance(layer, nn.Linear) and layer.bias is not None]
    biases = [bias for bias in biases if not bias.is_meta]
    return bool(biases) and not any(bool(bias.detach().any()) for bias in biases)


def _class_names(config: Any) -> tuple[str, ...]:
    """Names that somebody gave; transformers' own are `LABEL_0` and so on."""
    named = getattr(config, "id2label", None) or {}
    names = tuple(str(named[number]) for number in sorted(named))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _sides(size: Any) -> tuple[int, int] | None:
    """(rows, columns) of a size that is one side or both."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None
