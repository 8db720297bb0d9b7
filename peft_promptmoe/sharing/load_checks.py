# SPDX-License-Identifier: Apache-2.0
"""Checks of what is loaded into an adapter: it comes whole, of the right shapes, finite and alone, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, AdapterState

ALIGNMENT = 64  # bytes, torch's own for tensors on the CPU
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # which are loaded as one another


def check_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Check the prompt tensors of a state dict before any of them is loaded.

    An adapter comes whole or not at all; PEFT alone would load what fits and pass over the rest.

    Raises:
        ValueError: tensors of an adapter are missing, superfluous, of another shape, or not finite.
    """
    expected: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterState):
            for name, tensor in module.state_dict(prefix=f"{prefix}{path}.").items():
                adapter = name.rsplit(".", 2)[1]
                expected.setdefault(adapter, {})[name] = tensor
    known = {name: tensor for tensors in expected.values() for name, tensor in tensors.items()}
    given = {name for name in state_dict if name.startswith(prefix) and f"{PROMPT_CHILD}." in name}
    if unknown := sorted(given - known.keys()):
        raise ValueError(
            f"The adapter file holds {len(unknown)} prompt tensors that this model has no place for, for example "
            f"{unknown[0]!r}. It was trained on a model with other layers, or its adapter_config.json is not its own."
        )
    for adapter, tensors in expected.items():
        if given.isdisjoint(tensors):
            continue
        if missing := sorted(tensors.keys() - given):
            raise ValueError(_lacks(adapter, missing, len(tensors)))
        for name, tensor in tensors.items():
            _check_tensor(name, state_dict[name], tensor)
            state_dict[name] = aligned(state_dict[name])


def check_read(model: nn.Module, adapter: str) -> None:
    """Check what transformers' own loader has read: it passes over missing tensors and does not look at values.

    Raises:
        ValueError: some of the adapter's tensors were read and others not, or some are not finite.
    """
    tensors = {
        f"{path}.{name}": tensor
        for path, state in model.named_modules()
        if isinstance(state, AdapterState)
        # Not by state_dict(), at which FSDP would take back the weights that it has just gathered for this forward.
        for name, tensor in chain(state.named_parameters(), state.named_buffers())
        if name.rsplit(".", 2)[1] == adapter
    }
    read = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if read and (missing := sorted(tensors.keys() - read)):
        raise ValueError(_lacks(adapter, missing, len(tensors)))
    for name in sorted(read):
        _check_tensor(name, tensors[name], tensors[name])
        tensors[name].data = aligned(tensors[name].data)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where vector instructions want it; tensors in a file's own memory stand anywhere.

    Matrix products round differently there, and a loaded adapter should answer bit by bit what the saved one did.
    """
    return tensor if tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _lacks(adapter: str, missing: list[str], total: int) -> str:
    return (
        f"The adapter file lacks {len(missing)} of the {total} prompt tensors of adapter {adapter!r}, for example "
        f"{missing[0]!r}. It was trained on a model with fewer layers, or it is damaged."
    )


def check_strangers(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse tensors in an adapter file that are no adapter's: by them a file could overwrite the base model.

    Embeddings are let through; PEFT saves them with an adapter when the vocabulary has grown.

    Raises:
        ValueError: the file holds prompt tensors and others that belong to no adapter, head or embedding.
    """
    names = [name for name in state_dict if name.startswith(prefix)]
    base = {f"{prefix}{name}" for name in model.state_dict() if f"{PROMPT_CHILD}." not in name}
    if base.issubset(names):  # a checkpoint of the whole model, which a user loads knowingly
        return
    ours = [name for name in names if f"{PROMPT_CHILD}." in name]
    allowed = {id(embedding.weight) for embedding in _embeddings(model)}
    known = {f"{prefix}{name}" for name, tensor in model.named_parameters() if id(tensor) in allowed}
    strangers = sorted(n for n in names if n not in ours and n not in known and ".modules_to_save." not in n)
    if strangers:
        raise ValueError(
            f"The adapter file holds {len(strangers)} tensors that are neither prompts nor saved modules, for example "
            f"{strangers[0]!r}. An adapter must not bring weights of the base model; do not trust this file."
        )


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for which in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, which)()
        except (AttributeError, NotImplementedError):  # a model that has none
            continue
        if hasattr(found, "weight"):
            yield found


def _check_tensor(name: str, given: Any, expected: Tensor) -> None:
    if given.dtype != expected.dtype and not {given.dtype, expected.dtype} <= FLOATS:
        raise ValueError(f"{name!r} holds {given.dtype} in the adapter file and {expected.dtype} in the model.")
    if tuple(given.shape) != tuple(expected.shape):
        raise ValueError(
            f"{name!r} has shape {tuple(given.shape)} in the adapter file and {tuple(expected.shape)} in the model: "
            "the adapter was trained with other settings (num_virtual_tokens and the like) than its config says, or "
            "on a model of another width."
        )
    if not given.is_meta and not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name!r} holds values that are not finite; the adapter file is damaged.")
