# SPDX-License-Identifier: Apache-2.0
"""Trainer callback that logs routing."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..config import check_bool, check_number
from ..engine.model_hooks import last_balance_loss
from .routing_report import find_routed, normalized_entropy, tally, why_unrouted

FEWEST = 32  # choices needed to tell a collapse from chance


class LogCallback(TrainerCallback):
    """Base of the callbacks that add values to the Trainer's logs."""

    def log_first(self) -> None:
        """Move this callback to the front of the Trainer's callbacks. Called when training begins.

        The Trainer calls its reporters (TensorBoard and others) before a user's callbacks, so values that a callback
        adds would not reach them. The Trainer has no option for the order. So this looks for its callback handler in
        the calling frames.
        """
        frame = inspect.currentframe()
        caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
        handler = caller.f_locals.get("self") if caller is not None else None
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def add(self, values: dict[str, float], logs: dict[str, Any], state: Any) -> None:
        """Add values to the current log entry and to the Trainer's log history."""
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


class RoutingCallback(LogCallback):
    """Trainer callback: logs expert load, load entropy and balance loss, and warns if routing collapses.

    It logs whenever the Trainer logs the training loss, to wherever the Trainer reports. The values cover the steps
    since the last log: `routing/entropy` (mean over layers), `routing/min_entropy`, `routing/max_load`, and
    `routing/balance_loss` if the adapter has that loss.

    If the model has no router, the callback warns once when training begins, and logs nothing.

    Args:
        per_layer: whether to log `routing/layer_<n>/entropy` and `routing/layer_<n>/load_<expert>` too.
        collapse_below: warn if the load entropy of a layer, relative to its maximum, is below this. At least 32
            choices are counted first. There is one warning per training. 0: no warning.

    Raises:
        TypeError: `collapse_below` is no number, or `per_layer` no bool.
    """

    def __init__(self, per_layer: bool = False, collapse_below: float = 0.1) -> None:
        check_bool("per_layer", per_layer)
        check_number("collapse_below", collapse_below, -math.inf)
        self.per_layer = per_layer
        self.collapse_below = collapse_below
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # since the last log
        self._watched: dict[int, tuple[Tensor, Tensor]] = {}  # since the last check for a collapse
        self._warned = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._forget()
        self.log_first()
        if model is not None and not find_routed(model, None):
            warnings.warn(f"RoutingCallback logs nothing in this training. {why_unrouted(model, None)}", stacklevel=2)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        for layer, name in find_routed(model, None):
            for record in layer.last_routing.get(name, ()):
                chosen, _, count = (part.sum(dim=0) for part in tally(record))
                self._sums[layer.site.index] = added(self._sums.get(layer.site.index), (chosen, count))

    # With gradient accumulation a step is several forward passes. The Trainer calls on_step_end after the last only.
    on_substep_end = on_step_end

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._sums:
            return
        load = {index: (chosen / count.clamp(min=1.0)).cpu() for index, (chosen, count) in self._sums.items()}
        for index, new in self._sums.items():
            self._watched[index] = added(self._watched.get(index), new)
        self._sums = {}
        entropy = {index: float(normalized_entropy(share)) for index, share in load.items()}
        values = {
            "routing/entropy": sum(entropy.values()) / len(entropy),
            "routing/min_entropy": min(entropy.values()),
            "routing/max_load": max(float(share.max()) for share in load.values()),
        }
        balance = last_balance_loss(model) if model is not None else None
        if balance is not None:
            values["routing/balance_loss"] = balance
        if self.per_layer:
            for index, share in load.items():
                values[f"routing/layer_{index}/entropy"] = entropy[index]
                values |= {f"routing/layer_{index}/load_{e}": float(part) for e, part in enumerate(share)}
        self.add(values, logs, state)
        self._warn_of_collapse()

    def _warn_of_collapse(self) -> None:
        seen = {index: sums for index, sums in self._watched.items() if float(sums[1]) >= FEWEST}
        self._watched = {index: sums for index, sums in self._watched.items() if index not in seen}
        entropy = {index: float(normalized_entropy(chosen / count)) for index, (chosen, count) in seen.items()}
        collapsed = [index for index, value in entropy.items() if value < self.collapse_below]
        if not collapsed or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"The routers of layers {collapsed} send nearly everything to one expert (load entropy below "
            f"{self.collapse_below}), so these layers act like static prompts. Try router_centering=True, "
            "routing='token' or a balance_loss_weight. Or use num_experts=1, which needs fewer parameters.",
            stacklevel=2,
        )


def added(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of choices and counts; `old` is None at first."""
    return new if old is None else (old[0] + new[0], old[1] + new[1])
