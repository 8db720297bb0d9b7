# SPDX-License-Identifier: Apache-2.0
"""The description of the base model in an adapter's config: read from a model, and compared at loading."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD
from .load_checks import classes_differ
from .rollback import running_load

Record = dict[str, Any]

SAMPLES = 32  # values that are kept of a tensor
MAX_TENSORS = 8
TOLERANCE = 2.0**-6  # relative difference, twice the rounding of bfloat16
NUMBERS = {"width": "hidden size", "depth": "layers", "num_labels": "num_labels"}


def check_base(config: Any, model: nn.Module) -> None:
    """At loading, refuse a model of another type. Other differences are found by the checks of tensors."""
    if (load := running_load()) is not None:
        check_type(config.base_record, model, config.base_model_name_or_path)
        if said := remark(config.base_record, model, config.base_model_name_or_path):
            load.remarks.append(said)


def note_base(config: Any, model: nn.Module, paths: list[str]) -> None:
    """For a new adapter, write the base model's description into its config. For a loaded one, compare the weights.

    Args:
        config: config of the adapter.
        model: the base model.
        paths: paths of the prompted attention layers.
    """
    if running_load() is None:
        weights = hash_weights(model, paths) if config.check_base_weights else None
        config.base_record = describe_base(model) | {"weights": weights}
    elif config.check_base_weights:
        warn_of_other_weights(config.base_record, model, config.base_model_name_or_path)


def describe_base(model: Any) -> Record:
    """Type, width, depth and number of classes, each None if unknown."""
    timm = getattr(model, "timm_model", model)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", None)
    if (known := getattr(timm, "pretrained_cfg", None)) and timm is model:
        kind = known.get("architecture")
    blocks: Any = getattr(timm, "blocks", None)
    return {
        "type": kind if isinstance(kind, str) else None,
        "width": _count(getattr(text, "hidden_size", None), getattr(timm, "embed_dim", None)),
        "depth": _count(getattr(text, "num_hidden_layers", None), len(blocks) if hasattr(blocks, "__len__") else None),
        "num_labels": _count(getattr(config, "num_labels", None), getattr(timm, "num_classes", None)),
        "weights": None,
    }


def _count(*found: Any) -> int | None:
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def check_record(stored: Any) -> None:
    """Raise TypeError or ValueError if `stored` is neither None nor a valid record."""
    if stored is None:
        return
    if not isinstance(stored, dict):
        raise TypeError(f"base_record must be a dict, got {stored!r:.80}.")
    kind, weights = stored.get("type"), stored.get("weights")
    if kind is not None and not isinstance(kind, str):
        raise TypeError(f"type in base_record must be a string, got {kind!r:.80}.")
    for name in NUMBERS:
        if (value := stored.get(name)) is not None and _count(value) is None:
            raise TypeError(f"{name} in base_record must be an integer, got {value!r:.80}.")
    if weights is None:
        return
    if not isinstance(weights, dict) or not all(isinstance(item, str) for pair in weights.items() for item in pair):
        raise TypeError(f"weights in base_record must be a dict from names to hashes, got {weights!r:.80}.")
    if len(weights) > MAX_TENSORS or not all(
        re.fullmatch(r"([0-9a-f]{4}){1,64}", value) for value in weights.values()
    ):
        raise ValueError(f"weights in base_record must be at most {MAX_TENSORS} hashes, got {weights!r:.80}.")


def check_type(stored: Record | None, model: nn.Module, name: str | None) -> None:
    """Refuse a model of another type than the adapter was made for.

    Args:
        stored: the adapter's record. None in files of older versions.
        model: the base model.
        name: name of the base model that the adapter was made for.

    Raises:
        ValueError: both types are known, and they differ.
    """
    found = describe_base(model)
    if stored is None or None in (stored.get("type"), found["type"]) or stored["type"] == found["type"]:
        return
    raise ValueError(
        f"{_made_for(stored, name)}, but this is a {_summary(found)}. Load it onto the base model it was made for."
    )


def remark(stored: Record | None, model: nn.Module, name: str | None) -> str | None:
    """Addition to a loading error if width, depth or number of classes differ from the adapter's record; else None."""
    found = describe_base(model)
    if stored is None or not (differ := [key for key in NUMBERS if _differ(stored.get(key), found[key])]):
        return None
    if differ == ["num_labels"]:
        return classes_differ(stored["num_labels"], found["num_labels"])
    return f"{_made_for(stored, name)}, but this model has {_numbers(found)}."


