# SPDX-License-Identifier: Apache-2.0
"""What the engine needs of one attention layer's surroundings: block, norm, positions, patch grid."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .causality import answers_by_row, is_causal
from .families import Family
from .inspection import calls_attention_interface, calls_in_order, passes_on_keywords, unwrapped_forward
from .patches import Patches, find_patches
from .targets import (
    decoder_modules,
    family_of,
    input_width,
    is_cross_attention_layer,
    is_timm_attention,
)


@dataclass
class Site:
    """One attention layer that prompts can join, with what the engine needs of its surroundings.

    Attributes:
        name: path of the attention layer in the base model.
        index: number of the block, the first number in the path.
        attention: the attention layer.
        block: the transformer block that holds it.
        norm: module that makes the attention layer's input from the block's input; None for post-norm blocks.
        family: the table's entry, None where only the generic rule reached this layer.
        width: width `D` of the layer input.
        causal: whether what the layer puts out for a token depends on earlier tokens only (`is_causal`).
        by_token: whether the layer is causal and the model's outputs are read token by token, so that a router which
            reads a whole row would let answers reach what is put out before them.
        rotary: the model's rotary embedding, if it has one, and
        rotary_type: the layer type it takes, for models that keep one table per type.
        bias_owner: the attention layer that holds the T5 table of relative position biases this layer adds.
        input_std: spread of the block's input where it is knowable without running the model, else None.
        patches: of vision towers that have one patch grid, how it is made; else None.
    """

    name: str
    index: int
    attention: Any
    block: Any
    norm: Any
    family: Family | None
    width: int
    causal: bool
    by_token: bool
    rotary: Any
    rotary_type: str | None
    bias_owner: Any
    input_std: float | None
    patches: Patches | None = None

    @property
    def is_timm(self) -> bool:
        """Whether the attention layer is timm's, which does not go through transformers' AttentionInterface."""
        return is_timm_attention(self.attention, self.name)


def find_site(model: nn.Module, path: str) -> Site:
    """Describe the attention layer at `path`.

    Raises:
        ValueError: the module at `path` is not an attention layer that the engine can reach, or the architecture is
            one where its output is known to differ from the definition.
    """
    attention: Any = model.get_submodule(path)
    timm = is_timm_attention(attention, path)
    if not timm and not calls_attention_interface(attention):
        raise ValueError(
            f"`target_modules` matched {path!r}, a {type(attention).__name__}, which is not an attention layer that "
            "calls transformers' AttentionInterface. Name the attention layers themselves (for example 'self_attn'), "
            "not their projections, or leave `target_modules` unset."
        )
    if is_cross_attention_layer(path, attention) or id(attention) in decoder_modules(model):
        raise ValueError(
            f"`target_modules` matched {path!r}. Prompts join self-attention, and of an encoder-decoder the encoder's "
            "only; its decoder sees them through what the encoder puts out. Name layers of the encoder, or leave "
            "`target_modules` unset."
        )
    family = family_of(model, attention, path)
    if family is None and not timm:
        _check_reachable(attention, path)
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"{type(attention).__name__} with reorder_and_upcast_attn=True leaves out transformers' "
            "AttentionInterface, by which prompts join. Load the model with reorder_and_upcast_attn=False."
        )
    block_path, index = _block_of(path)
    block = model.get_submodule(block_path or path.rpartition(".")[0])
    width = input_width(attention)
    if width == 0:
        raise ValueError(
            f"{path!r}, a {type(attention).__name__}, belongs to a model of several widths, which prompts cannot "
            "join. Use a plain transformer."
        )
    patches = find_patches(model, path, width)
    if timm and patches is None:
        raise ValueError(
            f"{path!r} is a layer of a timm model without one patch grid (windows, or several resolutions), which "
            "prompts cannot join. Use a plain vision transformer."
        )
    # Rotary vision models turn the patches only, and prompts are no patches.
    rotary = _rotary_embedding(model, path) if patches is None else None
    causal = not timm and patches is None and is_causal(model, path)
    return Site(
        name=path,
        index=index,
        attention=attention,
        block=block,
        norm=_input_norm(model, path, block_path, None if timm else family),
        family=family,
        width=width,
        causal=causal,
        by_token=causal and not answers_by_row(model, path),
        rotary=rotary,
        rotary_type=_rotary_type(rotary, attention, block),
        bias_owner=_bias_owner(model, path, attention),
        input_std=_input_std(model, path, index, family),
        patches=patches,
    )


def _check_reachable(attention: nn.Module, path: str) -> None:
    """Refuse what the generic rule is known not to reach: layers with other inputs, or deaf to keyword arguments."""
    forward = unwrapped_forward(attention)
    reason = None
    if "hidden_states" not in inspect.signature(forward).parameters:
        reason = "it takes queries, keys and values from different inputs"
    elif not passes_on_keywords(forward):
        reason = "it does not pass keyword arguments on to the AttentionInterface, by which prompt rows travel"
    if reason is not None:
        raise ValueError(
            f"Prompts cannot join {path!r}, a {type(attention).__name__}: {reason}. This architecture is not "
            "supported; leave such layers out by `exclude_modules`, or use another model."
        )


def _block_of(path: str) -> tuple[str, int]:
    """Path and number of the block that holds the attention layer: everything up to the first number."""
    match = re.match(r"(?:.*?\.)?(\d+)(?=\.)", path)
    return (match.group(0), int(match.group(1))) if match else ("", 0)


def _input_norm(model: nn.Module, path: str, block_path: str, family: Family | None) -> nn.Module | None:
    """The norm between the block's input and the attention layer; None in post-norm blocks.

    Without a table entry it is the norm that the attention layer's parent (or its parent, up to the block) calls last
    before it calls attention.
    """
    parent_path, _, name = path.rpartition(".")
    if family is not None:
        return getattr(model.get_submodule(parent_path), family.norm) if family.norm else None
    while True:
        parent = model.get_submodule(parent_path)
        calls = calls_in_order(unwrapped_forward(parent))
        before = calls[: calls.index(name)] if name in calls else ()
        norms = [child for child in before if _is_norm(getattr(parent, child, None))]
        if norms and getattr(parent, "do_layer_norm_before", True):
            return getattr(parent, norms[-1])
        if parent_path == block_path or not parent_path:
            return None
        parent_path, _, name = parent_path.rpartition(".")


def _is_norm(module: object) -> bool:
    return isinstance(module, nn.Module) and "norm" in type(module).__name__.lower()


def _rotary_embedding(model: nn.Module, path: str) -> nn.Module | None:
    """The rotary module nearest to the attention layer; a model of several towers has several."""
    while path:
        path = path.rpartition(".")[0]
        for module in model.get_submodule(path).modules():
            if any(
                name == "inv_freq" or name.endswith("_inv_freq") for name, _ in module.named_buffers(recurse=False)
            ):
                return module
    return None


def _rotary_type(rotary: nn.Module | None, attention: nn.Module, block: nn.Module) -> str | None:
    if rotary is None or "layer_type" not in inspect.signature(unwrapped_forward(rotary)).parameters:
        return None
    for owner, name in ((attention, "layer_type"), (block, "attention_type"), (block, "layer_type")):
        found = getattr(owner, name, None)
        if isinstance(found, str):
            return found
    types = getattr(attention.config, "layer_types", None)
    return types[attention.layer_idx] if types is not None else None


def _bias_owner(model: nn.Module, path: str, attention: nn.Module) -> nn.Module | None:
    """T5 keeps one table in the first layer of a stack; UMT5 one in each layer."""
    if not hasattr(attention, "has_relative_attention_bias"):
        return None
    if attention.has_relative_attention_bias:
        return attention
    first = re.sub(r"^((?:.*?\.)?)\d+(?=\.)", r"\g<1>0", path)
    owner = model.get_submodule(first)
    return owner if getattr(owner, "has_relative_attention_bias", False) else None


def _input_std(model: nn.Module, path: str, index: int, family: Family | None) -> float | None:
    """Spread of a post-norm block's input: that of the LayerNorm that made it, sqrt(mean(weight^2 + bias^2))."""
    if family is None or family.input_norm is None or family.stem_norm is None:
        return None
    if index == 0:
        norm = next((m for name, m in model.named_modules() if name.endswith(family.stem_norm)), None)
    else:
        previous = re.sub(rf"^((?:.*?\.)?){index}\..*$", rf"\g<1>{index - 1}", path)
        norm = model.get_submodule(previous).get_submodule(family.input_norm)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    bias = getattr(norm, "bias", None)
    square = weight.detach().float().square().mean()
    if isinstance(bias, torch.Tensor):
        square = square + bias.detach().float().square().mean()
    return float(square.sqrt())


def caps_scores(site: Site) -> bool:
    """Whether the attention layer squashes its scores before the softmax (Gemma 2)."""
    return getattr(site.attention, "attn_logit_softcapping", None) is not None
