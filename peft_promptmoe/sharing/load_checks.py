# SPDX-License-Identifier: Apache-2.0
"""Checks of adapter tensors before they are loaded: complete, right shapes, finite, and no others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes, _is_key_under_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, AdapterState
from ..models.heads import takes

ALIGNMENT = 64  # bytes, as torch aligns tensors on the CPU
FLOATS = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
}  # tensors of these types may be loaded into each other


def check_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Check the prompt tensors of a state dict before any of them is loaded.

    An adapter is loaded completely or not at all. PEFT alone would load the tensors that fit and ignore the others.

    Raises:
        ValueError: tensors of an adapter are missing, unknown, of another shape, or not finite.
    """
    expected: dict[str, dict[str, Tensor]] = {}
    dispensable: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterState):
            for name, tensor in module.state_dict(prefix=f"{prefix}{path}.").items():
                adapter = name.rsplit(".", 2)[1]
                expected.setdefault(adapter, {})[name] = tensor
            dispensable |= _dispensable(module, f"{prefix}{path}")
    known = {name: tensor for tensors in expected.values() for name, tensor in tensors.items()}
    given = {name for name in state_dict if name.startswith(prefix) and f"{PROMPT_CHILD}." in name}
    if unknown := sorted(given - known.keys()):
        raise ValueError(
            f"The adapter file holds {len(unknown)} prompt tensors that this model has no place for, for example "
            f"{unknown[0]!r}. It was trained on a model with other layers, or its adapter_config.json "
            "is of another adapter."
        )
    for adapter, tensors in expected.items():
        if given.isdisjoint(tensors):
            continue
        if missing := _missing(tensors.keys(), given, dispensable):
            raise ValueError(_lacks(adapter, missing, len(tensors)))
        for name in (name for name in tensors if name in given):
            _check_tensor(name, state_dict[name], tensors[name])
            state_dict[name] = aligned(state_dict[name])


def _dispensable(state: AdapterState, path: str) -> dict[str, str]:
    """Tensors that a checkpoint may lack, each with the tensor that it must then have."""
    if not state.dispensable:
        return {}
    container, name = state.dispensable
    held = getattr(state, container)
    return {f"{path}.{container}.{key}.{name}": f"{path}.{container}.{key}.weight" for key in held}


def _missing(expected: Iterable[str], given: set[str], dispensable: dict[str, str]) -> list[str]:
    return sorted(name for name in expected if name not in given and dispensable.get(name) not in given)


def check_read(model: nn.Module, adapter: str) -> None:
    """Check what transformers' own loader has read. It ignores missing tensors and does not look at values.

    Raises:
        ValueError: only some of the adapter's tensors were read, or some are not finite.
    """
    tensors = {
        f"{path}.{name}": tensor
        for path, state in model.named_modules()
        if isinstance(state, AdapterState)
        # Not state_dict(): FSDP would then free the weights gathered for this forward pass.
        for name, tensor in chain(state.named_parameters(), state.named_buffers())
        if name.rsplit(".", 2)[1] == adapter
    }
    read = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    dispensable: dict[str, str] = {}
    for path, state in model.named_modules():
        dispensable |= _dispensable(state, path) if isinstance(state, AdapterState) else {}
    if read and (missing := _missing(tensors.keys(), read, dispensable)):
        raise ValueError(_lacks(adapter, missing, len(tensors)))
    for name in sorted(read):
        _check_tensor(name, tensors[name], tensors[name])
        tensors[name].data = aligned(tensors[name].data)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if needed to memory that is aligned for vector instructions.

    Tensors mapped from a file can start at any byte, and matrix products then round differently. With aligned memory a
    loaded adapter gives bit for bit the outputs of the saved one.
    """
    return tensor if tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _lacks(adapter: str, missing: list[str], total: int) -> str:
    message = (
        f"The adapter file lacks {len(missing)} of the {total} prompt tensors of adapter {adapter!r}, for example "
        f"{missing[0]!r}. "
    )
    if all("_center." in name for name in missing):
        return message + (
            "Router centres are part of the adapter although they need no gradient: save all its tensors in "
            "state_dict() or named_parameters(), not only those that require a gradient."
        )
    return message + "It was trained on a model with fewer layers, or it is damaged."


def check_strangers(model: nn.Module, state_dict: dict[str, Any], prefix: str, adapter: str) -> None:
    """Refuse tensors in an adapter file that PEFT would not have written for this adapter.

    Such tensors could overwrite the base model or another adapter. Allowed are the adapter's prompts, the modules
    saved with it, tensors of other methods' adapters of the same name, and embeddings, which PEFT saves with an
    adapter after the vocabulary was resized.

    Args:
        model: the base model.
        state_dict: the tensors to be loaded, by their names in the model.
        prefix: prefix of the base model's names.
        adapter: name of the adapter.

    Raises:
        ValueError: the file holds other tensors, or a module that the model does not have.
        RuntimeError: a saved module has another shape than in the model.
    """
    own = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter)
    embeddings, others = saved_embeddings(model), getattr(model, "peft_config", {}).keys() - {adapter}
    saved: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterState):
            own |= {name for name in module.state_dict(prefix=f"{path}.") if name.rsplit(".", 2)[1] == adapter}
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            tensors = module.state_dict(prefix=f"{path}.")
            names = [f"{path}.{name}" for name in module.adapter_state_dict_load_map(adapter).values()]
            saved |= {name: tensors[name] for name in names}
    for name in model.state_dict():
        if name.startswith(embeddings) and others.isdisjoint(parts := name.split(".")):
            # PEFT removes the adapter's name from every name that it writes, even where it does not restore it.
            own |= {name, ".".join(part for part in parts if part != adapter)}
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    strangers = [name for name in names if name not in saved and not _is_key_under_prefixes(name, own)]
    _refuse_other_heads(model, strangers, adapter)
    refuse_strangers(strangers, prefix)
    for name, tensor in saved.items():
        if (given := state_dict.get(f"{prefix}{name}")) is not None and not fits(given, tensor):
            raise RuntimeError(_other_size(model, f"{prefix}{name}", given, tensor))


def _refuse_other_heads(model: Any, names: list[str], adapter: str) -> None:
    """Refuse tensors of modules that the adapter's config names and the model does not have."""
    config = getattr(model, "peft_config", {}).get(adapter)
    paths = [path for path, _ in model.named_modules()]
    for module in getattr(config, "modules_to_save", None) or ():
        if any(f".{module}." in f".{name}" for name in names) and not any(takes(module, path) for path in paths):
            raise ValueError(
                f"The adapter was saved with the module {module!r}, which {type(model).__name__} does not have. Load "
                "it onto the model that it was made for."
            )


