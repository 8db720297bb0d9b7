# SPDX-License-Identifier: Apache-2.0
"""Initial prompt rows that a text model is used to: its own layer inputs on random vocabulary tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.targets import is_encoder_decoder
from .rehearsal import listening


def can_read_vocabulary(model: nn.Module, length: int) -> bool:
    """Whether the model reads token ids and its weights are in memory, so that it can be run on some."""
    if getattr(model, "main_input_name", None) != "input_ids":  # Whisper has embeddings, for what it writes
        return False
    # RoBERTa counts its positions from 2.
    if length + 2 > getattr(model.config, "max_position_embeddings", length + 2):
        return False
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    return isinstance(embeddings, nn.Embedding)


def vocabulary_inputs(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """Layer inputs on random vocabulary tokens at every prompted attention layer, without prompts.

    Each row is a sequence of its own, so its first slot has what a model keeps in the first position of a text; causal
    language models rest their attention there.

    Args:
        model: the base model, prompt layers in place.
        rows: sequences N.
        length: tokens per sequence P.

    Returns:
        (N, P, D) by path of the attention layer.

    Raises:
        ValueError: the model cannot be run on token ids alone.
    """
    if not can_read_vocabulary(model, length):
        raise ValueError(
            "prompt_init='sample_vocab' runs the model on num_virtual_tokens vocabulary tokens, and this one has no "
            "token embeddings, too few positions, or weights that are not in memory. Set prompt_init='random'."
        )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(embeddings.num_embeddings, (rows, length)).to(embeddings.weight.device)
    reader = model.get_encoder() if is_encoder_decoder(model) else getattr(model, "base_model", model)  # type: ignore
    with listening(model) as heard:
        reader(input_ids=ids)
    return {name: runs[-1].layer_input for name, runs in heard.items()}
