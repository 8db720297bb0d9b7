# SPDX-License-Identifier: Apache-2.0
"""Report on parameters and bytes of a model's backbones and adapters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..reports.table import html_table
from .shared import shared_of


@dataclass
class ParameterReport:
    """Parameters and bytes of a model with several backbones.

    Attributes:
        rows: (name, parameters, bytes, trained parameters) of the base model, of each further expert, and of the
            adapters with heads.
    """

    rows: list[tuple[str, int, int, int]]

    @property
    def total(self) -> tuple[int, int, int]:
        """Sums of parameters, bytes and trained parameters."""
        held, size, trained = (sum(column) for column in list(zip(*self.rows, strict=True))[1:])
        return held, size, trained

    def __str__(self) -> str:
        held, size, trained = self.total
        lines = [f"{'':32} {'parameters':>13} {'MB':>9} {'trained':>11}"]
        for name, count, bytes_, own in [*self.rows, ("in all", held, size, trained)]:
            lines.append(f"{name[:32]:32} {count:13,} {bytes_ / 1e6:9.1f} {own:11,}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [[name, count, size / 1e6, own] for name, count, size, own in [*self.rows, ("in all", *self.total)]]
        return html_table("Backbones and adapters", ["", "parameters", "MB", "trained"], rows)


def parameter_report(model: nn.Module) -> ParameterReport:
    """Report parameters, bytes and trained parameters of each backbone and of the adapters.

    PEFT's `print_trainable_parameters` counts the base model and the adapters only, because further experts are not
    part of the model's parameters. But all backbones need memory and time.

    Args:
        model: a model with a pMoE adapter.

    Raises:
        ValueError: the model has no pMoE adapter.
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
