# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps the attention layers that prompts join: one small entry per family, a generic rule else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .inspection import calls_attention_interface, calls_in_order, passes_on_keywords, unwrapped_forward

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """How the attention layers of one architecture are named and built.

    Attributes:
        attention: regular expression that fully matches the paths of the attention layers to prompt.
        norm: sibling of the attention layer that normalises its input; None for post-norm blocks.
        key, value: the key and value projections, attributes of the attention layer.
        key_norm: norm applied to each head's keys, if the layer has one.
        fused: the projection that makes queries, keys and values at once, instead of `key` and `value`.
        head_dim: attribute of the attention layer with the width of one head.
        input_norm: path from the block to the norm that ends it, whose output is the next block's input (post-norm).
        stem_norm: end of the path of the norm behind the embeddings, whose output is the first block's input
            (post-norm).
    """

    attention: str
    norm: str | None = None
    key: str = "k_proj"
    value: str = "v_proj"
    key_norm: str | None = None
    fused: str | None = None
    head_dim: str = "head_dim"
    input_norm: str | None = None
    stem_norm: str | None = None


_BERT = Family(
    r"(.*\.)?encoder\.layer\.\d+\.attention\.self",
    key="key",
    value="value",
    head_dim="attention_head_size",
    input_norm="output.LayerNorm",
    stem_norm="embeddings.LayerNorm",
)
_LLAMA = Family(r"(.*\.)?layers\.\d+\.self_attn", norm="input_layernorm")
_QK_NORM = Family(r"(.*\.)?layers\.\d+\.self_attn", norm="input_layernorm", key_norm="k_norm")

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Family(
        r"(.*\.)?transformer\.layer\.\d+\.attention",
        key="k_lin",
        value="v_lin",
        head_dim="attention_head_size",
        input_norm="output_layer_norm",
        stem_norm="embeddings.LayerNorm",
    ),
    "modernbert": Family(r"(.*\.)?layers\.\d+\.attn", norm="attn_norm", fused="Wqkv"),
    "t5": Family(
        r"(.*\.)?encoder\.block\.\d+\.layer\.0\.SelfAttention",
        norm="layer_norm",
        key="k",
        value="v",
        head_dim="key_value_proj_dim",
    ),
    "bart": Family(
        r"(.*\.)?encoder\.layers\.\d+\.self_attn",
        input_norm="final_layer_norm",
        stem_norm="encoder.layernorm_embedding",
    ),
    "gpt2": Family(r"(.*\.)?h\.\d+\.attn", norm="ln_1", fused="c_attn"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _QK_NORM,
    "gemma3_text": _QK_NORM,
}


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
        causal: whether a query sees earlier positions only.
        generates: whether the model is a causal language model, so that its outputs are scored token by token.
        rotary: the model's rotary embedding, if it has one, and
        rotary_type: the layer type it takes, for models that keep one table per type.
        bias_owner: the attention layer that holds the T5 table of relative position biases this layer adds.
        input_std: spread of the block's input where it is knowable without running the model, else None.
    """

    name: str
    index: int
    attention: Any
    block: Any
    norm: Any
    family: Family | None
    width: int
    causal: bool
    generates: bool
    rotary: Any
    rotary_type: str | None
    bias_owner: Any
    input_std: float | None


def model_type(model: nn.Module) -> str | None:
    """Type of a transformers model as its config names it; None for anything else."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def has_language_model_head(model: Any) -> bool:
    """Whether the model predicts tokens."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder whose output a decoder reads."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_decoder")


def default_targets(model: nn.Module) -> str | list[str]:
    """Attention layers to prompt when the user names none: a regular expression, or a list of paths.

    Raises:
        ValueError: the model has no attention layer that the engine can reach.
    """
    family = FAMILIES.get(model_type(model) or "")
    if family is not None:
        return family.attention
    paths = [path for path, _ in _generic_attentions(model)]
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that peft_promptmoe can reach: none of its modules "
            "computes attention through transformers' AttentionInterface. Use a model whose attention does (most "
            "architectures of transformers 5), or name such layers in `target_modules`."
        )
    return paths


def _generic_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every self-attention layer by the generic rule; of an encoder-decoder only the encoder's."""
    inside_decoder = _inside_decoder(model)
    for path, module in model.named_modules():
        if id(module) not in inside_decoder and not _is_cross(path, module) and calls_attention_interface(module):
            yield path, module


def _inside_decoder(model: nn.Module) -> set[int]:
    """The modules of an encoder-decoder's decoder, by id."""
    if not is_encoder_decoder(model):
        return set()
    return {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]


def _is_cross(path: str, attention: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return bool(CROSS_ATTENTION.search(name)) or bool(getattr(attention, "is_cross_attention", False))


def find_site(model: nn.Module, path: str) -> Site:
    """Describe the attention layer at `path`.

    Raises:
        ValueError: the module at `path` is not an attention layer that the engine can reach, or the architecture is
            one where its output is known to differ from the definition.
    """
    attention: Any = model.get_submodule(path)
    if not calls_attention_interface(attention):
        raise ValueError(
            f"`target_modules` matched {path!r}, a {type(attention).__name__}, which is not an attention layer that "
            "calls transformers' AttentionInterface. Name the attention layers themselves (for example 'self_attn'), "
            "not their projections, or leave `target_modules` unset."
        )
    if _is_cross(path, attention) or id(attention) in _inside_decoder(model):
        raise ValueError(
            f"`target_modules` matched {path!r}. Prompts join self-attention, and of an encoder-decoder the encoder's "
            "only; its decoder sees them through what the encoder puts out. Name layers of the encoder, or leave "
            "`target_modules` unset."
        )
    kind = model_type(model) or ""
    family = FAMILIES.get(kind)
    if family is not None and not re.fullmatch(family.attention, path):
        family = None
    if family is None:
        _check_reachable(attention, path)
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"{type(attention).__name__} with reorder_and_upcast_attn=True leaves out transformers' "
            "AttentionInterface, by which prompts join. Load the model with reorder_and_upcast_attn=False."
        )
    block_path, index = _block_of(path)
    block = model.get_submodule(block_path or path.rpartition(".")[0])
    config = attention.config
    rotary = _rotary_embedding(model, path)
    causal = bool(getattr(attention, "is_causal", False))
    return Site(
        name=path,
        index=index,
        attention=attention,
        block=block,
        norm=_input_norm(model, path, block_path, family),
        family=family,
        width=int(config.hidden_size),
        causal=causal,
        generates=causal and has_language_model_head(model),
        rotary=rotary,
        rotary_type=_rotary_type(rotary, attention, block),
        bias_owner=_bias_owner(model, path, attention),
        input_std=_input_std(model, path, index, family),
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
