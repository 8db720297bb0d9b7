# SPDX-License-Identifier: Apache-2.0
"""The attention layers that prompts join; unsuitable ones are left out with one message."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

from torch import nn

from ..models.reachable import CannotJoin
from ..models.sites import Site, find_site
from ..models.targets import is_encoder_decoder
from .trial import try_on_rows


def join_all(model: nn.Module, paths: list[str], tried: bool) -> list[Site]:
    """The attention layers at `paths`, which the user has named.

    Args:
        tried: whether prompts join them as keys and values, which is tried out first.

    Raises:
        CannotJoin: prompts cannot join one of them.
    """
    return [_site(model, path, tried) for path in paths]


def join_what_can_be(model: nn.Module, paths: list[str], tried: bool) -> list[Site]:
    """Those of the attention layers at `paths` that prompts can join; says once which it leaves out.

    Raises:
        ValueError: there is none, or none of a language model's own.
    """
    sites: list[Site] = []
    left_out: dict[str, CannotJoin] = {}
    for path in paths:
        try:
            sites.append(_site(model, path, tried))
        except CannotJoin as error:
            left_out[path] = error
    if not sites:
        raise next(iter(left_out.values()))
    _check_language_layers(model, sites)
    if left_out:
        warnings.warn(_say(left_out, len(sites)), stacklevel=5)
    return sites


def _site(model: nn.Module, path: str, tried: bool) -> Site:
    site = find_site(model, path)
    if tried:
        try_on_rows(site)
    return site


def _check_language_layers(model: Any, sites: list[Site]) -> None:
    """Refuse to prompt only the images of a language model whose own layers cannot be reached (GIT)."""
    writes = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    if is_encoder_decoder(model) or not writes or not hasattr(model.config, "get_text_config"):
        return
    text = model.config.get_text_config(decoder=True).model_type
    if all(getattr(getattr(site.attention, "config", None), "model_type", text) != text for site in sites):
        raise ValueError(
            f"Prompts would join {_pattern(sites[0].name)!r} of {type(model).__name__} and no layer of its language "
            "model, whose attention peft_promptmoe cannot reach: with text alone they would do nothing. Name the "
            "layers in `target_modules` if that is what you want, or use another model."
        )


def _say(left_out: dict[str, CannotJoin], joined: int) -> str:
    """One sentence for each kind of layer that is left out."""
    kinds = Counter((_pattern(path), error.reason) for path, error in left_out.items())
    reasons = [f"{number} of {kind!r} ({reason})" for (kind, reason), number in kinds.items()]
    return (
        f"Prompts join {joined} attention layers and leave out {len(left_out)} that they cannot join: "
        f"{'; '.join(reasons)}."
    )


def _pattern(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)
