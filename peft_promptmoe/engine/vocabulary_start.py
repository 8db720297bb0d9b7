# SPDX-License-Identifier: Apache-2.0
"""Initial prompt rows that a text model is used to: its own layer inputs on random vocabulary tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.inspection import parameter_names
from ..models.targets import is_encoder_decoder
from .kernels import known_kernel
from .key_value import KeyValueLayer
from .model_hooks import prompt_layers


def text_reader(model: nn.Module) -> nn.Module | None:
    """What of a model reads token ids alone, without images or sounds; None where nothing does.

    Looked for in what others have wrapped (PEFT's models, a user's own module), and within models of several inputs.
    """
    whole: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        return None
    if whole.main_input_name == "input_ids" and is_encoder_decoder(whole):
        return whole.get_encoder()
    if is_encoder_decoder(whole):  # Whisper has embeddings, for what it writes
        return None
    if whole.config.get_text_config() is whole.config:
        return whole.base_model if whole.main_input_name == "input_ids" else None
    reader = whole.get_decoder()
    return reader if reader is not whole and "input_ids" in parameter_names(reader) else None


def why_unread(model: nn.Module, reader: nn.Module | None, length: int) -> str | None:
    """Why the model cannot be run on texts of `length` vocabulary tokens; None if it can."""
    if reader is None:
        return "it does not read token ids alone"
    # RoBERTa counts its positions from 2.
    positions = getattr(reader.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length + 2 > positions:
        return f"it has {positions} positions, too few for num_virtual_tokens={length}"
    if any(parameter.is_meta for parameter in reader.parameters()):
        return "its weights are not in memory"
    return None if _vocabulary(reader) else "it has no table of token embeddings"


def _vocabulary(reader: Any) -> int:
    """Tokens that the embeddings have rows for; 0 if they are no table. They may be another adapter's by now."""
    try:
        embeddings = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return 0
    weight = getattr(embeddings, "weight", None)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0
    return int(getattr(embeddings, "num_embeddings", rows))


def vocabulary_inputs(model: nn.Module, reader: nn.Module, adapter: str, rows: int, length: int) -> dict[str, Tensor]:
    """Layer inputs on random vocabulary tokens at every prompted attention layer that text reaches, without prompts.

    Each row is a sequence of its own, so its first slot has what a model keeps in the first position of a text; causal
    language models rest their attention there.

    Args:
        model: the base model, prompt layers in place.
        reader: what of it reads text (`text_reader`).
        adapter: whose saved modules, such as embeddings, are to be used.
        rows: sequences N.
        length: tokens per sequence P.

    Returns:
        (N, P, D) by path of the attention layer.
    """
    device = next(reader.parameters()).device
    ids = torch.randint(_vocabulary(reader), (rows, length)).to(device)
    layers = [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]
    found: dict[str, Tensor] = {}
    handles = [_listen(layer, found) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    disabled = {layer: layer.disable_adapters for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also touch what trains
        with torch.no_grad(), _saved_modules_of(model, adapter), _plain_attention(model):
            reader(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in disabled.items():
            layer._disable_adapters = was
        for module, mode in modes.items():
            module.training = mode
    return found


@contextmanager
def _saved_modules_of(model: nn.Module, adapter: str) -> Iterator[None]:
    """Let saved modules be what they will be while the adapter is active, which a second one is not yet."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    active: list[tuple[Any, Any]] = [(wrapper, wrapper._active_adapter) for wrapper in wrappers]
    try:
        for wrapper, _ in active:
            wrapper._active_adapter = adapter if adapter in wrapper.modules_to_save else []
        yield
    finally:
        for wrapper, was in active:
            wrapper._active_adapter = was


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Run models of flash and flex kernels by eager attention: they get adapters before they go to their GPU."""
    configs = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        config = getattr(config, "real", config)
        name = getattr(config, "_attn_implementation", None)
        kernel = known_kernel(name)
        if kernel is not None and kernel.reads_config:
            configs[id(config)] = (config, name)
    for config, _ in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in configs.values():
            config._attn_implementation = name


def _listen(layer: KeyValueLayer, found: dict[str, Tensor]) -> Any:
    names = parameter_names(layer.site.attention)

    def hear(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(zip(names, args, strict=False)) | kwargs
        found[layer.site.name] = layer.layer_input(bound[names[0]]).detach()

    return layer.site.attention.register_forward_pre_hook(hear, with_kwargs=True)
