# SPDX-License-Identifier: Apache-2.0
"""Finds the surroundings of an attention layer: its block, the norm in front of it, the source of its positions."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from .families import FOUND, Family
from .inspection import calls_in_order, parameter_names, unwrapped_forward

# Blocks in stages: the list of stages, the number of the stage, the number of the block in it.
_STAGE = re.compile(r"((?:.*?\.)?layers)\.(\d+)\.blocks\.(\d+)(?=\.)")


def stage_of(path: str) -> int | None:
    """Number of the stage in which a block is (Swin). None if the blocks are not in stages."""
    found = _STAGE.match(path)
    return int(found.group(2)) if found is not None else None


def block_of(model: nn.Module, path: str) -> tuple[str, int]:
    """Path and number of the attention layer's block: the path up to the first number, and this number.

    Blocks in stages are counted over all stages, in the order in which they run.
    """
    if (found := _STAGE.match(path)) is not None:
        stages: Any = model.get_submodule(found.group(1))
        # Stages of convolutions in front may have no blocks.
        before = sum(len(getattr(stage, "blocks", ())) for stage in stages[: int(found.group(2))])
        return found.group(0), before + int(found.group(3))
    match = re.match(r"(?:.*?\.)?(\d+)(?=\.)", path)
    return (match.group(0), int(match.group(1))) if match else ("", 0)


def input_norm(model: nn.Module, path: str, block_path: str, family: Family | None) -> nn.Module | None:
    """The norm between the residual stream and the attention layer. None in post-norm blocks.

    For layers without a table entry: the last norm that a parent of the attention layer (up to the block) calls before
    it calls attention.
    """
    parent_path, _, name = path.rpartition(".")
    if family is not None and family.norm != FOUND:
        names = (family.norm,) if isinstance(family.norm, str) else family.norm or ()
        here = dict(model.get_submodule(parent_path).named_children())
        return next((here[each] for each in names if each in here), None)
    while True:
        parent = model.get_submodule(parent_path)
        if isinstance(parent, nn.Sequential):  # parallel blocks of timm call their parts in this order
            children = dict(parent.named_children())
            found = [norm for norm in list(children.values())[: list(children).index(name)] if _as_norm(norm, None)]
            return found[-1] if found else None
        number = None
        if isinstance(parent, nn.ModuleList):  # LongCat: two attention layers and their norms in one block
            number, (parent_path, _, name) = int(name), parent_path.rpartition(".")
            parent = model.get_submodule(parent_path)
        calls = calls_in_order(unwrapped_forward(parent))
        before = calls[: calls.index(name)] if name in calls else ()
        norms = [norm for child in before if (norm := _as_norm(getattr(parent, child, None), number)) is not None]
        if norms and getattr(parent, "do_layer_norm_before", True):
            return norms[-1]
        if parent_path == block_path or not parent_path:
            return None
        parent_path, _, name = parent_path.rpartition(".")


def _as_norm(module: object, number: int | None) -> nn.Module | None:
    if isinstance(module, nn.ModuleList) and number is not None and number < len(module):
        module = module[number]
    return module if isinstance(module, nn.Module) and "norm" in type(module).__name__.lower() else None


def rotary_embedding(model: nn.Module, path: str) -> nn.Module | None:
    """The rotary embedding nearest to the attention layer. A model with several towers has several."""
    while path:
        path = path.rpartition(".")[0]
        for module in model.get_submodule(path).modules():
            names = [name for name, _ in module.named_buffers(recurse=False)]
            if any(name == "inv_freq" or name.endswith("_inv_freq") for name in names) or _is_table(module):
                return module
    return None


def _is_table(rotary: nn.Module) -> bool:
    """Whether a module stores sines and cosines by position (GPT-J) instead of frequencies."""
    return "embed_positions" in rotary._buffers and "position_ids" in parameter_names(rotary)


def sine_first(rotary: nn.Module | None) -> bool:
    """Whether a rotary module returns (sin, cos), as in GPT-J, instead of (cos, sin)."""
    if rotary is None or not _is_table(rotary):
        return False
    table = rotary.get_buffer("embed_positions")
    first, second = rotary(table, torch.zeros(1, 1, dtype=torch.long, device=table.device))
    # On the meta device there are no values to check. In all models that store a table the sine comes first.
    return bool(table.is_meta or first.abs().sum() < second.abs().sum())


def rotary_type(rotary: nn.Module | None, attention: nn.Module, block: nn.Module) -> str | None:
    """The layer type that a rotary module needs, if it has one table per type."""
    if rotary is None or "layer_type" not in inspect.signature(unwrapped_forward(rotary)).parameters:
        return None
    for owner, name in ((attention, "layer_type"), (block, "attention_type"), (block, "layer_type")):
        found = getattr(owner, name, None)
        if isinstance(found, str):
            return found
    config: Any = attention.config
    types = getattr(config, "layer_types", None)
    return types[attention.layer_idx] if types is not None else None


def bias_owner(model: nn.Module, path: str, attention: nn.Module, table: str | None) -> nn.Module | None:
    """The module with the table of relative position biases that an attention layer adds.

    T5 has one in the first layer of a stack, UMT5 one in each layer. If the name of the `table` is given, it is
    searched in the modules around the layer, from the inside out: MPNet has it in its stack, WavLM in its first layer.
    """
    while table is not None and path:
        path = path.rpartition(".")[0]
        if (found := next((m for m in model.get_submodule(path).modules() if hasattr(m, table)), None)) is not None:
            return found
    if table is not None or not hasattr(attention, "has_relative_attention_bias"):
        return None
    if attention.has_relative_attention_bias:
        return attention
    first = re.sub(r"^((?:.*?\.)?)\d+(?=\.)", r"\g<1>0", path)
    owner = model.get_submodule(first)
    return owner if getattr(owner, "has_relative_attention_bias", False) else None


def input_std(model: nn.Module, path: str, index: int, family: Family | None) -> float | None:
    """Std of a post-norm block's input, from the LayerNorm that makes it: sqrt(mean(weight^2 + bias^2))."""
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
