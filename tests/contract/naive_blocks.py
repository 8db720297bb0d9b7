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


@contextmanager
def rows_through_blocks(
    model: Any, sites: list[Any], rows: Sequence[Tensor | Rows], count: int, last_stays: bool = False
) -> Iterator[None]:
    """Hook the blocks of `sites`.

    Args:
        model: the base model.
        sites: of the package, of which only the block, causality and the rotary module are used.
        rows: (P, D) for each site, or what makes (B, P, D) of a block's input (B, T, D).
        count: P.
        last_stays: whether the last block's rows are left in its output, and a decoder sees them.
    """
    handles = []
    for number, (site, row) in enumerate(zip(sites, rows, strict=True)):
        handles.append(site.block.register_forward_pre_hook(_prepend(site, row, count), with_kwargs=True))
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


def _prepend(site: Any, rows: Tensor | Rows, count: int) -> Hook:
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
            open_ = True if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (count, 0), value=open_)
            if mask.shape[2] > 1:  # a prompt sees what the first token sees; padding is on the right
                mask = torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], dim=2)
            given["attention_mask"] = mask
        tables = given.get("position_embeddings")
        if tables is not None:
            kind = {"layer_type": site.rotary_type} if site.rotary_type else {}
            # The text starts at position 0 here: these tests pad on the right.
            if site.rotary is None:  # prompts turned like the first token, which is "unrotated"
                before = tuple(table[:, :1].expand(batch, count, -1) for table in tables)
            else:
                before = site.rotary(x, torch.arange(-count, 0)[None].expand(batch, -1), **kind)
            given["position_embeddings"] = tuple(
                torch.cat([front, table.expand(batch, -1, -1)], dim=1)
                for front, table in zip(before, tables, strict=True)
            )
        return (), given

    return hook


def _drop(count: int) -> Hook:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0][:, count:], *output[1:]) if isinstance(output, tuple) else output[:, count:]

    return hook


def _show_decoder(count: int) -> Hook:
    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "encoder_attention_mask": F.pad(mask, (count, 0), value=1)}
        return args, kwargs

    return hook
