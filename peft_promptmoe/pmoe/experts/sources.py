# SPDX-License-Identifier: Apache-2.0
"""Finds the local folder of an expert given by name, and checks that it holds a model and no code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from .records import ExpertRecord, Pixels, known_pixels, pixels_in

# Errors that transformers, timm and safetensors raise for damaged files or files that do not fit together.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json"]
HAND_OVER = (
    "pass the model itself: config = PMoEConfig.from_pretrained(adapter); config.experts = [module]; "
    "PeftModel.from_pretrained(base, adapter, config=config)"
)


@dataclass(frozen=True)
class Source:
    """A folder with one model.

    Attributes:
        name: name of the expert, as the user gave it.
        revision: commit on the Hub. None for local folders.
        folder: path of the folder.
        settings: content of its config.json.
        files: its safetensors files.
    """

    name: str
    revision: str | None
    folder: Path
    settings: dict[str, Any]
    files: list[Path]

    @property
    def is_timm(self) -> bool:
        return "architecture" in self.settings


def locate(name: str, record: ExpertRecord | None, *, stored: bool, download: bool) -> tuple[str, str | None]:
    """Folder and commit of an expert given by name.

    Raises:
        ValueError: the expert is not available, or may not be downloaded.
    """
    if stored:
        check_stored_name(name)
    if os.path.isdir(name):
        return name, None
    repository, _, revision = name.partition("@")
    if stored:
        if record is None or record.revision is None or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", repository):
            raise ValueError(
                f"The adapter's expert {name!r} is neither a local folder nor a Hub model with a recorded revision. "
                f"Put it where the config says, or {HAND_OVER}."
            )
        revision = record.revision
    only_cached = stored and not download
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=FILES, local_files_only=only_cached
        )
    except (OSError, ValueError) as error:
        if only_cached:
            raise ValueError(
                f"The adapter's expert {repository!r} is not in the local cache at revision {revision}. Experts that "
                "an adapter names are downloaded only with your permission. Set download_experts=True on the loaded "
                f"config, or {HAND_OVER}."
            ) from error
        raise ValueError(
            f"Expert {name!r} is not a local folder, and the Hub did not return it: {error} Check the name, or pass a "
            "loaded module."
        ) from error
    commit = Path(folder).name
    return folder, commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def check_stored_name(name: str) -> None:
    """Raise ValueError for names that a saved config must not have: URLs, network paths, paths with `..`."""
    if "://" in name or name.startswith(("//", "\\\\")) or ".." in re.split(r"[\\/]", name):
        raise ValueError(
            f"The adapter names the expert {name!r:.200}, a URL or a path that leads upwards. Adapters must not "
            f"name such experts. If you know the model, {HAND_OVER}."
        )


def read_folder(name: str, folder: str, revision: str | None) -> Source:
    """Read config.json and the names of the weight files in a folder.

    Raises:
        ValueError: it holds no model that can be loaded safely.
    """
    path = Path(folder)
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expert {name!r} has no config.json that can be read: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"Expert {name!r} has a config.json that describes no model.")
    if (path / "adapter_config.json").exists():
        # transformers would follow an adapter to its base model.
        raise ValueError(f"Expert {name!r} is an adapter. Load and merge it yourself, and pass the module.")
    if _has_key(settings, "quantization_config"):
        raise ValueError(f"Expert {name!r} is quantised. Load it yourself, and pass the module.")
    kind = settings.get("model_type")
    if "architecture" not in settings and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        why = "asks for code of its own (auto_map)" if "auto_map" in settings else "names no architecture"
        raise ValueError(
            f"Expert {name!r} {why} that transformers or timm know: model_type is {kind!r:.80}. "
            "Experts are loaded with these libraries' own classes only. Load it yourself, and pass the module."
        )
    return Source(name, revision, path, settings, _weight_files(name, path))


def _has_key(settings: Any, key: str) -> bool:
    """Whether the key is anywhere in a config, also in nested settings."""
    return isinstance(settings, dict) and (key in settings or any(_has_key(part, key) for part in settings.values()))


def _weight_files(name: str, folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    found = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if whole not in found and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expert {name!r} has an index of its weights that cannot be read: {error}.") from error
        if not all(isinstance(part, str) and re.fullmatch(r"[\w.\-]+\.safetensors", part) for part in names):
            raise ValueError(f"Expert {name!r} has an index of weights that names files outside its folder.")
        found = [folder / part for part in names]
    elif len(found) > 1:
        raise ValueError(
            f"Expert {name!r} has several weight files but no model.safetensors. Rename the right file to this name."
        )
    if not found or not all(path.is_file() for path in found):
        raise ValueError(
            f"Expert {name!r} has no weights in safetensors format. Other formats can run code when they are loaded. "
            "Save the model with save_pretrained first, or load it yourself and pass the module."
        )
    return found


def stored_size(source: Source) -> tuple[int, int]:
    """Numbers of values and bytes in the weight files, from their headers.

    Raises:
        ValueError: a file is damaged.
    """
    values = 0
    with explained(source):
        for file in source.files:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    values += torch.Size(weights.get_slice(name).get_shape()).numel()
    return values, sum(os.path.getsize(file) for file in source.files)


def pixels_from(source: Source) -> Pixels:
    """(mean, std) of the pixel normalisation that the model in a folder needs."""
    if source.is_timm:
        known = source.settings.get("pretrained_cfg", source.settings)
        return known_pixels(known.get("mean"), known.get("std")) if isinstance(known, dict) else (None, None)
    return pixels_in(source.folder)


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Context manager: turn errors of a library about a folder into one ValueError that names the expert."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"Expert {source.name!r} cannot be loaded from {str(source.folder)!r}: {error}") from error
