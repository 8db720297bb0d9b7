# SPDX-License-Identifier: Apache-2.0
"""Finds the query: the tokens of a row that sample routing may read in a causal language model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .call_arguments import attention_mask, real_tokens


def query_of(bound: dict[str, Any]) -> Tensor | None:
    """Tokens that routers of a causal language model may read, (B or 1, T). None if the arguments do not tell.

    With labels: the tokens before the first label. Without labels, but with logits requested for the last tokens only:
    the tokens up to the first of these. The tokens after it are guesses of assisted decoding, or answers that a
    trainer scores.

    Args:
        bound: arguments of the base model, or of a module inside it, by name.
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
    """Raise ValueError: the query is unknown in training, so routers would learn from the answers."""
    raise ValueError(
        "routing='sample' on a causal model needs labels to know which tokens are the query, and this training "
        "forward has none (label smoothing and compute_loss_func remove them). Routers would read the answer. Pass "
        "labels, give the number of query tokens with peft_promptmoe.given_query, or use routing='token', which never "
        "looks ahead."
    )


def warn_of_whole_rows() -> None:
    """Warn that routers read whole texts, which is right for generation and wrong for scoring texts."""
    warnings.warn(
        "routing='sample' on a causal model reads the whole input when no labels are given. This is right for "
        "generate(). But scores of a text leak later tokens into earlier ones, and they depend on the batch if texts "
        "are padded without an attention mask (as lm-eval does). To score texts, pass labels with the query set to "
        "-100, give the number of query tokens with peft_promptmoe.given_query, or use routing='token'.",
        stacklevel=2,
    )


def warn_of_no_query(query: Tensor) -> None:
    """Warn if no row has a query, for example because the labels are the input ids. Routers then learn nothing.

    Args:
        query: (B, T) from `query_of`, with padding removed.
    """
    if not bool(query.any()):
        warnings.warn(
            "No row of this batch has a query: the labels start at the first token. With routing='sample' the routers "
            "then read nothing and get no gradient. Set the labels of the query to -100, or use routing='token'.",
            stacklevel=2,
        )
