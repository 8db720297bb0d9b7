# SPDX-License-Identifier: Apache-2.0
"""Exports a static prompt as an adapter of PEFT's prefix tuning, for use without this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..models.inspection import parameter_names
from ..models.sites import Site
from .eval_mode import eval_mode
from .key_value import KeyValueLayer
from .model_hooks import prompt_layers
from .positions import LENGTH_DEPENDENT, Positions, as_pair, rotary_kind, slot_offsets
from .projection import project_rows

TOKENS = 12  # length of the text on which logits are compared
CLOSE = {
    torch.float32: 1e-3,
    torch.float64: 1e-6,
}  # allowed difference, relative to the largest logit; a tenth in half precision
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size")
PREFIX = "prompt_embeddings"  # PEFT's name of the one tensor


def export_prefix(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write a static prompt of a causal language model as an adapter of PEFT's prefix tuning.

    `PeftModel.from_pretrained` loads the folder without this package. In every layer the prefix consists of the
    prompt's keys and values, at the positions that prefix tuning uses. Logits are equal up to the rounding of rotary
    angles; this is checked before anything is written. Texts with left padding are an exception: PEFT's prefix stands
    before the padding, not before the text. The export cannot be undone, because a prefix need not come from any
    prompt. Keep the adapter itself if you want to train it further.

    Args:
        model: a causal language model with the adapter.
        path: folder to write. Created if necessary.
        adapter_name: name of the adapter. None: the active one.

    Raises:
        ValueError: the model has no such adapter, or prefix tuning cannot represent it: routed prompts, saved modules,
            layers without prompts, learned or length-dependent positions, sliding windows.
    """
    layers = [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]
    name = adapter_name if adapter_name is not None else next((n for each in layers for n in each.active_adapters), "")
    layers = [layer for layer in layers if name in layer.prompt_config]
    if not layers:
        raise ValueError(f"The model has no adapter {name!r} of peft_promptmoe whose prompts join attention.")
    whole: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if (reason := _why_not(whole, layers, name)) is not None:
        raise ValueError(f"Adapter {name!r} cannot be exported to PEFT's prefix tuning: {reason}.")
    with torch.no_grad(), eval_mode(model):
        rows = [_rows(layer, name) for layer in layers]
        _compare(model, whole, layers, name, rows)
    heads, count, width = rows[0][0].shape[1:]
    flat = torch.stack([part[0].transpose(0, 1) for pair in rows for part in pair], dim=1)  # (R, 2 * layers, H, d)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=layers[0].prompt_config[name].base_model_name_or_path or whole.name_or_path,
        inference_mode=True,
        num_virtual_tokens=count,
        num_layers=len(rows),
        num_attention_heads=heads,
        token_dim=heads * width,
        encoder_hidden_size=heads * width,
        num_transformer_submodules=1,
    )
    folder = Path(path)
    config.save_pretrained(str(folder))
    save_file({PREFIX: flat.flatten(1).float().contiguous().cpu()}, folder / "adapter_model.safetensors")


def _why_not(whole: Any, layers: list[KeyValueLayer], name: str) -> str | None:
    config = layers[0].prompt_config[name]
    if any(layer.needs_input(name) for layer in layers):
        return "its prompts depend on the input, but a prefix is the same for all inputs. Train with num_experts=1"
    if getattr(config, "prompt_weights", None) is not None:
        return "its prompts have weights, but all rows of a prefix count the same"
    if config.modules_to_save or config.trainable_token_indices:
        return "it has saved modules or tokens, which prefix tuning does not support"
    if whole is None or whole.config.get_text_config() is not whole.config or not whole.can_generate():
        return "the export is for causal language models only"
    if len(layers) != whole.config.num_hidden_layers:
        return f"it prompts {len(layers)} of {whole.config.num_hidden_layers} layers, but a prefix is in all layers"
    for layer in layers:
        site, kind = layer.site, rotary_kind(layer.site)
        if not site.is_rotary or site.own is not None or site.bias_owner is not None:
            return f"{type(site.attention).__name__} has no rotary positions, so a prefix would move the text"
        if kind in LENGTH_DEPENDENT:
            return f"its rotary angles depend on the text's length ({kind!r})"
        windows = [getattr(owner, window, None) for owner in (site.attention, whole.config) for window in WINDOWS]
        if any(window is not None for window in windows):
            return f"{type(site.attention).__name__} has a sliding window, which would drop the prefix"
    return None


def _rows(layer: KeyValueLayer, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, R, d) of the layer's prompt, at the positions of the first R tokens of the text."""
    site, config = layer.site, layer.prompt_config[name]
    like = next(p for p in site.attention.parameters() if p.is_floating_point() and p.ndim > 0)
    dtype = getattr(site.norm, "weight", like).dtype
    rows = layer.rows(name, torch.zeros(1, 1, site.width, device=like.device, dtype=dtype), None, None).to(dtype)
    count = rows.shape[1]
    ids = torch.full((1, count), count, device=rows.device)
    if config.prompt_positions == "prefix":
        ids = ids + slot_offsets(count, config.num_virtual_tokens, rows.device)
    found = project_rows(site, rows, _positions(site, rows, ids))
    return found.key, found.value


def _positions(site: Site, like: Tensor, ids: Tensor) -> Positions:
    if "position_embeddings" not in parameter_names(site.attention):
        return Positions(ids=ids)
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    tables = site.rotary(like, ids, **named)
    pair = as_pair(tables, site.sine_first)
    assert pair is not None  # otherwise the adapter could not have been made
    return Positions(*pair, is_complex=isinstance(tables, Tensor))


def _compare(
    model: nn.Module, whole: Any, layers: list[KeyValueLayer], name: str, rows: list[tuple[Tensor, Tensor]]
) -> None:
    """Raise ValueError if logits with the prefix differ from those with the adapter."""
    shapes = {part.shape for pair in rows for part in pair}
    if len(shapes) > 1:
        raise ValueError(
            "Prefix tuning needs keys and values of one shape, but those of this model differ: "
            f"{sorted(tuple(shape[1:]) for shape in shapes)}."
        )
    ids = torch.arange(TOKENS, device=whole.device)[None] % whole.config.vocab_size
    active = {layer: (layer.disable_adapters, layer.active_adapters) for layer in layers}
    try:
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = False, [name]
        wanted = whole(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=whole.config)
        for number, (key, value) in enumerate(rows):
            cache.update(key, value, number)
        for layer in layers:
            layer._disable_adapters = True
        found = whole(input_ids=ids, past_key_values=cache, use_cache=True).logits
    finally:
        for layer, (disabled, adapters) in active.items():
            layer._disable_adapters, layer._active_adapter = disabled, adapters
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= CLOSE.get(wanted.dtype, 0.1):
        raise ValueError(
            f"With the prefix the logits differ (by {error:.2g} of the largest), so nothing is written: "
            f"{type(whole).__name__} uses positions or caches in its own way."
        )
