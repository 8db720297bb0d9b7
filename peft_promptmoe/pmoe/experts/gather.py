# SPDX-License-Identifier: Apache-2.0
"""The further experts of pMoE: frozen encoders, gathered from names and modules and checked before any is touched."""

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
    """A frozen backbone beside the base model.

    Attributes:
        record: what the adapter's config says of it.
        module: the encoder, frozen and in evaluation mode; timm's with its head, which is never read.
        sites: its attention layers, one of each block, in order.
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
    """An expert on its way.

    Attributes:
        expert: of a name, on the meta device until everything about it has been checked.
        source: its folder; None for a module that was handed over.
        stored: what the adapter's config says of it.
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
        asked: names or modules. A name is a local folder, or a Hub id, with "@revision" or without.
        records: what a stored config says of them, one for each; None for a config of the user's own call.
        stored: whether the names come from a file. Such names load from local folders and the local Hub cache only.
        download: whether a stored name may be downloaded, at its recorded revision.
        known: experts that are in the model already, by key; they are used again.
        base: the base model.

    Returns:
        The experts as asked for; one that is in the model already has the module that is there and a record of its
        own, for adapters may want other pixels of it. None is touched yet: see `freeze`.

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
                "The stored config names experts and does not record what they were (expert_records), so nobody can "
                "tell whether they are the ones it was trained with. Make a new PMoEConfig in your own code."
            )
        return [None] * len(asked)
    if len(records) != len(asked):
        raise ValueError(
            f"The adapter was trained with {len(records)} further experts and is given {len(asked)}. Give it the same "
            "ones in the same order."
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
    """An expert that is in the model already, or what can be said of a new one without reading its weights."""
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
    """An expert of the model for one more adapter, whose record is what a file says of it or what it says itself."""
    about = replace(about, weights=expert.record.weights, quantised=expert.record.quantised)
    if record is None:
        return replace(expert, record=about)
    compare(about, record)
    check_weights(about, record)
    if record.key != expert.key:
        raise ValueError(
            f"Expert {record.name!r} is quantised, in another way than the model's own. Load the adapter into a model "
            "of its own."
        )
    return replace(expert, record=record)


def _as_known(expert: Expert, known: Mapping[str, Expert]) -> Expert:
    """With the module that is in the model already, if it is the same.

    Raises:
        ValueError: this cannot be told.
    """
    there = known.get(expert.key)
    if there is None or there.module is expert.module:
        return expert
    if not is_told_apart(expert.record):
        raise ValueError(
            f"Expert {expert.record.name!r} and one of the model's own have weights whose values cannot "
            "be read (quantised ones), so nobody can say whether they are the same. Hand over the same module "
            "again, or use another model."
        )
    return replace(there, record=expert.record)


def _name_of(item: str | nn.Module) -> str:
    return item if isinstance(item, str) else type(item).__name__


def _check_apart(new: Iterable[_Candidate], base: nn.Module) -> None:
    """No two experts share a module, nor any with the base model: prompts of one would enter the other."""
    owners = {id(module): "the base model" for module in base.modules()}
    for item in new:
        name, modules = item.expert.record.name, [id(module) for module in item.expert.module.modules()]
        for module in modules:
            if module in owners:
                raise ValueError(
                    f"Expert {name!r} is, or shares modules with, {owners[module]}. The base model is an expert "
                    "already; list every further one once."
                )
        owners.update(dict.fromkeys(modules, f"expert {name!r}"))


def _announce(new: Iterable[_Candidate], base: nn.Module) -> None:
    """Say what the experts weigh before memory is given to them.

    Raises:
        ValueError: the files of one hold fewer values than its config.json describes.
    """
    parts, total = [], (0, 0)
    for item in new:
        tensors = read_tensors(item.expert.module).values()
        count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.itemsize for t in tensors)
        if item.source is not None:
            values, bytes_stored = stored_size(item.source)
            if values < count:
                raise ValueError(
                    f"The weights of expert {item.source.name!r} are {values:,} numbers, and config.json describes a "
                    f"model of {count:,}. The folder is damaged, or not one model's."
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
    """Load what is to be loaded and compare the weights with those that the adapter was trained with."""
    expert = item.expert
    if item.source is not None:
        expert.module = load_encoder(item.source).to(_device(base))
        expert.sites = find_tower(expert.module, expert.record.name)
    weights = hash_weights(expert.module)
    quantised = hash_bytes(expert.module) if weights is None else None
    expert.record = replace(expert.record, weights=weights, quantised=quantised)
    if item.stored is not None:
        check_weights(expert.record, item.stored)
        # Names in the adapter's file, and pixels as in training, follow the record.
        expert.record = item.stored


def _device(base: nn.Module) -> torch.device:
    """Where an expert that was loaded joins the base model."""
    devices = {parameter.device for parameter in base.parameters() if not parameter.is_meta}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def freeze(encoder: Any) -> None:
    """Make a module that was handed over an expert: frozen, in evaluation mode, all its patches seen."""
    encoder.requires_grad_(False)
    encoder.eval()
    if isinstance(encoder, PreTrainedModel) and hasattr(encoder.config, "mask_ratio"):
        encoder.config.mask_ratio = 0.0  # ViT-MAE hides patches also in evaluation mode