def _differ(stored: Any, found: Any) -> bool:
    return stored is not None and found is not None and stored != found


def _made_for(stored: Record, name: str | None) -> str:
    called = f"{name!r:.200}, " if name else ""
    return f"The adapter was made for {called}a {_summary(stored)}"


def _summary(record: Record) -> str:
    return f"{record.get('type') or 'model'!s:.80} with {_numbers(record)}"


def _numbers(record: Record) -> str:
    return f"hidden size {record.get('width') or 'unknown'} and {record.get('depth') or 'unknown'} layers"


# -- which weights ----------------------------------------------------------------------------------------------------


def hash_weights(model: nn.Module, paths: list[str]) -> dict[str, str] | None:
    """A few values of a few frozen tensors, as hexadecimal digits of bfloat16.

    These are values and not a digest, because copies in float32, float16 and bfloat16 count as the same model.

    Args:
        model: the base model.
        paths: paths of the prompted attention layers.

    Returns:
        The digits by name of the tensor. None if values cannot be read: quantised weights, weights on the meta device,
        or weights sharded over processes.
    """
    chosen = (name for path in (paths[0], paths[-1]) for name in islice(_matrices(model, path), 2))
    tensors = _frozen(model)
    return {name: _digits(tensors[name]) for name in dict.fromkeys(chosen)} or None


def warn_of_other_weights(stored: Record | None, model: nn.Module, name: str | None) -> None:
    """Warn if the model has the right shape but other weights than the adapter was made for."""
    tensors = _frozen(model)
    weights = (stored or {}).get("weights") or {}
    pairs = [(values, _digits(tensors[key])) for key, values in weights.items() if key in tensors]
    if any(_are_other(values, found) for values, found in pairs if len(values) == len(found)):
        called = f"{name!r:.200}" if name else "another model"
        warnings.warn(
            f"The adapter was made for the weights of {called}, but this base model has other weights, so its results "
            "may be bad. Load that base model, or set check_base_weights=False in the adapter's config to allow this.",
            stacklevel=2,
        )


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the base model whose values can be read, by their names without adapters."""
    named = model.named_parameters(remove_duplicate=False)
    return {
        name.replace("base_layer.", "").replace("original_module.", ""): tensor
        for name, tensor in named
        if PROMPT_CHILD not in name.split(".") and _at_hand(tensor)
    }


def _at_hand(tensor: Tensor) -> bool:
    plain = type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta and tensor.numel() > 0
    return plain and tensor.is_floating_point() and tensor.itemsize >= 2 and tensor.untyped_storage().size() > 0


def _matrices(model: nn.Module, path: str) -> Iterable[str]:
    tensors = _frozen(model)
    return (name for name in tensors if name.startswith(f"{path}.") and tensors[name].ndim > 1)


def _digits(tensor: Tensor) -> str:
    flat = tensor.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
    return "".join(f"{value & 0xFFFF:04x}" for value in values.tolist())


def _are_other(stored: str, found: str) -> bool:
    """Whether more than an eighth of the values differ by more than rounding."""
    one, two = (_values(digits) for digits in (stored, found))
    far = (one - two).abs() > TOLERANCE * torch.maximum(one.abs(), two.abs())
    return int(far.sum()) > len(one) // 8


def _values(digits: str) -> Tensor:
    bits = [int(digits[at : at + 4], 16) for at in range(0, len(digits), 4)]
    signed = torch.tensor([value - 0x10000 if value >= 0x8000 else value for value in bits], dtype=torch.int16)
    return signed.view(torch.bfloat16).double()
