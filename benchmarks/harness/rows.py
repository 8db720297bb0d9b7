# SPDX-License-Identifier: Apache-2.0
"""What a row of the exact costs and of the times is of: a method with its sizes, and the name that it has in files."""

from __future__ import annotations

from typing import NamedTuple

DISPATCHERS = ("token", "expert", "attention", "mean", "none")


class Row(NamedTuple):
    """A method with its sizes: active prompts (of ProMotion: prototypes), and routed experts (of pMoE: backbones)."""

    method: str
    prompts: int | None = None
    experts: int | None = None

    def __str__(self) -> str:
        prompts = "" if self.prompts is None else f"_{self.prompts}"
        return f"{self.method}{prompts}" + ("" if self.experts in (None, 1) else f"_E{self.experts}")
