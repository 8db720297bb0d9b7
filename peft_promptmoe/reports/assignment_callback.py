# SPDX-License-Identifier: Apache-2.0
"""Trainer callback that logs ProMotion's losses and the use of its prototypes."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn

from ..config import check_number
from ..engine.block_layer import BlockLayer
from ..engine.model_hooks import last_aux_losses, prompt_layers
from .assignment_report import assigned_layers, assignment_report
from .callback import LogCallback

TOGETHER = 0.9  # mean cosine between prototypes above which a unit counts as collapsed


class AssignmentCallback(LogCallback):
    """Trainer callback: logs ProMotion's losses and the use of its prototypes, and warns if prototypes collapse.

    It logs whenever the Trainer logs the training loss. The values are those of the last training step:
    `promotion/denoise`, `promotion/denoise_ratio` (below 1 the denoiser removes noise), `promotion/margin`,
    `promotion/compact`, and from `assignment_report`: `promotion/entropy`, `promotion/min_entropy` and
    `promotion/max_between`.

    Args:
        together_above: warn if the mean cosine between the prototypes of a unit is above this: the unit has collapsed.
            There is one warning per training. 1: no warning.

    Raises:
        TypeError: `together_above` is no number.
    """

    def __init__(self, together_above: float = TOGETHER) -> None:
        check_number("together_above", together_above, -math.inf)
        self.together_above = together_above
        self._warned = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._warned = False
        self.log_first()
        if model is not None and not any(isinstance(layer, BlockLayer) for layer in prompt_layers(model)):
            warnings.warn(
                "AssignmentCallback logs nothing in this training: the model has no ProMotion adapter. Remove the "
                "callback; RoutingCallback logs the routers of MEPT.",
                stacklevel=2,
            )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or model is None or not assigned_layers(model, None):
            return
        report = assignment_report(model)
        values = {f"promotion/{name}": value for name, value in last_aux_losses(model).items()}
        values |= {
            "promotion/entropy": float(report.entropy.mean()),
            "promotion/min_entropy": float(report.entropy.min()),
            "promotion/max_between": float(report.between.max()),
        }
        self.add(values, logs, state)
        together = [n for n, value in zip(report.layers, report.between, strict=True) if value > self.together_above]
        if together and not self._warned:
            self._warned = True
            warnings.warn(
                f"The prototypes behind the blocks {together} have become nearly equal (mean cosine above "
                f"{self.together_above}), so they no longer group patches. Keep center=True, raise margin_weight, or "
                "use fewer prototypes.",
                stacklevel=2,
            )
