# SPDX-License-Identifier: Apache-2.0
"""The bank of prototypes: the initial prototypes of a unit, and how training moves them.

Letters: `K` prototypes, `d` unit width, `T` patches of all images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..adapter_state import kept, put_away
from .prototypes import SHORTEST, unit_rows

LEAST_CHANCE = 1e-9  # least probability of choosing a patch, for the case that all patches are alike


def far_apart(u: Tensor, draws: list[float]) -> Tensor:
    """Choose patches that lie far from each other, to initialise a bank.

    The first patch is random. Each further one is drawn with a probability proportional to (1 - largest cosine with
    the patches before)^2.

    Args:
        u: (T, d) directions of patches. Those that are not finite are never chosen.
        draws: K random numbers in [0, 1).

    Returns:
        (K, d), zero where no patch is finite.
    """
    chosen: list[Tensor] = []
    usable = torch.isfinite(u).all(dim=-1)
    u, chance = torch.where(usable[:, None], u, 0.0), usable.to(u.dtype)
    distance = torch.full_like(chance, torch.inf)
    for draw in draws:
        total = chance.cumsum(dim=0)
        index = torch.searchsorted(total, draw * total[-1:], right=True).clamp(max=u.shape[0] - 1)
        chosen.append(u.index_select(0, index))
        distance = torch.minimum(distance, 1.0 - u @ chosen[-1][0])
        chance = torch.where(usable, distance.clamp(min=0.0).square() + LEAST_CHANCE, 0.0)
    return torch.cat(chosen)


def moved(bank: Tensor, sums: Tensor, momentum: float) -> Tensor:
    """The bank after one step: each prototype moves towards the direction of the patches assigned to it.

    Args:
        bank: (K, d) prototypes of length one.
        sums: (K, d) sums of patches, weighted by assignment. One that is zero or not finite changes nothing.
        momentum: share of the old direction that is kept.

    Returns:
        (K, d) prototypes of length one.
    """
    return unit_rows(momentum * bank + (1.0 - momentum) * unit_rows(sums, bank), bank)


def farthest(u: Tensor, similarity: Tensor, count: int) -> Tensor:
    """The patches farthest from all prototypes, farthest first.

    Args:
        u: (T, d) directions of patches.
        similarity: (T, K) cosines of patches with prototypes.
        count: number of patches to return.

    Returns:
        (count, d).
    """
    nearest = similarity.max(dim=-1).values
    return u.index_select(0, nearest.topk(count, largest=False).indices)


class PrototypeBank(nn.Module):
    """A bank of prototypes, with its pending update.

    A training forward pass does not move the bank; it stores a pending update. The next training forward pass first
    applies the update, and evaluation and saving apply it too. So a checkpointed block that is run again in the
    backward pass uses the same bank as in its forward pass, and nothing is counted twice.

    The bank is a parameter without gradient, so that it is copied, saved and sharded like other parameters.

    Args:
        count: number of prototypes K.
        width: width d.
        momentum: momentum of `moved`.
        reseed_after: a prototype without a patch for this many updates moves to a patch far from all. 0: never.
        random: whether the bank is initialised with random directions. Otherwise patches of the first batch are used.

    Attributes:
        weight: (K, d) prototypes, zero until the first training batch initialises them.
        idle: (K, 1) updates since each prototype last had a patch. Only with `reseed_after`.
        pending: (K, d) sums of patches of the last training forward pass, or initial prototypes. With `reseed_after`
            (K, 2d + 1): also a far patch and the number of patches of each prototype. None: no update is pending.
        draft: like `pending`, for a forward pass that has not finished.
    """

    def __init__(self, count: int, width: int, momentum: float, reseed_after: int = 0, random: bool = False) -> None:
        super().__init__()
        start = unit_rows(torch.randn(count, width)) if random else torch.zeros(count, width)
        self.weight = nn.Parameter(start, requires_grad=False)
        self.idle = nn.Parameter(torch.zeros(count, 1), requires_grad=False) if reseed_after else None
        self.momentum, self.reseed_after = momentum, reseed_after
        self.draws: list[float] = torch.rand(count, device="cpu").tolist()
        self.may_be_unstarted = not random
        self.pending: Tensor | None = None
        self.draft: Tensor | None = None
        self.pending_starts = False
        self._seen_kept = False
        self._first_move: tuple[Tensor, Tensor] | None = None  # checked once, when the next forward pass begins

    def forward(self) -> Tensor:
        """The initial prototypes, (K, d). In evaluation mode with the pending update applied."""
        weight = kept(self.weight).detach()
        if self.training or self.pending is None:
            return weight
        return self._after(weight, self.pending.to(weight.device))[0]

    def start(self, u: Tensor) -> Tensor:
        """The bank, (K, d), or patches of `u` (T, d) if the bank is not initialised."""
        weight = kept(self.weight).detach()
        return torch.where(_is_set(weight), weight, far_apart(u, self.draws).to(weight.dtype))

    def begin(self) -> None:
        """Apply the pending update before a training forward pass, and check whether the bank is initialised.

        Raises:
            RuntimeError: the bank is sharded in a way that loses what is written to it.
        """
        self._check_at_hand()
        self.settle()
        self.draft = None
        if self.may_be_unstarted and not torch.compiler.is_compiling():
            whole: Any = self.weight.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            has_values = not (whole.is_meta or isinstance(whole, FakeTensor))
            self.may_be_unstarted = has_values and not bool(_is_set(whole).all())

    def leave(self, start: Tensor, u: Tensor, similarity: Tensor, assignment: Tensor, assigned: Tensor) -> None:
        """Store the update of a training forward pass. It becomes pending when the forward pass has finished.

        Args:
            start: (K, d) result of `start`.
            u: (B, N, d) directions of patches.
            similarity: (B, N, K) cosines of patches with prototypes.
            assignment: (B, N, K) soft assignment of the last round.
            assigned: (B, N) number of each patch's prototype.
        """
        sums = start if self.may_be_unstarted else torch.einsum("bnk,bnd->kd", assignment.to(u.dtype), u)
        if self.idle is not None:
            count = start.shape[0]
            far = farthest(u.flatten(0, 1), similarity.flatten(0, 1), count)
            counts = torch.zeros_like(sums[:, 0]).index_add(
                0, assigned.flatten(), torch.ones_like(similarity[..., 0].flatten(), dtype=sums.dtype)
            )
            sums = torch.cat([sums, far, counts[:, None]], dim=-1)
        self.draft = sums.float()

    @torch.no_grad()
    def settle(self) -> None:
        """Apply the pending update."""
        if self.pending is None:
            return
        weight = _local(self.weight)
        bank, idle = self._after(weight, _rows_like(self.pending, self.weight))
        if not self._seen_kept and not torch.compiler.is_compiling():
            self._first_move = (weight.detach().clone(), bank)
        weight.copy_(bank)
        if self.idle is not None and idle is not None:
            _local(self.idle).copy_(idle)
        # A batch without a direction starts nothing: where that can be looked at, the next forward looks.
        self.may_be_unstarted = self.pending_starts and not torch.compiler.is_compiling()
        self.pending, self.pending_starts = None, False

    def _check_at_hand(self) -> None:
        if put_away(self.weight) and not hasattr(self.weight, "to_local"):
            raise RuntimeError(
                "FSDP1 makes the prototypes' bank part of a flat parameter, so it cannot be updated. Shard with FSDP2 "
                "(fully_shard; fsdp_version: 2 in accelerate), or train with DDP."
            )
        if self._first_move is None:
            return
        before, after = self._first_move
        self._seen_kept, self._first_move = True, None
        now = _local(self.weight)
        if now.shape == before.shape and not torch.equal(before, after) and torch.equal(now, before):
            raise RuntimeError(
                "The update of the prototypes' bank was lost: FSDP shards the whole model as one unit and discards "
                "what a forward pass writes. Shard each block (fully_shard on every block, then on the model), or "
                "train with DDP."
            )

    def forget(self) -> None:
        """Drop the pending update."""
        self.pending, self.pending_starts, self._first_move = None, False, None

    def _after(self, weight: Tensor, pending: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows of the bank and their idle counts, after the same rows of the pending update."""
        width = weight.shape[-1]
        sums = pending[:, :width].to(weight.dtype)
        if self.pending_starts:
            return torch.where(_is_set(weight), weight, unit_rows(sums)), None
        bank = moved(weight, sums, self.momentum)
        if self.idle is None:
            return bank, None
        own = _local(self.idle)
        far, counts = pending[:, width:-1].to(weight.dtype), pending[:, -1:]
        idle = torch.where(counts > 0, 0.0, own + 1.0)
        waited = idle >= self.reseed_after
        return torch.where(waited, unit_rows(far, bank), bank), torch.where(waited, 0.0, idle)

    # -- saving, loading, moving --------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the bank with the pending update applied, without changing the bank itself."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.pending is None:
            return
        bank, idle = self._after(_local(self.weight.detach()), _rows_like(self.pending, self.weight))
        destination[f"{prefix}weight"] = _whole_like(bank, self.weight)
        if self.idle is not None and idle is not None:
            destination[f"{prefix}idle"] = _whole_like(idle, self.idle)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self.forget()
            self.may_be_unstarted = True

    def _apply(self, fn: Any, recurse: bool = True) -> PrototypeBank:
        super()._apply(fn, recurse)
        # Stays in float32: in half precision a step of one in a hundred would change nothing.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if self.pending is not None:
            self.pending = fn(self.pending).float()
        return self


