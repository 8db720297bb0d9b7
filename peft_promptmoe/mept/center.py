# SPDX-License-Identifier: Apache-2.0
"""The running mean that is subtracted from a router's input."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOMENTUM = 0.01
SETTLED = round(1 / MOMENTUM)  # steps after which every batch counts by the momentum


class RouterCenter(nn.Module):
    """Running mean of a router's input, saved with the adapter and frozen in evaluation.

    The mean is a frozen parameter, not a buffer, so that whoever copies an adapter by `named_parameters()` copies it.

    Args:
        width: D.
    """

    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._kept_one = False
        # The mean before and after the first batch of this run, until the second one comes.
        self._written: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> RouterCenter:
        super()._apply(fn, recurse)
        # In half precision a small momentum changes nothing; PEFT recasts only adapters that it has just made.
        self.weight.data = self.weight.data.to(torch.promote_types(self.weight.dtype, torch.float32))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._written = None  # what is there now is no trace of the first batch

    def forward(self) -> Tensor:
        """(D,) the mean, without gradient."""
        return self.weight.detach()

    @property
    def is_known(self) -> Tensor:
        """Whether any batch was taken in; a mean that was copied without its steps counts."""
        return (self.steps > 0) | self.weight.any()

    @torch.no_grad()
    def update(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Take in one batch; the first batches count fully, later ones by the momentum.

        Args:
            inputs: (B, D).
            weight: (B, 1), zero for rows that do not count.

        Returns:
            (D,) the batch's mean, of all processes where DDP runs the model on several.

        Raises:
            RuntimeError: the mean after the first batch was lost.
        """
        self._check_kept()
        mean = _mean(inputs.detach(), weight).to(self.weight.dtype)
        copied = (self.steps == 0) & self.weight.any()
        before = None if self._kept_one or torch.compiler.is_compiling() else self.weight.detach().clone()
        self.steps.add_(torch.where(copied, SETTLED, 0)).add_(1)
        self.weight.add_((1.0 / self.steps).clamp(min=MOMENTUM).to(mean.dtype) * (mean - self.weight))
        if before is not None:
            self._written = (before, self.weight.detach().clone())
        return mean

    def _check_kept(self) -> None:
        """Look once, before the second batch, whether the first one is still there; FSDP1 says so by a view.

        A mean that was loaded is there before any batch, so what counts is whether the first one has changed it.
        """
        if torch.compiler.is_compiling() or self._kept_one:
            return
        lost = not isinstance(self.weight, nn.Parameter)
        if not lost and self._written is not None and not self.weight.is_meta:
            before, after = self._written
            self._kept_one, self._written = True, None
            lost = torch.equal(self.weight, before) and not torch.equal(before, after)
        if lost:
            raise RuntimeError(
                "router_centering=True keeps a running mean beside each router, and FSDP and ZeRO-3 put such tensors "
                "away after each block, with what a batch has added. Train with DDP or on one device, or set "
                "router_centering=False."
            )


def _mean(inputs: Tensor, weight: Tensor) -> Tensor:
    total = torch.cat([(inputs * weight).sum(dim=0), weight.sum().reshape(1)])
    # Set by DDP while it runs the model, when all of its processes take this step together.
    running = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if running is not None and not torch.compiler.is_compiling():
        dist.all_reduce(total, group=running.process_group)
    return total[:-1] / total[-1].clamp(min=1.0)
