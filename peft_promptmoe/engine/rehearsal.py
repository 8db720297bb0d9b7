# SPDX-License-Identifier: Apache-2.0
"""One forward of the base model while an adapter is made, with its layers listening and their prompts off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.inspection import parameter_names
from ..models.reachable import TROUBLE, CannotJoin
from ..models.targets import is_encoder_decoder
from .eval_mode import eval_mode
from .key_value import KeyValueLayer
from .model_hooks import prompt_layers


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, note the layer inputs (B, T, D) of every run of prompted attention layers, by their paths."""
    layers = [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]
    heard: dict[str, list[Tensor]] = {}
    handles = [_listen(layer, heard) for layer in layers]
    disabled = {layer: layer.disable_adapters for layer in layers}
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also touch what trains
        with torch.no_grad(), eval_mode(model):
            yield heard
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in disabled.items():
            layer._disable_adapters = was


def _listen(layer: KeyValueLayer, heard: dict[str, list[Tensor]]) -> Any:
    names = parameter_names(layer.site.attention)

    def hear(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(zip(names, args, strict=False)) | kwargs
        heard.setdefault(layer.site.name, []).append(layer.layer_input(bound[names[0]]).detach())

    return layer.site.attention.register_forward_pre_hook(hear, with_kwargs=True)


def rehearse(model: nn.Module) -> None:
    """Run a model that only the generic rule knows once, to find out here and not in training what cannot work.

    Nothing is found out of models that want more than token ids or one image.

    Raises:
        CannotJoin: the input of a prompted attention layer is not what the rule takes it for.
    """
    feed = _feed(model)
    if feed is None:
        return
    with listening(model) as heard, torch.random.fork_rng(devices=[]):
        try:
            feed()
        except CannotJoin:
            raise
        except TROUBLE:
            return
    _say_what_repeats(heard)


def _feed(model: Any) -> Callable[[], Any] | None:
    """What runs the model on a few tokens or on one black image; None if it reads neither."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and model.get_input_embeddings() is not None:
        ids = torch.arange(5, 8, device=next(model.parameters()).device)[None]
        reader = model.get_encoder() if is_encoder_decoder(model) else getattr(model, "base_model", model)
        return lambda: reader(input_ids=ids)
    found = (layer.site.patches for layer in prompt_layers(model) if layer.site.patches is not None)
    patches = next((each for each in found if each.image_size is not None), None)
    if patches is None or patches.image_size is None:
        return None
    weight = patches.embedding.weight
    image = weight.new_zeros(1, patches.embedding.in_channels, *patches.image_size)
    return lambda: model(**{name: image}) if name else model(image)


def _say_what_repeats(heard: dict[str, list[Tensor]]) -> None:
    """Tell the user of layers that run several times in one forward (ALBERT), with the same prompts each time."""
    repeated = {name: len(inputs) for name, inputs in heard.items() if len(inputs) > 1}
    if repeated:
        name, times = next(iter(repeated.items()))
        warnings.warn(
            f"{len(repeated)} attention layers run several times in one forward ({name!r}: {times} times). Each has "
            "one set of prompts, which serves all of its depths.",
            stacklevel=4,
        )
