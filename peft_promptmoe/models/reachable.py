# SPDX-License-Identifier: Apache-2.0
"""Decides which attention layers prompts cannot join, and why, from their structure, before anything is changed."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from .inspection import gives, passes_on_keywords, reads_into, unwrapped_forward
from .patches import Patches

# Required arguments of an attention layer that can be supplied for prompt rows. All others must have defaults.
ROWS_HAVE = ("hidden_states", "attention_mask", "position_embeddings", "position_ids")
PACKED = ("cu_seqlens", "cu_seq_lens", "cu_window_seqlens")

# Errors that model code may raise when a part of it is run with fewer inputs than it expects.
TROUBLE = (AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


class CannotJoin(ValueError):
    """Error: prompts cannot join an attention layer. They may still be able to join other layers of the model.

    Args:
        path: path of the layer.
        attention: the layer.
        reason: the reason, as the end of a sentence after a colon.
    """

    def __init__(self, path: str, attention: nn.Module, reason: str) -> None:
        super().__init__(
            f"Prompts cannot join {path!r}, a {type(attention).__name__}: {reason}. This architecture is not "
            "supported. Leave such layers out with `exclude_modules`, or use another model."
        )
        self.reason = reason


def check_reachable(
    model: nn.Module, path: str, patches: Patches | None, rotary: nn.Module | None, biases: nn.Module | None
) -> None:
    """Raise CannotJoin for layers in which prompts are known not to work.

    Args:
        model: the base model.
        path: path of the attention layer.
        patches, rotary, biases: as in `Site`; `biases` is its `bias_owner`.

    Raises:
        CannotJoin: prompts cannot join the layer. The message gives the reason.
    """
    attention: Any = model.get_submodule(path)
    reason = (
        _inputs(attention)
        or _order_of_tokens(model, path)
        or _positions(attention, patches, rotary, biases)
        or _biases_of_the_stack(model, path, attention)
    )
    if reason is not None:
        raise CannotJoin(path, attention, reason)


def _inputs(attention: nn.Module) -> str | None:
    """Why the layer cannot be run on prompt rows alone. None if it can."""
    forward = unwrapped_forward(attention)
    parameters = inspect.signature(forward).parameters
    if "hidden_states" not in parameters:
        return "it takes queries, keys and values from different inputs"
    if getattr(attention, "is_kv_shared_layer", False):
        return "it has no keys and values of its own and takes those of another layer"
    packed = [name for name in PACKED if name in parameters]
    if packed:
        return f"it takes the patches of several images in one row ({packed[0]})"
    if not passes_on_keywords(forward) and not hands_on_its_mask_only(attention):
        return "it does not pass keyword arguments on to the AttentionInterface, by which prompt rows travel"
    return None


def _order_of_tokens(model: nn.Module, path: str) -> str | None:
    """Why the layer does not attend over the tokens of its block (windows, several resolutions). None if it does."""
    attention: Any = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    config = attention.config
    if hasattr(config, "depths") or hasattr(config, "hidden_sizes") or hasattr(parent, "window_size"):
        return "it attends within windows or over several resolutions, not over all tokens of its block"
    convolutions = (part for part in parent.children() if isinstance(part, nn.Conv1d))
    if any(stride > 1 for part in convolutions for stride in part.stride):
        return "a convolution before it makes fewer tokens of its block's"
    return None


def _positions(
    attention: nn.Module, patches: Patches | None, rotary: nn.Module | None, biases: nn.Module | None
) -> str | None:
    """Why prompt rows cannot get positions in this layer. None if they can."""
    if biases is None and gives(unwrapped_forward(attention), "position_bias"):
        return "it adds a relative position bias of a form that prompts cannot be given"
    if "position_embeddings" not in inspect.signature(unwrapped_forward(attention)).parameters:
        return None
    if patches is not None:
        return "it applies a rotary embedding to its patches, and prompts have no position in it"
    if rotary is None and not turns_keys(attention):
        return "it takes position embeddings, and no rotary embedding that makes them was found"
    return None


def _biases_of_the_stack(model: nn.Module, path: str, attention: Any) -> str | None:
    """Why a layer does not add the biases of its own table: its stack makes other biases (UDOP). None if it does."""
    if not hasattr(attention, "has_relative_attention_bias"):
        return None
    stack = model.get_submodule(re.sub(r"\.?[^.]+\.\d+\..*$", "", path))
    others = (part for part in stack.children() if not isinstance(part, nn.ModuleList))
    if any(hasattr(module, "relative_attention_bias") for part in others for module in part.modules()):
        return "it adds a relative position bias of a form that prompts cannot be given"
    return None


def check_timm(attention: Any, path: str) -> None:
    """Raise CannotJoin for timm attention layers with windows, or with fewer queries than tokens.

    Raises:
        CannotJoin: prompts cannot join the layer. The message gives the reason.
    """
    if getattr(attention, "use_mask_unit_attn", False):
        raise CannotJoin(path, attention, "it attends within windows, not over all tokens of its block")
    if getattr(attention, "q_stride", 1) > 1:
        raise CannotJoin(path, attention, "it merges its queries, so that there are fewer of them than tokens")


def turns_keys(attention: nn.Module) -> bool:
    """Whether the layer's own code applies a rotary embedding to queries and keys."""
    return any("rot" in name for name in unwrapped_forward(attention).__code__.co_names)


def hands_on_its_mask_only(attention: nn.Module) -> bool:
    """Whether the layer passes its mask on unchanged, but no keyword arguments."""
    forward = unwrapped_forward(attention)
    named = "attention_mask" in inspect.signature(forward).parameters
    return named and not passes_on_keywords(forward) and not reads_into(forward, "attention_mask")


def is_differential(attention: nn.Module) -> bool:
    """Whether the layer subtracts two attention maps (differential transformer, arXiv 2410.05258)."""
    return any(name.startswith("lambda_q") for name, _ in attention.named_parameters(recurse=False))
