# SPDX-License-Identifier: Apache-2.0
"""Chooses the attention layers that prompts join. Unsuitable layers are left out with one warning."""

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


def join_all(model: nn.Module, paths: list[str], tried: bool, windows: bool) -> list[Site]:
    """Return the attention layers at `paths`, which the user has named.

    Args:
        model: the base model.
        paths: paths of attention layers.
        tried: whether prompts join as keys and values. The layers are then tried on a few rows first.
        windows: as in `find_site`.

    Raises:
        CannotJoin: prompts cannot join one of them.
    """
    return [_site(model, path, tried, windows) for path in paths]


def join_what_can_be(model: nn.Module, paths: list[str], tried: bool, windows: bool) -> list[Site]:
    """Return the attention layers at `paths` that prompts can join. One warning names the layers that are left out.

    Raises:
        ValueError: there is none, or none in the language model of a model with several parts.
    """
    sites: list[Site] = []
    left_out: dict[str, CannotJoin] = {}
    for path in paths:
        try:
            sites.append(_site(model, path, tried, windows))
        except CannotJoin as error:
            left_out[path] = error
    if not sites:
        raise next(iter(left_out.values()))
    _check_language_layers(model, sites)
    if left_out:
        warnings.warn(_say(left_out, len(sites)), stacklevel=5)
    return sites


def _site(model: nn.Module, path: str, tried: bool, windows: bool) -> Site:
    site = find_site(model, path, windows)
    if tried:
        try_on_rows(site)
    return site


def _check_language_layers(model: Any, sites: list[Site]) -> None:
    """Raise ValueError if only the image tower of a language model can be prompted (GIT)."""
    writes = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    if is_encoder_decoder(model) or not writes or not hasattr(model.config, "get_text_config"):
        return
    text = model.config.get_text_config(decoder=True).model_type
    if all(getattr(getattr(site.attention, "config", None), "model_type", text) != text for site in sites):
        raise ValueError(
            f"Prompts would join {_pattern(sites[0].name)!r} of {type(model).__name__} and no layer of its language "
            "model, because peft_promptmoe cannot reach its attention. With text alone prompts would have no effect. "
            "Name the layers in `target_modules` if you want this, or use another model."
        )


def _say(left_out: dict[str, CannotJoin], joined: int) -> str:
    """The warning about layers that are left out, with one reason per kind of layer."""
    kinds = Counter((_pattern(path), error.reason) for path, error in left_out.items())
    reasons = [f"{number} of {kind!r} ({reason})" for (kind, reason), number in kinds.items()]
    return (
        f"Prompts join {joined} attention layers and leave out {len(left_out)} that they cannot join: "
        f"{'; '.join(reasons)}."
    )


def _pattern(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)
