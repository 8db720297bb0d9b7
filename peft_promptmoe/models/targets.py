# SPDX-License-Identifier: Apache-2.0
"""Which attention layers of a model prompts can join: the table's, or those that a generic rule finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .families import FAMILIES, LAYER_FAMILIES, TIMM_FAMILIES, TIMM_PATH, VISION_FAMILIES, Family
from .inspection import calls_attention_interface, calls_sdpa
from .patches import find_patches

# How models call the tokens that one looks at: Swin, Hiera, Twins; LED and Longformer; LongT5; BigBird and Pegasus-X.
WINDOWS = ("window_size", "mask_unit_size", "ws", "one_sided_attn_window_size", "local_radius", "block_size")

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|x_attn", re.IGNORECASE)


def model_type(model: nn.Module) -> str | None:
    """Type of a transformers model as its config names it; None for anything else."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder whose output a decoder reads."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return False
    # Heads on the encoder alone (Whisper's of audio classification) name themselves, for want of a decoder.
    return model.get_decoder() not in (model, getattr(model, "base_model", model))  # type: ignore[operator]


def default_targets(model: nn.Module) -> str | list[str]:
    """Attention layers to prompt when the user names none: a regular expression, or a list of paths.

    Raises:
        ValueError: the model has no attention layer that the engine can reach.
    """
    kind = model_type(model) or ""
    family = FAMILIES.get(kind) or VISION_FAMILIES.get(kind)
    if family is not None and (found := _of_family(model, family)):
        return found
    paths = [path for path, _ in _generic_attentions(model)]
    if not paths:
        raise ValueError(_why_none(model))
    return paths


def _why_none(model: nn.Module) -> str:
    windowed = {type(module).__name__: None for module in model.modules() if attends_within_windows(module)}
    if windowed:
        return (
            f"{type(model).__name__} has no attention layer that prompts can join: its attention stays within windows "
            f"({next(iter(windowed))}), and a prompt is read by all tokens of a layer. Use a plain vision transformer "
            "of transformers or timm."
        )
    named = [type(module).__name__ for module in model.modules() if _is_named_attention(module)]
    own = f"{named[0]} computes attention in a way of its own" if named else "none of its modules computes attention"
    return (
        f"{type(model).__name__} has no attention layer that peft_promptmoe can reach: {own}, and not through "
        "transformers' AttentionInterface or as timm's plain vision transformers do. Use a model whose attention does "
        "(most architectures of transformers 5, vision transformers of timm)."
    )


def _is_named_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer by its name, and none within it is."""
    names = [re.search(r"Attention|Attn", type(part).__name__) is not None for part in module.modules()]
    return names[0] and not any(names[1:])


def attends_within_windows(module: nn.Module) -> bool:
    """Whether a module is an attention layer, or a block around one, that looks at one window at a time."""
    size = next((found for name in WINDOWS if (found := getattr(module, name, 0))), 0)
    named = re.search(r"window|Attention|Attn|Block|Layer", type(module).__name__) is not None
    return named and (size > 0 if isinstance(size, int) else bool(size))


def _of_family(model: nn.Module, family: Family) -> str | list[str]:
    """Where the family's attention layers are, but for those of an encoder-decoder's decoder."""
    matched = {path: id(module) for path, module in model.named_modules() if re.fullmatch(family.attention, path)}
    inside_decoder = decoder_modules(model)
    kept = [path for path, number in matched.items() if number not in inside_decoder]
    return family.attention if kept and len(kept) == len(matched) else kept


def image_targets(model: nn.Module) -> str | list[str]:
    """Attention layers that see the tokens of one patch grid, in towers of any depth within the model.

    Returns:
        A regular expression where one matches just these layers, else their paths.

    Raises:
        ValueError: there is none.
    """
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for path, module in _generic_attentions(model):
        family = family_of(model, module, path)
        if (family is None and _is_decoder(path)) or find_patches(model, path, input_width(module)) is None:
            continue
        kinds[family is not None].append(path)
    if not (found := kinds[True] or kinds[False]):
        raise ValueError(
            f"{type(model).__name__} has no attention layers over one patch grid, from which these prompts are made: "
            "it is no vision transformer, or one of windows or of several resolutions (Swin, Hiera, PVT). Use a plain "
            "vision transformer of transformers or timm."
        )
    family = family_of(model, model.get_submodule(found[0]), found[0])
    paths = [path for path, _ in model.named_modules() if family and re.fullmatch(family.attention, path)]
    return family.attention if family is not None and paths == found else found


def _is_decoder(path: str) -> bool:
    """Whether a vision model's decoder is on the path (ViT-MAE's, which sees a grid of its own)."""
    return "decoder" in path


def is_timm_attention(module: nn.Module, path: str) -> bool:
    """Whether the module is a self-attention layer of a plain timm vision transformer."""
    ours = type(module).__module__.startswith("timm.") and calls_sdpa(module)
    return ours and re.fullmatch(TIMM_PATH, path) is not None


def _generic_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every self-attention layer by the generic rule; of an encoder-decoder only the encoder's."""
    inside_decoder = decoder_modules(model)
    for path, module in model.named_modules():
        if is_timm_attention(module, path):
            if not hasattr(model.get_submodule(path.rpartition(".")[0]), "window_size"):
                yield path, module
        elif (
            id(module) not in inside_decoder
            and not is_cross_attention_layer(path, module)
            and (calls_attention_interface(module) or type(module).__name__ in LAYER_FAMILIES)
        ):
            yield path, module


def family_of(model: nn.Module, attention: nn.Module, path: str) -> Family | None:
    """The table's entry for an attention layer."""
    if is_timm_attention(attention, path):
        return TIMM_FAMILIES.get(f"{type(attention).__module__}.{type(attention).__qualname__}")
    own = getattr(getattr(attention, "config", None), "model_type", "")
    of_layer = LAYER_FAMILIES.get(type(attention).__name__)
    family = of_layer or FAMILIES.get(model_type(model) or "") or VISION_FAMILIES.get(own)
    return family if family is not None and re.fullmatch(family.attention, path) else None


def input_width(attention: Any) -> int:
    """Width D of the layer's input."""
    found = (getattr(module, "in_features", getattr(module, "nx", None)) for module in attention.modules())
    taken = [width for width in found if isinstance(width, int)]  # `nx` is what GPT-2's Conv1D calls it
    named = getattr(getattr(attention, "config", None), "hidden_size", None)
    # The first projection takes the layer's input; where it is none of these, the config has to say.
    return int(named if isinstance(named, int) and (named in taken or not taken) else taken[0] if taken else 0)


def decoder_modules(model: nn.Module) -> set[int]:
    """The modules of an encoder-decoder's decoder, by id."""
    if not is_encoder_decoder(model):
        return set()
    return {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]


def is_cross_attention_layer(path: str, attention: nn.Module) -> bool:
    names = ".".join(path.split(".")[-2:])  # BLIP-2's Q-Former has its own inside: crossattention.attention
    return bool(CROSS_ATTENTION.search(names)) or bool(getattr(attention, "is_cross_attention", False))


def check_at_hand(attention: nn.Module, path: str) -> None:
    """Raise ValueError where accelerate has put a layer's weights away, so that prompts would have no device."""
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in attention.modules()):
        raise ValueError(
            f"The weights of {path!r} are offloaded by accelerate. Add or load the adapter while the model is in "
            "memory, and offload both together (cpu_offload, disk_offload or dispatch_model of accelerate)."
        )
