# SPDX-License-Identifier: Apache-2.0
"""Finds the part of a model that reads text."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .inspection import parameter_names
from .targets import is_encoder_decoder


def text_reader(model: nn.Module) -> nn.Module | None:
    """The part of a model that reads token ids alone, without images or audio. None if there is none.

    It is searched inside wrappers (PEFT's models, a user's module) and inside models with several kinds of input.
    """
    whole: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        return None
    if whole.main_input_name == "input_ids" and is_encoder_decoder(whole):
        return whole.get_encoder()
    if is_encoder_decoder(whole):  # Whisper has token embeddings, but for its output
        return None
    if whole.config.get_text_config() is whole.config:
        return whole.base_model if whole.main_input_name == "input_ids" else None
    reader = whole.get_decoder()
    return reader if reader is not whole and "input_ids" in parameter_names(reader) else None
