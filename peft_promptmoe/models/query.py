# SPDX-License-Identifier: Apache-2.0
"""What routers that read a whole row may read of it: the query of a causal language model, and one sample only."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .call_arguments import attention_mask, given_cache, real_tokens


def refuse_packed_rows(bound: dict[str, Any]) -> None:
    """Refuse rows that hold several samples, of which one choice of experts would be made.

    Args:
        bound: the base model's arguments by name.

    Raises:
        ValueError: the rows are packed. Compiled code cannot tell by position ids.
    """
    if bound.get("cu_seq_lens_q") is not None or starts_again(bound):
        raise ValueError(
            "routing='sample' chooses experts once per row and packed rows hold several samples. Use "
            "routing='token', or do not pack."
        )


def starts_again(bound: dict[str, Any]) -> bool:
    """Whether position ids go back behind a real token, which is how rows are packed with several samples."""
    positions, mask = bound.get("position_ids"), attention_mask(bound)
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] == 1:
        return False
    if positions.is_meta or torch.compiler.is_compiling():
        return False
    back = positions[:, 1:] < positions[:, :-1]
    if mask is not None:
        length = positions.shape[1]
        real = real_tokens(mask, length) if mask.ndim == 4 else mask[:, -length:].bool()
        back = back if real is None else back & real[:, :-1] & real[:, 1:]
    return bool(back.any())


def query_of(model: nn.Module, bound: dict[str, Any]) -> Tensor | None:
    """(B or 1, T) tokens that routers of a causal language model may read; None for all.

    They are those before the first label. Without labels, and with logits asked for at the last tokens only, they are
    those up to the first of these: what follows are guesses of assisted decoding.

    Args:
        model: the base model.
        bound: its arguments by name.
    """
    labels = bound.get("labels")
    if labels is None:
        refuse_training_without_labels(model)
        return _before_last(bound)
    answered = labels != -100
    mask = attention_mask(bound)
    if mask is not None:
        real = mask.bool() if mask.ndim == 2 else real_tokens(mask, labels.shape[1])
        answered = answered if real is None else answered & real
    return answered.cumsum(dim=1) == 0


def refuse_training_without_labels(model: nn.Module) -> None:
    """Refuse what would let routers read the answers."""
    if model.training:
        raise ValueError(
            "routing='sample' on a causal language model learns which tokens are the query from the labels, and "
            "this training forward has none (label smoothing and compute_loss_func take them away), so routers "
            "would read the answer. Pass labels, or use routing='token', which never looks ahead."
        )


def _before_last(bound: dict[str, Any]) -> Tensor | None:
    kept = bound.get("logits_to_keep")
    tokens = next((bound[name] for name in ("input_ids", "inputs_embeds") if bound.get(name) is not None), None)
    if isinstance(kept, int) and kept > 1 and tokens is not None:
        length = tokens.shape[1]
        return (torch.arange(length, device=tokens.device) <= length - kept)[None]
    if given_cache(bound) is None and not torch.compiler.is_compiling():
        warnings.warn(
            "routing='sample' on a causal language model reads the whole input when no labels are given. That is "
            "right for generate(), but scores of a text leak later tokens into earlier ones: pass labels with the "
            "query set to -100, or use routing='token'.",
            stacklevel=2,
        )
    return None


def warn_of_no_query(query: Tensor) -> None:
    """Say so if no row has a query, as with labels that are the input ids: routers then learn nothing.

    Args:
        query: (B, T) of `query_of`, without padding.
    """
    if not bool(query.any()):
        warnings.warn(
            "No row of this batch has a query: the labels begin with the first token, so the routers of "
            "routing='sample' read nothing and get no gradient. Set the labels of the query to -100, or use "
            "routing='token'.",
            stacklevel=2,
        )
