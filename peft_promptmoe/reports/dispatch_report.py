# SPDX-License-Identifier: Apache-2.0
"""What dispatchers read, and which expert decides."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class DispatchReport:
    """What the prompts of every block were made of in the last forward, and which expert decided the prediction.

    Letters: `K` experts, the base model first; `L` blocks in all of them.

    Attributes:
        experts: names, length K.
        blocks: (number of the expert, number of the block), length L.
        shares: (L, K + 2) mean share of each expert's prompts, of the carried prompts and of the patches. For
            dispatchers "expert", "mean" and "none", which add the carried prompts in full, the experts' shares only.
        decision: (K,) mean of the experts' terms in the logit of the predicted class, or None before a forward in
            evaluation mode or without a classifier that sums over experts (fusion "mean").
        decided: (K,) how often an expert had the largest term.
    """

    experts: list[str]
    blocks: list[tuple[int, int]]
    shares: Tensor
    decision: Tensor | None
    decided: Tensor | None

    @property
    def groups(self) -> list[str]:
        return [f"prompts of {name}" for name in self.experts] + ["carried prompts", "patches"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per expert, block and group: expert, block, group, share."""
        import pandas as pd

        rows = [
            {"expert": self.experts[expert], "block": block, "group": group, "share": share}
            for (expert, block), shares in zip(self.blocks, self.shares.tolist(), strict=True)
            for group, share in zip(self.groups, shares, strict=True)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [f"expert {number}: {name}" for number, name in enumerate(self.experts)]
        columns = [f"prompts {number}" for number in range(len(self.experts))] + ["carried", "patches"]
        lines.append("expert  block  " + "  ".join(column.rjust(9) for column in columns))
        for (expert, block), shares in zip(self.blocks, self.shares.tolist(), strict=True):
            lines.append(f"{expert:6d}  {block:5d}  " + "  ".join(f"{share:9.3f}" for share in shares))
        if self.decision is not None and self.decided is not None:
            for name, term, share in zip(self.experts, self.decision.tolist(), self.decided.tolist(), strict=True):
                lines.append(f"{name}: {term:+.2f} to the predicted class's logit, the largest term in {share:.0%}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the shares, one bar per expert and block, to an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.0 + 0.28 * len(self.blocks), 4.0), layout="constrained")
        axes = figure.subplots()
        bottom = torch.zeros(len(self.blocks))
        for group, share in zip(self.groups, self.shares.T, strict=True):
            axes.bar(range(len(self.blocks)), share.tolist(), bottom=bottom.tolist(), label=group)
            bottom = bottom + share
        axes.set_xticks(range(len(self.blocks)), [f"{expert}:{block}" for expert, block in self.blocks], rotation=90)
        axes.set_xlabel("expert : block")
        axes.set_ylabel("share of what its prompts are made of")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)