def _is_set(weight: Tensor) -> Tensor:
    """Which rows of a bank are initialised, (K, 1)."""
    return weight.square().sum(dim=-1, keepdim=True) > SHORTEST**2


def _local(tensor: Any) -> Tensor:
    """The rows of a parameter on this process: all of them, or FSDP2's shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole_like(rows: Tensor, parameter: Any) -> Tensor:
    """Rows of this process in the parameter's own form (a DTensor with FSDP2)."""
    if not hasattr(parameter, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def _rows_like(pending: Tensor, weight: Any) -> Tensor:
    """The rows of the pending update that belong to this process's rows of the bank."""
    pending = pending.to(weight.device)
    if not hasattr(weight, "to_local"):
        return pending
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    whole = DTensor.from_local(pending, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=weight.placements).to_local()


@torch.no_grad()
def finish(banks: list[PrototypeBank]) -> None:
    """Make drafts pending, after a training forward pass has finished.

    Sums are added over all processes in one call. Initial prototypes and far patches come from the first process.
    """
    drafts = [(bank, bank.draft) for bank in banks if bank.draft is not None]
    if drafts and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts = [draft if dist.get_rank() == 0 else _sums_only(bank, draft) for bank, draft in drafts]
        together = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(together)
        values = together.split([part.numel() for part in parts])
        drafts = [(bank, own.view_as(draft)) for (bank, draft), own in zip(drafts, values, strict=True)]
    for bank, draft in drafts:
        bank.pending, bank.pending_starts, bank.draft = draft, bank.may_be_unstarted, None


def _sums_only(bank: PrototypeBank, draft: Tensor) -> Tensor:
    """The part of a draft that processes other than the first contribute."""
    width = bank.weight.shape[-1]
    counts = torch.ones_like(draft, dtype=torch.bool)
    counts[:, width:-1] = False
    if bank.may_be_unstarted:
        counts[:, :width] = False
    return torch.where(counts, draft, 0.0)
