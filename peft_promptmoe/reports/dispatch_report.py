# SPDX-License-Identifier: Apache-2.0
"""Report on pMoE: what the prompts of each block are made of, and which expert decides the prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..extras import extra
from .table import Share, html_table

if TYPE_CHECKING:
    import pandas as pd

    from .pictures import Picture


@dataclass
class DispatchReport:
    """What the prompts of every block were made of in the last forward pass, and which expert decided the prediction.

    Letters: `K` experts, the base model first; `L` blocks of all experts together.

    Attributes:
        experts: names of the experts, length K.
        blocks: (number of the expert, number of the block), length L.
        shares: (L, K + 2) mean share of each expert's prompts, of the carried prompts and of the patches. The last two
            are 0 for dispatchers "expert", "mean" and "none": they add the carried prompts in full, outside the
            shares.
        decision: (K,) mean of each expert's term in the logit of the predicted class. None before a forward pass in
            evaluation mode, and for fusion "mean", whose classifier has no terms per expert.
        decided: (K,) share of images for which an expert had the largest term. None like `decision`.
        images: number of images that the figures are computed from.
    """

    experts: list[str]
    blocks: list[tuple[int, int]]
    shares: Tensor
    decision: Tensor | None
    decided: Tensor | None
    images: int

    @property
    def over(self) -> str:
        """The number of images that the figures are computed from, in words."""
        return f"over {self.images:,} image{'' if self.images == 1 else 's'}"

    @property
    def groups(self) -> list[str]:
        """Names of the columns of `shares`, length K + 2."""
        return [f"prompts of {name}" for name in self.experts] + ["carried prompts", "patches"]

    def to_dataframe(self) -> pd.DataFrame:
        """Table, one row per expert, block and group: expert, block, group, share."""
        with extra("report", "to_dataframe()"):
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
        lines.append(f"What the prompts of each block are made of, {self.over}:")
        lines.append("expert  block  " + "  ".join(column.rjust(9) for column in columns))
        for (expert, block), shares in zip(self.blocks, self.shares.tolist(), strict=True):
            lines.append(f"{expert:6d}  {block:5d}  " + "  ".join(f"{share:9.3f}" for share in shares))
        if self.decision is not None and self.decided is not None:
            for name, term, share in zip(self.experts, self.decision.tolist(), self.decided.tolist(), strict=True):
                lines.append(f"{name}: {term:+.2f} to the predicted class's logit, the largest term in {share:.0%}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns = ["expert", "block", *self.groups[: self.shares.shape[1]]]
        rows = [
            [self.experts[expert], block, *map(Share, shares)]
            for (expert, block), shares in zip(self.blocks, self.shares.tolist(), strict=True)
        ]
        tables = [html_table(f"What the prompts of each block are made of, {self.over}", columns, rows)]
        if self.decision is not None and self.decided is not None:
            terms = zip(self.experts, self.decision.tolist(), map(Share, self.decided.tolist()), strict=True)
            heads = ["expert", "mean term in the predicted class's logit", "share of images with the largest term"]
            tables.append(html_table(f"Which expert decides, {self.over}", heads, [list(row) for row in terms]))
        return "".join(tables)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """Draw the shares as bars: one panel per expert, one bar per block.

        Args:
            path: image file to write. None: no file. A notebook shows the returned picture.
        """
        with extra("report", "plot()"):
            from .pictures import draw_dispatch, finish

        return finish(draw_dispatch(self.experts, self.blocks, self.shares, self.decided, self.over), path)
