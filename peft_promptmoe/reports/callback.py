# SPDX-License-Identifier: Apache-2.0
"""Routing in the Trainer's logs."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..engine.model_hooks import last_balance_loss
from .routing_report import find_routed, normalized_entropy, tally, why_unrouted

FEWEST = 32  # choices that are enough to tell a collapse from chance


class LogCallback(TrainerCallback):
    """A callback that adds values to the Trainer's logs."""

    def log_first(self) -> None:
        """Come before the Trainer's reporters; called when training begins.

        The Trainer puts its reporters before a user's callbacks, and they pass the logs on as they get them; values
        added later would reach none of them. It offers no way to ask for another order, hence the look at the callers.
        """
        frame = inspect.currentframe()
        caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
        handler = caller.f_locals.get("self") if caller is not None else None
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def add(self, values: dict[str, float], logs: dict[str, Any], state: Any) -> None:
        """Add values to what is being logged, and to the history."""
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


class RoutingCallback(LogCallback):
    """Logs expert load, load entropy and balance loss to whatever the Trainer reports to, and warns of collapse.

    Logged with the training loss, over the steps since the last log: `routing/entropy` (mean of the layers),
    `routing/min_entropy`, `routing/max_load`, and `routing/balance_loss` where there is one.

    Args:
        per_layer: also log `routing/layer_<n>/entropy` and `routing/layer_<n>/load_<expert>`.
        collapse_below: a layer whose load entropy, over `FEWEST` choices or more, is under this share of its maximum
            counts as collapsed; there is one warning per training. 0 for none.

    Where the model has no routers there is one warning when training begins, and nothing is logged.
    """

    def __init__(self, per_layer: bool = False, collapse_below: float = 0.1) -> None:
        self.per_layer = per_layer
        self.collapse_below = collapse_below
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # since the last log
        self._watched: dict[int, tuple[Tensor, Tensor]] = {}  # since the last look for a collapse
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

    # With gradient accumulation a step is several forwards, and only the last ends in on_step_end.
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
            f"{self.collapse_below}), which makes them static prompts. Try router_centering=True, routing='token' or "
            "a balance_loss_weight, or save parameters with num_experts=1.",
            stacklevel=2,
        )


def added(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Choices and counts with those of before."""
    return new if old is None else (old[0] + new[0], old[1] + new[1])
