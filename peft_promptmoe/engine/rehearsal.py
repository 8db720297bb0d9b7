# SPDX-License-Identifier: Apache-2.0
"""A trial forward pass of the base model without prompts, in which layers record their inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..models.families import FAMILIES, VISION_FAMILIES
from ..models.inspection import parameter_names
from ..models.reachable import TROUBLE, CannotJoin
from ..models.targets import model_type
from .columns import Overheard
from .eval_mode import eval_mode
from .feeds import feed_of
from .kernels import known_kernel
from .key_value import NOTED_INPUT, KeyValueLayer
from .model_hooks import prompt_layers
from .positions import can_stand_before, first_position, row_positions
from .projection import project_rows
from .prompt_layer import PromptLayer

CLOSE = 0.1  # relative error of a key: half precision and quantisation stay below, a wrong position or norm does not


@dataclass
class Heard:
    """One run of an attention layer.

    Attributes:
        layer_input: (B, T, D) input before the norm.
        bound: the call's arguments by name.
        kernel: keys and values that its kernel got.
    """

    layer_input: Tensor
    bound: dict[str, Any]
    kernel: Overheard


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, list[Heard]]]:
    """Context manager: record the runs of prompted attention layers, by path."""
    layers = _layers(model)
    heard: dict[str, list[Heard]] = {}
    handles = [_listen(layer, heard) for layer in layers]
    disabled = {layer: layer.disable_adapters for layer in layers}
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also change which parameters train
        with torch.no_grad(), eval_mode(model), _plain_attention(model):
            yield heard
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in disabled.items():
            layer._disable_adapters = was


@contextmanager
def saved_modules_of(model: nn.Module, adapter: str) -> Iterator[None]:
    """Context manager: use the adapter's saved modules, although the adapter may not be active yet."""
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
    """Context manager: run models with flash or flex kernels with eager attention, as they may still be on the CPU."""
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


def _layers(model: nn.Module) -> list[KeyValueLayer]:
    return [layer for layer in prompt_layers(model) if isinstance(layer, KeyValueLayer)]


def _listen(layer: KeyValueLayer, heard: dict[str, list[Heard]]) -> Any:
    names = parameter_names(layer.site.attention)

    def hear(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = dict(zip(names, args, strict=False)) | kwargs
        x = layer.layer_input(bound[names[0]], bound.get(NOTED_INPUT))
        layer.notes_arrive = True
        run = Heard(x.detach(), bound, Overheard())
        heard.setdefault(layer.site.name, []).append(run)
        return layer.carry(args, kwargs, run.kernel) if layer.site.own is None else None

    return layer.site.attention.register_forward_pre_hook(hear, with_kwargs=True)


def try_generic(model: nn.Module, layers: list[PromptLayer]) -> None:
    """Check layers that were found by the generic rule, and warn if they cannot be checked."""
    generic = {layer.site.name for layer in layers if layer.site.family is None}
    if not generic or generic <= rehearse(model):
        return
    tested = ", ".join(sorted({*FAMILIES, *VISION_FAMILIES, "plain vision transformers of timm"}))
    warnings.warn(
        f"{model_type(model) or type(model).__name__} is not among the architectures peft_promptmoe is tested "
        f"with ({tested}). Its attention layers were found by a generic rule, and this model could not be run "
        "to check them. Compare some outputs with and without the adapter.",
        stacklevel=4,
    )


def rehearse(model: nn.Module) -> set[str]:
    """Run a model outside the table once, and compare the keys and values of prompt rows with those of tokens.

    A prompt row that equals a token's layer input, at the token's position, must get the token's key and value in
    every layer. Models that need more than token ids, one image or one audio signal cannot be checked.

    Returns:
        Paths of the attention layers that passed the check.

    Raises:
        CannotJoin: a layer did not pass, or its input is not the one that the generic rule expects.
    """
    feed = feed_of(model)
    if feed is None:
        return set()
    with listening(model) as heard, torch.random.fork_rng(devices=[]):
        try:
            feed()
        except CannotJoin:
            raise
        except TROUBLE:
            return set()
        layers = {layer.site.name: layer for layer in _layers(model)}
        right = {name for name, runs in heard.items() if _compare(layers[name], runs[-1])}
    _say_what_repeats(heard)
    return right


def _compare(layer: KeyValueLayer, run: Heard) -> bool:
    """Whether rows and tokens could be compared and were equal."""
    site, key, value = layer.site, run.kernel.key, run.kernel.value
    x = run.layer_input
    if key is None or value is None or x.shape[1] < 2 or key.shape[2] != x.shape[1]:
        return False
    first = torch.ones(x.shape[0], dtype=torch.long, device=x.device)  # as if column 0 were padding
    places: list[tuple[int, Tensor | None]] = [(1, None)]
    if can_stand_before(site):
        places.append((0, torch.tensor([-1], device=x.device)))
    for column, offsets in places:
        at = row_positions(site, first_position(site, run.bound, first), offsets)
        rows = project_rows(site, x[:, column : column + 1], at)
        for made, own in ((rows.key[:, :, 0], key[:, :, column]), (rows.value[:, :, 0], value[:, :, column])):
            if (made - own).abs().mean() > CLOSE * own.abs().mean():
                reason = "a prompt with the input of a token gets another key or value than that token"
                raise CannotJoin(site.name, site.attention, reason)
    return True


def _say_what_repeats(heard: dict[str, list[Heard]]) -> None:
    """Warn about layers that run several times in one forward pass (ALBERT), with the same prompts each time."""
    repeated = {name: len(runs) for name, runs in heard.items() if len(runs) > 1}
    if repeated:
        name, times = next(iter(repeated.items()))
        warnings.warn(
            f"{len(repeated)} attention layers run several times in one forward pass ({name!r}: {times} times). "
            "Each layer has one set of prompts for all its runs.",
            stacklevel=4,
        )
