# SPDX-License-Identifier: Apache-2.0
"""Finds the attention layers that prompts can join, with the table of tested models or with a generic rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .families import (
    FAMILIES,
    LAYER_FAMILIES,
    TIMM_FAMILIES,
    TIMM_PATH,
    VISION_FAMILIES,
    WINDOW_FAMILIES,
    Family,
)
from .inspection import calls_attention_interface, calls_sdpa
from .patches import find_patches

# Names of window sizes: Swin, Hiera, Twins; LED and Longformer; LongT5; BigBird and Pegasus-X.
WINDOWS = ("window_size", "mask_unit_size", "ws", "one_sided_attn_window_size", "local_radius", "block_size")

CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|x_attn", re.IGNORECASE)


def model_type(model: nn.Module) -> str | None:
    """The `model_type` in a transformers model's config. None for any other model."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder whose output a decoder reads."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return False
    # Without a decoder `get_decoder` returns the model itself (Whisper for audio classification).
    return model.get_decoder() not in (model, getattr(model, "base_model", model))  # type: ignore[operator]


def default_targets(model: nn.Module) -> str | list[str]:
    """Return the attention layers to prompt if the user names none: a regular expression, or a list of paths.

    Raises:
        ValueError: the model has no attention layer that prompts can join.
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
            f"({next(iter(windowed))}), but a prompt must be visible to all tokens of a layer. Use a "
            "plain vision transformer of transformers or timm."
        )
    named = [type(module).__name__ for module in model.modules() if _is_named_attention(module)]
    own = f"{named[0]} computes attention in its own way" if named else "none of its modules computes attention"
    return (
        f"{type(model).__name__} has no attention layer that peft_promptmoe can reach: {own}, not through "
        "transformers' AttentionInterface or like timm's plain vision transformers. Use a supported model (most "
        "architectures of transformers 5, vision transformers of timm)."
    )


def _is_named_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer by its name and contains no other one."""
    names = [re.search(r"Attention|Attn", type(part).__name__) is not None for part in module.modules()]
    return names[0] and not any(names[1:])


def attends_within_windows(module: nn.Module) -> bool:
    """Whether a module is an attention layer with windows, or a block around one."""
    size = next((found for name in WINDOWS if (found := getattr(module, name, 0))), 0)
    named = re.search(r"window|Attention|Attn|Block|Layer", type(module).__name__) is not None
    return named and (size > 0 if isinstance(size, int) else bool(size))


def _of_family(model: nn.Module, family: Family) -> str | list[str]:
    """The family's attention layers, except those in the decoder of an encoder-decoder."""
    matched = {path: id(module) for path, module in model.named_modules() if re.fullmatch(family.attention, path)}
    inside_decoder = decoder_modules(model)
    kept = [path for path, number in matched.items() if number not in inside_decoder]
    return family.attention if kept and len(kept) == len(matched) else kept


def image_targets(model: nn.Module, windows: bool = False) -> str | list[str]:
    """Return the attention layers over one patch grid, in vision towers at any depth of the model.

    Args:
        model: the base model.
        windows: whether to return those within windows of a known kind (Swin) if there are no others.

    Returns:
        A regular expression if one matches exactly these layers, otherwise their paths.

    Raises:
        ValueError: the model has no such layer.
    """
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for path, module in _generic_attentions(model):
        family = family_of(model, module, path)
        if (family is None and _is_decoder(path)) or find_patches(model, path, input_width(module)) is None:
            continue
        kinds[family is not None].append(path)
    found = kinds[True] or kinds[False]
    if windows and not found:
        found = [path for path, module in model.named_modules() if window_family(module, path) is not None]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layers over one patch grid, which this method needs: it is no "
            f"vision transformer, or one with windows, with several resolutions ({'' if windows else 'Swin, '}Hiera, "
            "PVT), or behind a convolutional network (DPT-Hybrid). Use a plain vision transformer of transformers or "
            f"timm{', or Swin' if windows else ''}."
        )
    family = family_of(model, model.get_submodule(found[0]), found[0], windows)
    paths = [path for path, _ in model.named_modules() if family and re.fullmatch(family.attention, path)]
    return family.attention if family is not None and paths == found else found


def _is_decoder(path: str) -> bool:
    """Whether the path goes through a vision model's decoder (ViT-MAE's, which has another grid)."""
    return "decoder" in path


def is_timm_attention(module: nn.Module, path: str) -> bool:
    """Whether the module is a self-attention layer of a plain timm vision transformer."""
    ours = type(module).__module__.startswith("timm.") and calls_sdpa(module)
    return ours and re.fullmatch(TIMM_PATH, path) is not None


def _generic_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All self-attention layers found by the generic rule. In an encoder-decoder, those of the encoder only."""
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


def window_family(attention: nn.Module, path: str) -> Family | None:
    """The entry of the table of attention layers within windows for a layer, or None."""
    family = WINDOW_FAMILIES.get(f"{type(attention).__module__}.{type(attention).__qualname__}")
    return family if family is not None and re.fullmatch(family.attention, path) else None


def family_of(model: nn.Module, attention: nn.Module, path: str, windows: bool = False) -> Family | None:
    """The entry of the table of tested models for an attention layer, or None.

    Args:
        model: the base model.
        attention: the layer.
        path: its path.
        windows: whether layers within windows count, too.
    """
    if windows and (found := window_family(attention, path)) is not None:
        return found
    if is_timm_attention(attention, path):
        return TIMM_FAMILIES.get(f"{type(attention).__module__}.{type(attention).__qualname__}")
    own = getattr(getattr(attention, "config", None), "model_type", "")
    of_layer = LAYER_FAMILIES.get(type(attention).__name__)
    family = of_layer or FAMILIES.get(model_type(model) or "") or VISION_FAMILIES.get(own)
    return family if family is not None and re.fullmatch(family.attention, path) else None


def input_width(attention: Any) -> int:
    """Width D of the layer's input."""
    found = (getattr(module, "in_features", getattr(module, "nx", None)) for module in attention.modules())
    taken = [width for width in found if isinstance(width, int)]  # GPT-2's Conv1D calls it `nx`
    named = getattr(getattr(attention, "config", None), "hidden_size", None)
    # The first projection takes the layer's input. If its width is unknown, the config must have it.
    return int(named if isinstance(named, int) and (named in taken or not taken) else taken[0] if taken else 0)


def output_width(attention: nn.Module) -> int:
    """Width of the layer's output, which its last projection makes."""
    return next(m.out_features for m in reversed(list(attention.modules())) if isinstance(m, nn.Linear))


def decoder_modules(model: nn.Module) -> set[int]:
    """Ids of the modules in the decoder of an encoder-decoder."""
    if not is_encoder_decoder(model):
        return set()
    return {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]


def is_cross_attention_layer(path: str, attention: nn.Module) -> bool:
    names = ".".join(path.split(".")[-2:])  # BLIP-2's Q-Former nests it: crossattention.attention
    return bool(CROSS_ATTENTION.search(names)) or bool(getattr(attention, "is_cross_attention", False))


def check_at_hand(attention: nn.Module, path: str) -> None:
    """Raise ValueError if accelerate has offloaded a layer's weights: prompts would then have no device."""
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in attention.modules()):
        raise ValueError(
            f"The weights of {path!r} are offloaded by accelerate. Add or load the adapter while the model is in "
            "memory, and offload both together (cpu_offload, disk_offload or dispatch_model of accelerate)."
        )
