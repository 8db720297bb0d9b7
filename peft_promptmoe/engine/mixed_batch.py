# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch: each sample gets the rows, router, gates and head of its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .kernels import find_kernel
from .key_value import KeyValueLayer
from .model_hooks import find_hooks, prompt_layers
from .samples import BASE, of_samples


@contextmanager
def mixed_batch(model: nn.Module, names: Any, method: str) -> Iterator[None]:
    """Context manager: each sample of the batches in the block uses the adapter of its name.

    Args:
        model: the base model.
        names: one adapter name per sample, "__base__" for no adapter. If the batch is a multiple of them, as with
            beams, each name is used for equally many consecutive samples.
        method: name of the method, for messages.

    Raises:
        TypeError: the names are not a list of strings.
        ValueError: a name is unknown, the model is in training mode, or an adapter cannot share a batch.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list with one adapter name per sample, got {names!r}.")
    hooks = find_hooks(model)
    assert hooks is not None
    _check(model, list(names), method)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [each.register_forward_pre_hook(_name_samples(names), with_kwargs=True) for each in wrappers]
    before = hooks.calls.mix(tuple(names))
    try:
        yield
    finally:
        hooks.calls.mix(before)
        for handle in handles:
            handle.remove()


def _check(model: nn.Module, names: list[str], method: str) -> None:
    layers: list[Any] = prompt_layers(model)
    if model.training:
        raise ValueError("adapter_names is for inference. Call model.eval() first, or train one adapter at a time.")
    known = {name for layer in layers for name in layer.prompt_config}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names names {', '.join(unknown)}, but this model has {', '.join(sorted(known))}.")
    if not all(isinstance(layer, KeyValueLayer) for layer in layers):
        raise ValueError(
            f"{method} does not mix adapters within a batch (adapter_names). Run one batch per adapter with "
            "set_adapter()."
        )
    for layer in layers:
        kernel = None if layer.site.is_called else layer.site.attention.config.real._attn_implementation
        if kernel is not None and not find_kernel(kernel).adds_mask:
            raise ValueError(
                f"adapter_names hides each adapter's prompts from the samples of other adapters, but {kernel!r} "
                "takes no mask for this. Call model.set_attn_implementation('sdpa'), or run one batch per adapter."
            )
    if any(layer.as_tokens(name) for layer in layers for name in names if name in layer.prompt_config):
        raise ValueError(
            "The decoder of this model sees the prompts of the encoder's last block. This makes the encoder's output "
            "longer, so adapters cannot share a batch. Use decoder_sees_prompts=False, or one batch per adapter."
        )
    if len({layer.site.patches is None for layer in layers}) > 1:
        raise ValueError(
            "The image tower of this model has prompts, too, and a batch of images does not tell which sample an "
            "image belongs to. Leave the image tower out with exclude_modules, or run one batch per adapter."
        )


def _name_samples(names: Any) -> Any:
    """A hook that passes the adapter name of each sample to one of PEFT's saved modules."""

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        first = args[0] if args else next(iter(kwargs.values()))
        return args, {**kwargs, "adapter_names": of_samples(tuple(names), first.shape[0])}

    return tell
