# SPDX-License-Identifier: Apache-2.0
"""Gathers pMoE's further experts from names and modules, and checks them before any of them is changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...models.sites import Site
from .encoders import build_skeleton, load_encoder
from .identity import check_weights, compare, is_told_apart
from .records import ExpertRecord, describe, hash_bytes, hash_weights, pixels_of, read_tensors
from .sources import Source, check_stored_name, locate, pixels_from, read_folder, stored_size
from .towers import check_free, check_tower, find_encoder, find_tower

__all__ = ["Expert", "ExpertRecord", "check_tower", "gather_experts", "pixels_of"]


@dataclass
class Expert:
    """A further expert: a frozen backbone next to the base model.

    Attributes:
        record: description of the expert in the adapter's config.
        module: the encoder, frozen and in evaluation mode. A timm model keeps its head, which is not used.
        sites: its attention layers, one per block, in order.
    """

    record: ExpertRecord
    module: nn.Module
    sites: list[Site]

    @property
    def key(self) -> str:
        """Name of the expert in adapter files."""
        return self.record.key


@dataclass
class _Candidate:
    """An expert that is still being checked.

    Attributes:
        expert: the expert. One given by name is on the meta device until everything is checked.
        source: its folder. None: a module was passed in.
        stored: its record in the adapter's config, if there is one.
    """

    expert: Expert
    source: Source | None
    stored: ExpertRecord | None


def gather_experts(
    asked: Sequence[str | nn.Module],
    records: Sequence[dict[str, Any]] | None,
    *,
    stored: bool,
    download: bool,
    known: Mapping[str, Expert],
    base: nn.Module,
) -> list[Expert]:
    """Load and check the further experts of one adapter.

    Args:
        asked: names or modules. A name is a local folder or a Hub id, with or without "@revision".
        records: one record per expert from a saved config. None: the config was made by the user.
        stored: whether the names come from a file. Such names load from local folders and the local Hub cache only.
        download: whether a saved name may be downloaded, at its recorded revision.
        known: experts already in the model, by key. They are used again.
        base: the base model.

    Returns:
        The experts in the order of `asked`. An expert already in the model keeps its module and gets its own record,
        because adapters may use it with different pixels. None of them is changed yet: see `freeze`.

    Raises:
        ValueError, TypeError: an expert may not be loaded, is no plain vision transformer, is listed twice, or is not
            the one that the adapter was trained with.
    """
    expected = _read_records(asked, records, stored)
    _check_listed_once(asked)
    found = [
        _find(item, record, stored=stored, download=download, known=known)
        for item, record in zip(asked, expected, strict=True)
    ]
    new = [item for item in found if isinstance(item, _Candidate)]
    _check_apart(new, base)
    if new:
        _announce(new, base)
    for candidate in new:
        _complete(candidate, base)
    experts = [item.expert if isinstance(item, _Candidate) else item for item in found]
    experts = [_as_known(expert, known) for expert in experts]
    _check_different(experts)
    return experts


def _read_records(
    asked: Sequence[str | nn.Module], records: Sequence[dict[str, Any]] | None, stored: bool
) -> list[ExpertRecord | None]:
    if records is None:
        if stored and asked:
            raise ValueError(
                "The saved config names experts but has no expert_records, so they cannot be compared with the "
                "experts it was trained with. Make a new PMoEConfig in your own code."
            )
        return [None] * len(asked)
    if len(records) != len(asked):
        raise ValueError(
            f"The adapter was trained with {len(records)} further experts, but got {len(asked)}. Pass the same "
            "experts in the same order."
        )
    return [ExpertRecord.from_dict(record) for record in records]


def _check_listed_once(asked: Sequence[str | nn.Module]) -> None:
    seen: set[Any] = set()
    for item in asked:
        mark = item if isinstance(item, str) else id(item)
        if mark in seen:
            raise ValueError(f"Expert {_name_of(item)!r} is listed twice. List each expert once.")
        seen.add(mark)


def _check_different(experts: Sequence[Expert]) -> None:
    seen: dict[str, str] = {}
    for expert in experts:
        if expert.key in seen:
            raise ValueError(
                f"Experts {seen[expert.key]!r} and {expert.record.name!r} are the same model, or cannot be told "
                "apart. List each expert once."
            )
        seen[expert.key] = expert.record.name


def _find(
    item: str | nn.Module, record: ExpertRecord | None, *, stored: bool, download: bool, known: Mapping[str, Expert]
) -> Expert | _Candidate:
    """An expert already in the model, or a candidate for a new one, without reading its weights."""
    name = _name_of(item)
    if isinstance(item, str) and stored:
        check_stored_name(item)
    if record is not None and record.key in known and is_told_apart(record):
        compare(known[record.key].record, record)
        return replace(known[record.key], record=record)
    if isinstance(item, nn.Module):
        encoder = find_encoder(item, name)
        for expert in known.values():
            if expert.module is encoder:
                about = describe(name, None, encoder, expert.sites, pixels_of(item))
                return _again(expert, about, record)
        check_free(item, f"Expert {name!r}")
        revision, pixels, source = None, pixels_of(item), None
    else:
        folder, revision = locate(item, record, stored=stored, download=download)
        source = read_folder(item, folder, revision)
        pixels = pixels_from(source)
        for expert in known.values():
            if revision is not None and (expert.record.name, expert.record.revision) == (name, revision):
                return _again(expert, describe(name, revision, expert.module, expert.sites, pixels), record)
        encoder = build_skeleton(source, record)
    sites = find_tower(encoder, name)
    about = describe(name, revision, encoder, sites, pixels)
    if record is not None:
        compare(about, record)
    return _Candidate(Expert(about, encoder, sites), source, record)


def _again(expert: Expert, about: ExpertRecord, record: ExpertRecord | None) -> Expert:
    """An expert of the model for one more adapter, with the record from a file or else from the expert itself."""
    about = replace(about, weights=expert.record.weights, quantised=expert.record.quantised)
    if record is None:
        return replace(expert, record=about)
    compare(about, record)
    check_weights(about, record)
    if record.key != expert.key:
        raise ValueError(
            f"Expert {record.name!r} is quantised in another way than the same expert in this model. Load the "
            "adapter into a separate model."
        )
    return replace(expert, record=record)


def _as_known(expert: Expert, known: Mapping[str, Expert]) -> Expert:
    """The expert with the module already in the model, if it is the same expert.

    Raises:
        ValueError: it cannot be decided whether they are the same.
    """
    there = known.get(expert.key)
    if there is None or there.module is expert.module:
        return expert
    if not is_told_apart(expert.record):
        raise ValueError(
            f"Expert {expert.record.name!r} and an expert of the model have weights that cannot be read "
            "(quantised), so they cannot be compared. Pass the same module again, or use another model."
        )
    return replace(there, record=expert.record)


def _name_of(item: str | nn.Module) -> str:
    return item if isinstance(item, str) else type(item).__name__


def _check_apart(new: Iterable[_Candidate], base: nn.Module) -> None:
    """Raise ValueError if experts share modules with each other or with the base model: prompts would mix."""
    owners = {id(module): "the base model" for module in base.modules()}
    for item in new:
        name, modules = item.expert.record.name, [id(module) for module in item.expert.module.modules()]
        for module in modules:
            if module in owners:
                raise ValueError(
                    f"Expert {name!r} is, or shares modules with, {owners[module]}. The base model is already an "
                    "expert. List every further expert once."
                )
        owners.update(dict.fromkeys(modules, f"expert {name!r}"))


def _announce(new: Iterable[_Candidate], base: nn.Module) -> None:
    """Log the size of the experts before memory is allocated for them.

    Raises:
        ValueError: an expert's files hold fewer values than its config.json describes.
    """
    parts, total = [], (0, 0)
    for item in new:
        tensors = read_tensors(item.expert.module).values()
        count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.itemsize for t in tensors)
        if item.source is not None:
            values, bytes_stored = stored_size(item.source)
            if values < count:
                raise ValueError(
                    f"The weights of expert {item.source.name!r} are {values:,} numbers, but config.json describes a "
                    f"model with {count:,}. The folder is damaged, or holds files of several models."
                )
            size = round(count * bytes_stored / values)
        parts.append(f"{item.expert.record.name} {_weight(count, size)}")
        total = (total[0] + count, total[1] + size)
    beside = _weight(
        sum(parameter.numel() for parameter in base.parameters()),
        sum(parameter.numel() * parameter.itemsize for parameter in base.parameters()),
        "",
    )
    text = f"pMoE experts: {'; '.join(parts)}; in all {_weight(*total)}, beside the base model's {beside}"
    print(text, file=sys.stderr)


def _weight(count: int, size: int, noun: str = " parameters") -> str:
    return f"{count / 1e6:.1f} M{noun}, {size / 1e6:.0f} MB"


def _complete(item: _Candidate, base: nn.Module) -> None:
    """Load the expert if necessary, and compare its weights with those that the adapter was trained with."""
    expert = item.expert
    if item.source is not None:
        expert.module = load_encoder(item.source).to(_device(base))
        expert.sites = find_tower(expert.module, expert.record.name)
    weights = hash_weights(expert.module)
    quantised = hash_bytes(expert.module) if weights is None else None
    expert.record = replace(expert.record, weights=weights, quantised=quantised)
    if item.stored is not None:
        check_weights(expert.record, item.stored)
        # The record decides names in the adapter file and pixels, so that both are as in training.
        expert.record = item.stored


def _device(base: nn.Module) -> torch.device:
    """The device of the base model, to which loaded experts are moved."""
    devices = {parameter.device for parameter in base.parameters() if not parameter.is_meta}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def freeze(encoder: Any) -> None:
    """Turn a module into an expert: frozen, in evaluation mode, without patch masking."""
    encoder.requires_grad_(False)
    encoder.eval()
    if isinstance(encoder, PreTrainedModel) and hasattr(encoder.config, "mask_ratio"):
        encoder.config.mask_ratio = 0.0  # ViT-MAE masks patches in evaluation mode, too
