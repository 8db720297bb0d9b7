# SPDX-License-Identifier: Apache-2.0
"""Finds out whether attention is causal, and whether the model's output is read token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .inspection import unwrapped_forward
from .targets import is_encoder_decoder, model_type

# Parts of the names of classes that give one answer per row, and so may read the whole row.
ONE_ANSWER = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "WithProjection",
)


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether the text attention layer at `path` is causal: a token's output may depend on earlier tokens only.

    True if the layer itself says so. If it says no or nothing, it is still treated as causal in a model that generates
    text (PaliGemma, whose prefix attends to itself) or that passes causal masks to the layer (CLIP's text tower,
    Doge).
    """
    attention: Any = model.get_submodule(path)
    if getattr(attention, "is_causal", False):
        return True
    owners = [owner for owner in _owners(model, path) if isinstance(owner, PreTrainedModel)]
    return any(_writes_with(owner, attention) for owner in owners) or _masks_causally(owners)


def answers_by_row(model: nn.Module, path: str) -> bool:
    """Whether the attention layer at `path` belongs to a model that is known to give one answer per row."""
    owners = list(_owners(model, path))
    names = (base.__name__ for owner in owners for base in type(owner).__mro__)
    # Models of texts and images (CLIP) read one feature from each text.
    return any(kind in name for name in names for kind in ONE_ANSWER) or any(
        hasattr(owner, "get_text_features") and hasattr(owner, "get_image_features") for owner in owners
    )


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that contain the one at `path`, from the inside out."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def _writes_with(owner: PreTrainedModel, attention: nn.Module) -> bool:
    """Whether the model generates text with this attention layer, or is the body of a model that does."""
    if is_encoder_decoder(owner):
        return False
    if not owner.can_generate() and model_type(owner) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return False
    return any(module is attention for module in owner.get_decoder().modules())


def _masks_causally(owners: list[PreTrainedModel]) -> bool:
    """Whether the innermost model makes causal masks only."""
    if not owners or getattr(owners[0].config, "use_bidirectional_attention", False):
        return False
    code = getattr(unwrapped_forward(owners[0]), "__code__", None)
    names = code.co_names if code is not None else ()
    return any("causal_mask" in name for name in names) and not any("bidirectional" in name for name in names)
