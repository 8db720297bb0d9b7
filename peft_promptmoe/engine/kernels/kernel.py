# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of an attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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
    """

    real: Callable[[Any, int], Tensor | None]
    attend: Attend
    reads_config: bool = False
    widest: int | None = None


class PlainModule:
    """An attention layer as its kernel knows it, with its real config in place of the view."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        view: Any = module.config
        self.config = view.real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def refuse_capped_gates(columns: Columns, kwargs: dict[str, Any]) -> None:
    """Refuse gates on scores that the kernel caps: ValueError."""
    if columns.log_gates is not None and kwargs.get("softcap") is not None:
        raise ValueError(
            "Token routing adds its gates to the attention scores, and this layer caps them afterwards. Use "
            "routing='sample' with this model."
        )


def with_bias_of_rows(columns: Columns, module: Any, bias: Tensor) -> Tensor:
    """The relative position bias of a call with that of the rows in front: (B or 1, Hq, T, R + S)."""
    if columns.bias is None:
        raise ValueError(
            f"{type(module).__name__} adds a relative position bias whose table peft_promptmoe cannot find, so the "
            "prompt rows have no bias. This architecture is not supported."
        )
    rows = columns.bias.to(bias.dtype)
    common = max(bias.shape[0], rows.shape[0])
    return torch.cat([part.expand(common, *part.shape[1:]) for part in (rows, bias)], -1)
