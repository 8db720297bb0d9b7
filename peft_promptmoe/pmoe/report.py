# SPDX-License-Identifier: Apache-2.0
"""What dispatchers read, which expert decides, and what the experts weigh."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .maps import shared_of
from .shared import PMoEShared

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


def dispatch_report(shared: PMoEShared, adapter: str) -> DispatchReport:
    """Report of the last forward.

    Raises:
        ValueError: there has been none with this adapter.
    """
    names, blocks, shares = expert_names(shared, adapter), [], []
    for number, key in enumerate([None, *shared.members[adapter]]):
        for layer in shared.layers_of(key, adapter):
            if adapter in layer.last_shares:
                blocks.append((number, layer.site.index))
                shares.append(layer.last_shares[adapter].float().mean(dim=0).cpu())
    if not shares:
        raise ValueError("No forward pass has been dispatched yet; run the model once before asking for a report.")
    terms = shared.last_decision.get(adapter)
    decision = decided = None
    if terms is not None:
        decision = terms.float().mean(dim=0).cpu()
        decided = torch.bincount(terms.argmax(dim=1).cpu(), minlength=len(names)) / len(terms)
    return DispatchReport(names, blocks, torch.stack(shares), decision, decided)


def expert_names(shared: PMoEShared, adapter: str) -> list[str]:
    return ["base model", *(record.name for record in shared.records[adapter])]


@dataclass
class ParameterReport:
    """What a model with several backbones holds and trains.

    Attributes:
        rows: name, parameters, bytes, trained parameters: the base model, each further expert, the adapter with heads.
    """

    rows: list[tuple[str, int, int, int]]

    @property
    def total(self) -> tuple[int, int, int]:
        """Parameters, bytes and trained parameters in all."""
        held, size, trained = (sum(column) for column in list(zip(*self.rows, strict=True))[1:])
        return held, size, trained

    def __str__(self) -> str:
        held, size, trained = self.total
        lines = [f"{'':32} {'parameters':>13} {'MB':>9} {'trained':>11}"]
        for name, count, bytes_, own in [*self.rows, ("in all", held, size, trained)]:
            lines.append(f"{name[:32]:32} {count:13,} {bytes_ / 1e6:9.1f} {own:11,}")
        return "\n".join(lines)


def parameter_report(model: nn.Module) -> ParameterReport:
    """Parameters and bytes of the backbones and the adapters, held and trained, side by side.

    PEFT's `print_trainable_parameters` counts the base model and the adapters only: further experts are no part of the
    model's parameters. Memory and time are those of all backbones.

    Args:
        model: with a pMoE adapter.

    Raises:
        ValueError: the model has none.
    """
    shared = shared_of(model)
    adapters: list[nn.Parameter] = []
    base: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        ours = ".promptmoe." in f".{name}" or ".modules_to_save." in name
        (adapters if ours else base).append(parameter)
    rows = [_row("base model", base)]
    for expert in shared.experts.values():
        rows.append(_row(expert.record.name, list(expert.module.parameters())))
    return ParameterReport([*rows, _row("adapters and heads", adapters)])


def _row(name: str, parameters: list[nn.Parameter]) -> tuple[str, int, int, int]:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return name, sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters), trained
