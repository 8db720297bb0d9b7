# SPDX-License-Identifier: Apache-2.0
"""The query: the part of a row that sample routing may read in a causal language model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .call_arguments import attention_mask, real_tokens


def query_of(bound: dict[str, Any]) -> Tensor | None:
    """(B or 1, T) tokens that routers of a causal language model may read; None where the arguments do not tell.

    They are those before the first label. Without labels, and with logits asked for at the last tokens only, they are
    those up to the first of these: what follows are guesses of assisted decoding, or answers that a trainer scores.

    Args:
        bound: the arguments of the base model, or of a module within it, by name.
    """
    labels = bound.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return _before_last(bound)
    answered = labels != -100
    mask = attention_mask(bound)
    if mask is not None:
        real = mask.bool() if mask.ndim == 2 else real_tokens(mask, labels.shape[1])
        answered = answered if real is None or real.shape != answered.shape else answered & real
    return answered.cumsum(dim=1) == 0


def _before_last(bound: dict[str, Any]) -> Tensor | None:
    kept = bound.get("logits_to_keep")
    tokens = next((bound[name] for name in ("input_ids", "inputs_embeds") if bound.get(name) is not None), None)
    if isinstance(kept, int) and kept > 1 and isinstance(tokens, Tensor):
        length = tokens.shape[1]
        return (torch.arange(length, device=tokens.device) <= length - kept)[None]
    return None


def refuse_unknown_query() -> None:
    """Refuse what would let routers learn from the answers."""
    raise ValueError(
        "routing='sample' on a causal model learns which tokens are the query from the labels, and this training "
        "forward has none (label smoothing and compute_loss_func take them away), so routers would read the answer. "
        "Pass labels, say how many tokens are the query by peft_promptmoe.given_query, or use routing='token', which "
        "never looks ahead."
    )


def warn_of_whole_rows() -> None:
    """Say that routers read all of a text, which is right for generation and wrong for scores."""
    warnings.warn(
        "routing='sample' on a causal model reads the whole input when no labels are given. That is right for "
        "generate(), but scores of a text leak later tokens into earlier ones, and where texts are padded without an "
        "attention mask (as lm-eval does) they depend on the batch: pass labels with the query set to -100, say how "
        "many tokens are the query by peft_promptmoe.given_query, or use routing='token'.",
        stacklevel=2,
    )


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
