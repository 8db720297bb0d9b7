# SPDX-License-Identifier: Apache-2.0
"""Settings of heads that no trained tensor shows, kept among a head's tensors and compared when it is loaded."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from ..sharing.load_checks import fits

Settings = dict[str, int | float | str | list[int]]

NAME = "settings"
LENGTH = 512  # bytes of a record, the same for nearly all settings: PEFT compares shapes first
LONGEST = 65_536  # bytes of a record of very many blocks
BYTE = 255


class Recorded(nn.Module):
    """Base of heads. Trained with other settings, their tensors would fit and the results would be wrong.

    The record is a buffer, so that every way of saving a head keeps it: adapters of any method, checkpoints of the
    Trainer, whole models. It holds one byte per value in floating point, because averages of weights (EMA, SWA) take
    the average of buffers, too, and cut off or refuse whole numbers.
    """

    settings: Tensor

    def keep_settings(self, **settings: int | float | str | list[int]) -> None:
        """Keep these settings among the head's tensors, and from now on refuse tensors of a head with others."""
        self._recorded: Settings = settings
        self.register_buffer(NAME, _encode(settings))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, own in self.named_parameters(recurse=False):
            given = state_dict.get(f"{prefix}{name}")
            if given is not None and given.shape != own.shape and fits(given, own):
                state_dict[f"{prefix}{name}"] = given.reshape(own.shape)
        stored = state_dict.get(f"{prefix}{NAME}")
        has_data = isinstance(stored, Tensor) and not stored.is_meta  # FSDP fills in meta tensors later
        if stored is not None and has_data and hasattr(self, "_recorded"):
            errors: list[str] = rest[-1]
            made_for = _decode(stored)
            if differ := [name for name, value in self._recorded.items() if made_for.get(name) != value]:
                errors.append(
                    f"These tensors of {type(self).__name__} were trained with {_said(made_for, differ)}, but this "
                    f"one has {_said(self._recorded, differ)}. Create the model with the same settings."
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _encode(settings: Settings) -> Tensor:
    text = json.dumps(settings, sort_keys=True).encode()
    length = max(-(-len(text) // LENGTH), 1) * LENGTH
    return torch.tensor(list(text.ljust(length)), dtype=torch.float32)


def _decode(stored: Tensor) -> dict[str, Any]:
    """Settings from a file, which may be a stranger's: without any that can be read, all differ."""
    values = stored.detach().flatten().float().round()
    if not LENGTH <= values.numel() <= LONGEST or not bool(((values >= 0) & (values <= BYTE)).all()):
        return {}
    try:
        found = json.loads(bytes(values.to(torch.uint8).tolist()))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={values.get(name, 'unknown')!r:.40}" for name in names)