def fits(given: Tensor, own: Tensor) -> bool:
    """Whether a file's tensor has the shape of a module's, or is the one number that older files hold as ()."""
    return given.shape == own.shape or (given.ndim == 0 and tuple(own.shape) == (1,))


def refuse_strangers(names: list[str], prefix: str = "") -> None:
    """Raise ValueError if `names`, the names of tensors that are not allowed, is not empty."""
    if names:
        raise ValueError(
            f"The adapter file holds {len(names)} tensors that are neither prompts nor saved modules, for example "
            f"{prefix + min(names)!r}. An adapter must not contain weights of the base model or of another "
            "adapter. Do not trust this file."
        )


def saved_embeddings(model: Any) -> tuple[str, ...]:
    """Prefixes of the embeddings that PEFT saves with an adapter after the vocabulary was resized."""
    found = []
    for which in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, which)())
        except (AttributeError, NotImplementedError):  # the model has no embeddings
            continue
    tied = {id(module) for module in found if module is not None}
    return tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in tied)


def _other_size(model: Any, name: str, given: Tensor, own: Tensor) -> str:
    message = f"size mismatch for {name}: {tuple(given.shape)} in the adapter file, {tuple(own.shape)} in the model. "
    config = getattr(model, "config", None)
    rows = (given.shape[0] if given.ndim else 0, own.shape[0] if own.ndim else 0)
    if rows[1] == getattr(config, "num_labels", getattr(model, "num_classes", None)):
        return message + classes_differ(*rows)
    if rows[1] == getattr(config, "vocab_size", None):
        return message + f"The vocabularies differ. Call resize_token_embeddings({rows[0]}) on the base model first."
    return message + "The adapter was trained with a head of another size."


def classes_differ(trained: int, found: int) -> str:
    """The fix for a head with another number of classes."""
    return (
        f"The adapter was trained with {trained} classes, but the base model has {found}. Load the base model with "
        f"num_labels={trained}, and with ignore_mismatched_sizes=True if its own head has another size."
    )


def _check_tensor(name: str, given: Any, expected: Tensor) -> None:
    if given.dtype != expected.dtype and not {given.dtype, expected.dtype} <= FLOATS:
        raise ValueError(
            f"{name!r} has dtype {given.dtype} in the adapter file and {expected.dtype} in the model, and cannot be "
            "converted. Save the adapter again, in floating point."
        )
    if tuple(given.shape) != tuple(expected.shape):
        raise ValueError(
            f"{name!r} has shape {tuple(given.shape)} in the adapter file and {tuple(expected.shape)} in the model: "
            "the adapter was trained with other settings (num_virtual_tokens and the like) than its config says, or "
            "on a model of another width."
        )
    if not given.is_meta and not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name!r} holds values that are not finite; the adapter file is damaged.")
