# SPDX-License-Identifier: Apache-2.0
"""Initial prompt rows that a text model is used to: its own layer inputs on random vocabulary tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.targets import is_encoder_decoder
from .kernels import known_kernel
from .key_value import KeyValueLayer
from .model_hooks import prompt_layers


def can_read_vocabulary(model: nn.Module, length: int) -> bool:
    """Whether the model reads token ids and its weights are in memory, so that it can be run on some."""
    if getattr(model, "main_input_name", None) != "input_ids":  # Whisper has embeddings, for what it writes
        return False
    # RoBERTa counts its positions from 2.
    if length + 2 > getattr(model.config, "max_position_embeddings", length + 2):
        return False
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    return isinstance(embeddings, nn.Embedding)


def vocabulary_inputs(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """Layer inputs on random vocabulary tokens at every prompted attention layer, without prompts.

    Each row is a sequence of its own, so its first slot has what a model keeps in the first position of a text; causal
    language models rest their attention there.

    Args:
        model: the base model, prompt layers in place.
        rows: sequences N.
        length: tokens per sequence P.

    Returns:
        (N, P, D) by path of the attention layer.

    Raises:
        ValueError: the model cannot be run on token ids alone.
    """
    if not can_read_vocabulary(model, length):
        raise ValueError(
            "prompt_init='sample_vocab' runs the model on num_virtual_tokens vocabulary tokens, and this one has no "
            "token embeddings, too few positions, or weights that are not in memory. Set prompt_init='random'."
        )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(embeddings.num_embeddings, (rows, length)).to(embeddings.weight.device)
    reader = model.get_encoder() if is_encoder_decoder(model) else getattr(model, "base_model", model)  # type: ignore
    layers = [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]
    found: dict[str, Tensor] = {}
    handles = [_listen(layer, found) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    disabled = {layer: layer.disable_adapters for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also touch what trains
        with torch.no_grad(), _plain_attention(model):
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
