# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of an attention kernel."""

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
        real: from the mask that the kernel takes, and T, which tokens are text: (B, T); None where nothing is padded.
        attend: calls the kernel's function with rows.
        reads_config: whether the function reads the config of the attention layer, which must then be the real one.
        widest: the widest head that it takes; None for any.
        adds_mask: whether its mask may hold scores, by which the rows that decoding tokens chose get their gates.
    """

    real: Callable[[Any, int], Tensor | None]
    attend: Attend
    reads_config: bool = False
    widest: int | None = None
    adds_mask: bool = True


class PlainModule:
    """An attention layer as its kernel knows it, with its real config in place of the view."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        view: Any = module.config
        self.config = view.real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


CAPPED_TWICE = (
    "Token routing brings the scores of a token's experts ready, and this kernel would cap them once more. Use "
    "attn_implementation='eager' or routing='sample' with this model."
)


def caps_unsaid(module: Any) -> str:
    """What to say of a layer that caps scores and does not tell its kernel."""
    return (
        f"{type(module).__name__} caps its attention scores and does not say so to its kernel, so chosen experts "
        "cannot join them. Use routing='sample' with this model."
    )


def refuse_capped_choice(columns: Columns, cap: float | None) -> None:
    """Refuse chosen experts where the kernel caps scores and takes no mask that could bring theirs: ValueError."""
    if columns.chosen and cap is not None:
        raise ValueError(CAPPED_TWICE)


def check_width(joined: int, width: int, widest: int | None) -> None:
    """Refuse heads that scores of chosen experts make wider than the kernel takes: ValueError."""
    if widest is not None and joined > widest:
        raise ValueError(
            f"Token routing widens heads of {width} to {joined} features, and this kernel takes {widest} at most. "
            "Use attn_implementation='sdpa' or routing='sample' with this model."
        )


def with_bias_of_rows(columns: Columns, module: Any, bias: Tensor) -> Tensor:
    """(B or 1, Hq, T, columns + S) the relative position bias of a call; that of chosen slots is in their score."""
    if columns.bias is None:
        raise ValueError(
            f"{type(module).__name__} adds a relative position bias whose table peft_promptmoe cannot find, so the "
            "prompt rows have no bias. This architecture is not supported."
        )
    of_rows = F.pad(columns.bias.to(bias.dtype), (len(columns.chosen), 0))
    common = max(bias.shape[0], of_rows.shape[0])
    return torch.cat([part.expand(common, *part.shape[1:]) for part in (of_rows, bias)], -1)
