# SPDX-License-Identifier: Apache-2.0
"""Running mean that is subtracted from a router's input (router_centering)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOMENTUM = 0.01
SETTLED = round(1 / MOMENTUM)  # steps after which the momentum is constant


class RouterCenter(nn.Module):
    """Running mean of a router's input. It is saved with the adapter and does not change in evaluation mode.

    It is a frozen parameter and not a buffer, so that code that copies an adapter with `named_parameters()` copies it.

    Args:
        width: width D of the input.
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
        # Stays in float32: in half precision a small momentum would change nothing.
        self.weight.data = self.weight.data.to(torch.promote_types(self.weight.dtype, torch.float32))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._written = None  # the loaded value is not from the first batch

    def forward(self) -> Tensor:
        """The mean, (D,), without gradient."""
        return self.weight.detach()

    @property
    def is_known(self) -> Tensor:
        """Whether there is a mean: from any batch, or copied without its step count."""
        return (self.steps > 0) | self.weight.any()

    @torch.no_grad()
    def update(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Update the mean with a batch. The first batches are averaged; later ones count with the momentum.

        Args:
            inputs: (B, D) router inputs.
            weight: (B, 1), zero for rows that do not count.

        Returns:
            (D,) mean of the batch, over all processes in DDP.

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
        """Check once, before the second batch, that the update by the first one was kept.

        A loaded mean exists before any batch, so the check is whether the first batch has changed it.
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
                "router_centering=True keeps a running mean for each router, but FSDP and ZeRO-3 discard the update "
                "of such tensors after each block. Train with DDP or on one device, or set router_centering=False."
            )


def _mean(inputs: Tensor, weight: Tensor) -> Tensor:
    total = torch.cat([(inputs * weight).sum(dim=0), weight.sum().reshape(1)])
    # DDP sets this while all of its processes run the model together.
    running = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if running is not None and not torch.compiler.is_compiling():
        dist.all_reduce(total, group=running.process_group)
    return total[:-1] / total[-1].clamp(min=1.0)
