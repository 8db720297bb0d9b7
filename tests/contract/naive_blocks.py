# SPDX-License-Identifier: Apache-2.0
"""Deep prompts as their definition has them: rows in front of a block's input, dropped behind the block.

Works on any model whose blocks take hidden states, and where they have them a 4-D mask and rotary tables, without
knowing what is inside a block. That is what makes it a check of the generic rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Hook = Callable[..., Any]
Rows = Callable[[Tensor], Tensor]

# What opens a column of the mask that these blocks are given, where it is not True or 0.
OPEN = {"MptBlock": False, "DebertaLayer": 1, "DebertaV2Layer": 1}


@contextmanager
def rows_through_blocks(
    model: Any,
    sites: list[Any],
    rows: Sequence[Tensor | Rows],
    count: int,
    last_stays: bool = False,
    slots: int | None = None,
    gates: Sequence[Rows] | None = None,
) -> Iterator[None]:
    """Hook the blocks of `sites`.

    Args:
        model: the base model.
        sites: of the package, of which only the block, causality and the rotary module are used.
        rows: (P, D) for each site, or what makes (B, P, D) of a block's input (B, T, D).
        count: P.
        last_stays: whether the last block's rows are left in its output, and a decoder sees them.
        slots: of one expert, where rows are of several: then each expert's stand right before the text.
        gates: what makes (B, T, P) of a block's input, which is added to the scores of text on rows.
    """
    handles = []
    for number, (site, row) in enumerate(zip(sites, rows, strict=True)):
        handles.append(
            site.block.register_forward_pre_hook(
                _prepend(site, row, count, slots or count, gates[number] if gates else None), with_kwargs=True
            )
        )
        if not (last_stays and number == len(sites) - 1):
            handles.append(site.block.register_forward_hook(_drop(count)))
    if last_stays:
        decoder = model.get_decoder()
        handles.append(decoder.register_forward_pre_hook(_show_decoder(count), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prepend(site: Any, rows: Tensor | Rows, count: int, slots: int, gates: Rows | None) -> Hook:
    offsets = torch.arange(count) % slots - slots
    names = list(inspect.signature(inspect.unwrap(type(site.block).forward)).parameters)[1:]

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given[names[0]]
        batch, length = x.shape[:2]
        made = rows if isinstance(rows, Tensor) else rows(x)
        given[names[0]] = torch.cat([made.to(x.dtype).expand(batch, count, -1), x], dim=1)
        mask = given.get("attention_mask")
        if mask is None and site.causal:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            open_ = OPEN.get(type(site.block).__name__, True if mask.dtype == torch.bool else 0.0)
            mask = F.pad(mask, (count, 0), value=open_)
            if mask.shape[2] > 1:  # a prompt sees what the first token sees; padding is on the right
                mask = torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], dim=2)
            if gates is not None:
                mask = _gated(mask, gates(x))
            given["attention_mask"] = mask
        positions = given.get("position_ids")
        if isinstance(positions, Tensor):  # Ministral scales queries by them, and those of the rows nobody sees
            given["position_ids"] = F.pad(positions, (count, 0))
        owner = site.bias_owner
        if given.get("position_bias") is not None and hasattr(owner, "relative_position_bucket"):  # MPNet
            columns = torch.arange(count + length)
            buckets = owner.relative_position_bucket(columns[None, :] - columns[:, None])
            given["position_bias"] = owner.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        if given.get("sinusoidal_pos") is not None:  # RoFormer's, of a text that is longer
            given["sinusoidal_pos"] = _sinusoids(count + length, given["sinusoidal_pos"])
        if given.get("alibi") is not None:
            given["alibi"] = _steeper(given["alibi"], offsets)
        if given.get("relative_pos") is not None:  # DeBERTa's, query minus key: those of a text that is longer
            columns = torch.arange(count + length)
            make = inspect.unwrap(type(site.attention).forward).__globals__["build_relative_position"]
            settings = {}
            if hasattr(site.attention, "position_buckets"):
                settings["bucket_size"] = site.attention.position_buckets
                settings["max_position"] = site.attention.max_relative_positions
            given["relative_pos"] = make(columns[:, None], columns[:, None], **settings)
        tables = given.get("position_embeddings")
        if tables is not None:
            kind = {"layer_type": site.rotary_type} if site.rotary_type else {}
            # The text starts at position 0 here: these tests pad on the right.
            before = _tables_before(site, x, tables, offsets, kind)
            given["position_embeddings"] = _joined(before, tables, batch)
        return (), given

    return hook


def _gated(mask: Tensor, gates: Tensor) -> Tensor:
    """An additive mask (B, 1, P + T, P + T) with gates (B, T, P) on what text sees of the first P columns."""
    batch, length, count = gates.shape
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=gates.dtype).masked_fill(~mask, torch.finfo(gates.dtype).min)
    mask = mask.expand(batch, -1, count + length, -1).clone()
    mask[:, :, count:, :count] += gates[:, None]
    return mask


def _sinusoids(length: int, like: Tensor) -> Tensor:
    """(1, 1, length, d) sines and cosines, side by side."""
    pairs = like.shape[-1] // 2
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)[None, None]


def _steeper(alibi: Tensor, offsets: Tensor) -> Tensor:
    """Linear biases (..., S) that are zero at the first token, with those of places `offsets` from it in front."""
    slope = alibi[..., 1:2] - alibi[..., :1]
    return torch.cat([slope * offsets.to(alibi.dtype), alibi], dim=-1)


def _tables_before(site: Any, x: Tensor, tables: Any, offsets: Tensor, kind: dict[str, Any]) -> Any:
    """Rotary tables of positions `offsets` from the first token's."""
    positions = offsets[None].expand(len(x), -1)
    if site.rotary is None:  # Falcon with linear biases, which does not look at its tables
        return tuple(table[:, :1].expand(len(x), len(offsets), -1) for table in tables)
    if site.sine_first:  # GPT-J, which has a table by position and none below zero
        pairs = tables[0].shape[-1]
        angles = positions[..., None] * 10000.0 ** (-torch.arange(pairs) / pairs)
        return torch.sin(angles).to(x.dtype), torch.cos(angles).to(x.dtype)
    return site.rotary(x, positions, **kind)


def _joined(before: Any, tables: Any, batch: int) -> Any:
    if isinstance(tables, Tensor):
        return torch.cat([before, tables.expand(batch, -1, -1)], dim=1)
    return tuple(_joined(front, table, batch) for front, table in zip(before, tables, strict=True))


def _drop(count: int) -> Hook:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, list):  # OpenAI GPT
            return [output[0][:, count:], *output[1:]]
        return (output[0][:, count:], *output[1:]) if isinstance(output, tuple) else output[:, count:]

    return hook


def _show_decoder(count: int) -> Hook:
    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "encoder_attention_mask": F.pad(mask, (count, 0), value=1)}
        return args, kwargs

    return hook
