# SPDX-License-Identifier: Apache-2.0
"""Records of experts in an adapter's config: their format, and how they are made from a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ...config import check_choice, check_int, check_number
from ...models.sites import Site

MAX_WIDTH, MAX_DEPTH, MAX_PIXELS = 65_536, 1024, 16_384
# They resample their positions, or turn by them, whatever the image.
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")

Pixels = tuple[list[float] | None, list[float] | None]


@dataclass(frozen=True)
class ExpertRecord:
    """Description of one expert in an adapter's config, in plain JSON values.

    Attributes:
        name: name that the user gave. For a module that was passed in, its class.
        revision: commit on the Hub. None for folders and modules.
        library: "transformers" or "timm".
        type: `model_type` in transformers, or architecture in timm.
        width: width `D_k`.
        depth: number of blocks `L_k`.
        patch: size of a patch in pixels, (rows, columns).
        weights: hash of the weights (`hash_weights`). None if they cannot be compared.
        quantised: hash of the bytes of quantised weights (`hash_bytes`), to tell experts apart.
        mean, std: pixel normalisation that the expert needs, per channel. None if unknown.
        size: image size that the expert needs in pixels, (rows, columns). None: it takes any size.
    """

    name: str
    revision: str | None
    library: str
    type: str
    width: int
    depth: int
    patch: list[int]
    weights: str | None
    quantised: str | None
    mean: list[float] | None
    std: list[float] | None
    size: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> ExpertRecord:
        """Read a record from a saved config.

        Raises:
            TypeError, ValueError: it is not a record, or has values that no expert can have.
        """
        if not isinstance(stored, dict):
            raise TypeError(f"expert_records must hold a dict for every expert, got {stored!r:.80}.")
        names = {field.name for field in fields(cls)}
        if odd := sorted(str(name) for name in stored.keys() ^ names):
            raise ValueError(
                f"An entry of expert_records must have the fields {', '.join(sorted(names))}; {', '.join(odd)[:200]} "
                "should not be there, or is missing. Save the adapter again with this version of peft_promptmoe."
            )
        _check_text("name", stored["name"], r"(?s).{1,4096}")
        _check_text("revision", stored["revision"], r"[0-9a-f]{40}", optional=True)
        check_choice("library of an expert", stored["library"], ("transformers", "timm"))
        _check_text("type", stored["type"], r"[\w.\-]{1,256}")
        check_int("width of an expert", stored["width"], 1, MAX_WIDTH)
        check_int("depth of an expert", stored["depth"], 1, MAX_DEPTH)
        for name in ("weights", "quantised"):
            _check_text(name, stored[name], r"[0-9a-f]{64}", optional=True)
        values = dict(stored)
        values["patch"] = _checked_sides("patch", stored["patch"])
        values["size"] = None if stored["size"] is None else _checked_sides("size", stored["size"])
        values["mean"], values["std"] = _checked_pixels(stored["mean"], stored["std"])
        return cls(**values)

    @property
    def key(self) -> str:
        """Name of the expert in adapter files."""
        if (digest := self.weights or self.quantised) is not None:
            return f"e{digest[:12]}"
        about = json.dumps([self.library, self.type, self.width, self.depth, self.name])
        return f"e{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _check_text(name: str, value: Any, pattern: str, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} of an expert must be a string, got {value!r:.80}.")
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{name} of an expert must match {pattern}, got {value!r:.80}.")


def _checked_sides(name: str, value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{name} of an expert must be rows and columns, got {value!r:.80}.")
    for side in value:
        check_int(f"{name} of an expert", side, 1, MAX_PIXELS)
    return list(value)


def _checked_pixels(mean: Any, std: Any) -> Pixels:
    if mean is None and std is None:
        return None, None
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (list, tuple)) or len(values) not in (1, 3):
            raise TypeError(f"{name} of an expert must be one or three numbers, got {values!r:.80}.")
        for value in values:
            check_number(f"{name} of an expert", value, 0.0 if name == "std" else -1e6, 1e6, open_low=name == "std")
    if len(mean) != len(std):
        raise ValueError("mean and std of an expert must have the same number of channels.")
    return [float(value) for value in mean], [float(value) for value in std]


# -- records from models ----------------------------------------------------------------------------------------------


def describe(name: str, revision: str | None, encoder: nn.Module, sites: list[Site], pixels: Pixels) -> ExpertRecord:
    """Make the record of an encoder, without hashes of weights. Also works on the meta device.

    Args:
        name: name that the user gave.
        revision: commit on the Hub.
        encoder: the encoder without head.
        sites: its attention layers, checked by `check_tower`.
        pixels: (mean, std) of the normalisation that it needs.
    """
    patches = sites[0].patches
    assert patches is not None
    library, kind = _kind(encoder)
    size = None if _takes_any_size(encoder, kind) else patches.image_size
    return ExpertRecord(
        name=name,
        revision=revision,
        library=library,
        type=kind,
        width=sites[0].width,
        depth=len(sites),
        patch=list(patches.size),
        weights=None,
        quantised=None,
        mean=pixels[0],
        std=pixels[1],
        size=None if size is None else list(size),
    )


def _kind(encoder: Any) -> tuple[str, str]:
    if isinstance(encoder, PreTrainedModel):
        return "transformers", encoder.config.model_type or type(encoder).__name__
    known = getattr(encoder, "pretrained_cfg", None) or getattr(encoder, "default_cfg", None) or {}
    return "timm", known.get("architecture") or type(encoder).__name__


def _takes_any_size(encoder: nn.Module, kind: str) -> bool:
    return kind in ANY_SIZE or bool(getattr(encoder, "dynamic_img_size", False))


def read_tensors(encoder: Any) -> dict[str, Tensor]:
    """The parameters and floating-point buffers that an encoder's feature depends on, by name.

    Heads and poolers are left out: they are not used, and the same checkpoint can be loaded with and without them.
    """
    heads = encoder.get_classifier() if hasattr(encoder, "get_classifier") else ()
    unread = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,))}
    prefixes = tuple(f"{name}." for name, module in encoder.named_modules() if name and id(module) in unread)
    if isinstance(encoder, PreTrainedModel):
        prefixes += ("pooler.",)
    parameters = {name for name, _ in encoder.named_parameters(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if isinstance(tensor, Tensor)
        and not name.startswith(prefixes)
        and not name.endswith("mask_token")
        and (name in parameters or tensor.is_floating_point())
    }


def hash_weights(encoder: nn.Module) -> str | None:
    """SHA-256 of names, shapes and values. Values are cast to bfloat16, so that copies in fp32 and bf16 agree.

    Returns:
        64 hexadecimal digits. None for quantised or distributed weights, whose values cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(encoder).items()):
        # An 8-bit float has a value only together with its scale, which is stored elsewhere.
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.itemsize < 2:
            return None
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def hash_bytes(encoder: nn.Module) -> str | None:
    """SHA-256 of names, shapes and bytes, for weights that `hash_weights` cannot read.

    Returns:
        64 hexadecimal digits. None for weights that are distributed over processes or whose bytes cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(encoder).items()):
        if hasattr(tensor, "device_mesh"):
            return None
        try:
            content = tensor.detach().as_subclass(Tensor).cpu().contiguous().flatten().view(torch.uint8).numpy()
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(content.tobytes())
    return digest.hexdigest()


# -- pixel normalisation ----------------------------------------------------------------------------------------------


def pixels_of(model: Any) -> Pixels:
    """(mean, std) of the pixel normalisation that a model needs, from its image processor or timm's data config.

    Nothing is downloaded: the processor's file is searched in the model's folder and in the Hub cache.

    Returns:
        Mean and std per channel, or None and None if unknown.
    """
    config = getattr(model, "config", None)
    # A wrapper's config speaks for its checkpoint, the timm model in it for the architecture only.
    for owner in (config, model, getattr(model, "timm_model", None)):
        known = getattr(owner, "pretrained_cfg", None)
        if isinstance(known, dict):
            return known_pixels(known.get("mean"), known.get("std"))
    source = getattr(config, "_name_or_path", None)
    if not isinstance(source, str) or not source:
        return None, None
    if os.path.isdir(source):
        return pixels_in(Path(source))
    try:
        file = cached_file(source, "preprocessor_config.json", local_files_only=True)
    except (OSError, ValueError):
        return None, None
    return pixels_in(Path(file).parent) if file else (None, None)


def pixels_in(folder: Path) -> Pixels:
    """(mean, std) from the `preprocessor_config.json` of a folder."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, None
    if not isinstance(found, dict):
        return None, None
    if found.get("do_normalize") is False:
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return known_pixels(found.get("image_mean"), found.get("image_std"))


def known_pixels(mean: Any, std: Any) -> Pixels:
    """(mean, std) if they are valid in a record, else None and None."""
    try:
        found = _checked_pixels(mean, std)
    except (TypeError, ValueError):
        return None, None
    return found if found[0] is None or all(map(math.isfinite, found[0])) else (None, None)
