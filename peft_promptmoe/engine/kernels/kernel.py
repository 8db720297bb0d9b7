# SPDX-License-Identifier: Apache-2.0
"""Description of an attention kernel, as the engine needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..columns import Columns

Function = Callable[..., tuple[Tensor, Tensor | None]]


class Attend(Protocol):
    """One attention call with prompt rows.

    Shapes: query (B, Hq, T, d); key and value (B, H, S, d); output (B, T, Hq, d) and weights, if the kernel has any.
    """

    def __call__(
        self,
        function: Function,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        columns: Columns,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Kernel:
    """How prompt rows join the calls of one attention kernel.

    Attributes:
        real: function of the kernel's mask and T that returns which tokens are text, (B, T), or None without padding.
        attend: function that calls the kernel with prompt rows.
        reads_config: whether the kernel reads the attention layer's config, which must then be the real one.
        widest: largest head width that it supports. None: any.
        adds_mask: whether its mask may hold scores. In decoding, chosen rows get their gates through the mask.
    """

    real: Callable[[Any, int], Tensor | None]
    attend: Attend
    reads_config: bool = False
    widest: int | None = None
    adds_mask: bool = True


class PlainModule:
    """An attention layer for its kernel, with the real config instead of the view."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        view: Any = module.config
        self.config = view.real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


CAPPED_TWICE = (
    "With token routing this kernel would cap the scores of chosen experts twice. Use attn_implementation='eager' or "
    "routing='sample' with this model."
)


def caps_unsaid(module: Any) -> str:
    """The message about a layer that caps scores without telling its kernel."""
    return (
        f"{type(module).__name__} caps its attention scores without telling its kernel, so token routing is not "
        "possible. Use routing='sample' with this model."
    )


def refuse_capped_choice(columns: Columns, cap: float | None) -> None:
    """Raise ValueError for chosen experts if the kernel caps scores and its mask cannot hold scores."""
    if columns.chosen and cap is not None:
        raise ValueError(CAPPED_TWICE)


def check_width(joined: int, width: int, widest: int | None) -> None:
    """Raise ValueError if the extra features of token routing make heads wider than the kernel supports."""
    if widest is not None and joined > widest:
        raise ValueError(
            f"Token routing widens heads of {width} to {joined} features, but this kernel supports {widest} at most. "
            "Use attn_implementation='sdpa' or routing='sample' with this model."
        )


def with_bias_of_rows(columns: Columns, module: Any, bias: Tensor) -> Tensor:
    """Relative position bias of a call, (B or 1, Hq, T, columns + S). Chosen slots have theirs in their score."""
    if columns.bias is None:
        raise ValueError(
            f"{type(module).__name__} adds a relative position bias, but its table was not found, so prompt rows "
            "would have no bias. This architecture is not supported."
        )
    of_rows = F.pad(columns.bias.to(bias.dtype), (len(columns.chosen), 0))
    common = max(bias.shape[0], of_rows.shape[0])
    return torch.cat([part.expand(common, *part.shape[1:]) for part in (of_rows, bias)], -1)
