# SPDX-License-Identifier: Apache-2.0
"""Whether attention is causal, and whether the model's output is read token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .inspection import unwrapped_forward
from .targets import is_encoder_decoder, model_type

# In the names of classes that give one answer for a row, and so may read all of it.
ONE_ANSWER = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "WithProjection",
)


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether what the text attention layer at `path` puts out for a token may depend on earlier tokens only.

    The layer's own word for it is enough. Where it says no, or nothing, its model can still be one that writes (behind
    a prefix that sees itself, as PaliGemma), or one that hands the layer causal masks (CLIP's text tower, Doge).
    """
    attention: Any = model.get_submodule(path)
    if getattr(attention, "is_causal", False):
        return True
    owners = [owner for owner in _owners(model, path) if isinstance(owner, PreTrainedModel)]
    return any(_writes_with(owner, attention) for owner in owners) or _masks_causally(owners)


def answers_by_row(model: nn.Module, path: str) -> bool:
    """Whether the attention layer at `path` belongs to a model that is known to give one answer for a row."""
    owners = list(_owners(model, path))
    names = (base.__name__ for owner in owners for base in type(owner).__mro__)
    # Models that are trained to bring texts and images together read one feature off each (CLIP).
    return any(kind in name for name in names for kind in ONE_ANSWER) or any(
        hasattr(owner, "get_text_features") and hasattr(owner, "get_image_features") for owner in owners
    )


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold the one at `path`, from the inside out."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def _writes_with(owner: PreTrainedModel, attention: nn.Module) -> bool:
    """Whether the model generates text with the attention layer, or is the body of one that does."""
    if is_encoder_decoder(owner):
        return False
    if not owner.can_generate() and model_type(owner) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return False
    return any(module is attention for module in owner.get_decoder().modules())


def _masks_causally(owners: list[PreTrainedModel]) -> bool:
    """Whether the innermost model makes causal masks, and no others."""
    if not owners or getattr(owners[0].config, "use_bidirectional_attention", False):
        return False
    code = getattr(unwrapped_forward(owners[0]), "__code__", None)
    names = code.co_names if code is not None else ()
    return any("causal_mask" in name for name in names) and not any("bidirectional" in name for name in names)
