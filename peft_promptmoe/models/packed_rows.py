# SPDX-License-Identifier: Apache-2.0
"""Refuses packed rows (several samples in one row) for sample routing, which cannot tell them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .call_arguments import SHUT, attention_mask, given_cache, real_tokens

MASKS = ("attention_mask", "decoder_attention_mask")


def refuse_packed_rows(bound: dict[str, Any], causal: bool, outermost: bool) -> None:
    """Raise ValueError if rows hold several samples although routers read whole rows.

    Args:
        bound: arguments of the base model, or of a module inside it, by name.
        causal: whether such a router is in a causal layer. Otherwise position ids that start again are allowed: they
            may belong to a pair of texts.
        outermost: whether the arguments are the caller's. Arguments that the model computed tell nothing new.

    Raises:
        ValueError: the rows are packed. In compiled code only `cu_seq_lens_q` is checked.
    """
    told = bound.get("cu_seq_lens_q") is not None or (causal and starts_again(bound, outermost))
    if told or (outermost and parts_by_mask(bound)):
        raise ValueError(
            "routing='sample' chooses experts once per row, but these rows are packed with several samples. Use "
            "routing='token', or do not pack (in TRL: packing=False and padding_free=False)."
        )


def starts_again(bound: dict[str, Any], outermost: bool) -> bool:
    """Whether position ids start again inside a row, as in rows packed with several samples.

    Without a mask and a cache, a caller's position ids that do not count up by one mean packed rows; transformers uses
    the same rule, which also finds samples of one token. Otherwise position ids must go back after a real token.
    """
    positions = bound.get("position_ids")
    if not isinstance(positions, Tensor):
        return False
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # the text's positions; the others are time, height and width (Qwen2-VL)
    if positions.ndim != 2 or positions.shape[1] == 1 or _has_no_values(positions):
        return False
    step, mask = positions.diff(dim=1), attention_mask(bound)
    if outermost and bound.get("attention_mask") is None and given_cache(bound) is None:
        return bool((step != 1).any())
    back = step < 0
    if mask is not None:
        length = positions.shape[1]
        real = real_tokens(mask, length) if mask.ndim == 4 else mask[:, -length:].bool()
        back = back if real is None else back & real[:, :-1] & real[:, 1:]
    return bool(back.any())


def parts_by_mask(bound: dict[str, Any]) -> bool:
    """Whether a mask hides a real token from the next real token, as between two samples."""
    for name in MASKS:
        given = bound.get(name)
        masks: list[Any] = list(given.values()) if isinstance(given, dict) else [given]
        if all(map(_is_square, masks)):
            # Chunked attention starts anew at every chunk, but the model's other layers see across.
            apart = [_apart(mask) for mask in masks]
            if bool(torch.stack(apart).all(dim=0).any()):
                return True
    return False


def _is_square(mask: Any) -> bool:
    known = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == mask.shape[3]
    return known and mask.shape[2] > 1 and not _has_no_values(mask)


def _apart(mask: Tensor) -> Tensor:
    """(B, T-1) whether the mask separates two neighbouring real tokens."""
    real = real_tokens(mask, mask.shape[2])
    assert real is not None
    seen = mask if mask.dtype == torch.bool else mask > SHUT
    before = torch.diagonal(seen[:, 0], offset=-1, dim1=-2, dim2=-1)
    return ~before & real[:, :-1] & real[:, 1:]


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor) or torch.compiler.is_compiling()
