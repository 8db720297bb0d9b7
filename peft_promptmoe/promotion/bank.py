# SPDX-License-Identifier: Apache-2.0
"""The bank of prototypes: where a unit's prototypes start, and how training moves it.

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

LEAST_CHANCE = 1e-9  # of a patch to be chosen, so that there is one to choose where all are alike


def far_apart(u: Tensor, draws: list[float]) -> Tensor:
    """Patches that lie far from each other, to start a bank with: the first at random, then each with a chance of
    (1 - largest cosine with those before)^2.

    Args:
        u: (T, d) directions of patches; those that are not finite are never chosen.
        draws: K numbers in [0, 1), which decide.

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
        bank: (K, d) of length one.
        sums: (K, d) of patches, weighted by their assignment. A sum without direction, or one that is not finite,
            leaves its prototype where it was.
        momentum: how much of the old direction stays.

    Returns:
        (K, d) of length one.
    """
    return unit_rows(momentum * bank + (1.0 - momentum) * unit_rows(sums, bank), bank)


def farthest(u: Tensor, similarity: Tensor, count: int) -> Tensor:
    """The patches that are farthest from every prototype, farthest first.

    Args:
        u: (T, d) directions of patches.
        similarity: (T, K) their cosines with the prototypes.
        count: how many.

    Returns:
        (count, d).
    """
    nearest = similarity.max(dim=-1).values
    return u.index_select(0, nearest.topk(count, largest=False).indices)


class PrototypeBank(nn.Module):
    """A bank and what is pending for it.

    A forward that trains does not move the bank but leaves word of what it saw. The next one begins by moving it, and
    evaluation and saving see it moved. So a checkpointed block that is run again in the backward pass meets the bank
    of its forward, and nothing is counted twice.

    The bank is a parameter that never trains, so that it goes wherever parameters are copied, saved or sharded.

    Args:
        count: K.
        width: d.
        momentum: of `moved`.
        reseed_after: updates without a patch after which a prototype moves to a patch that is far from all; 0 for
            never.
        random: whether the bank starts with random directions rather than with patches of the first batch.

    Attributes:
        weight: (K, d), zero until patches of the first training batch have started it.
        idle: (K, 1) updates since a prototype last had a patch; with `reseed_after` only.
        pending: (K, d) sums of the patches of the last training forward, or a start; with `reseed_after`
            (K, 2d + 1), behind each its far patch and how many patches it had. None where there is none.
        draft: the same of a forward that has not come to its end.
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
        self._first_move: tuple[Tensor, Tensor] | None = None  # looked at once, when the next forward begins

    def forward(self) -> Tensor:
        """(K, d) where prototypes start; in evaluation moved by what is pending."""
        weight = kept(self.weight).detach()
        if self.training or self.pending is None:
            return weight
        return self._after(weight, self.pending.to(weight.device))[0]

    def start(self, u: Tensor) -> Tensor:
        """(K, d) the bank, or if nothing has started it, patches of `u` (T, d)."""
        weight = kept(self.weight).detach()
        return torch.where(_is_set(weight), weight, far_apart(u, self.draws).to(weight.dtype))

    def begin(self) -> None:
        """Move the bank before a forward that trains, and find out whether it has been started.

        Raises:
            RuntimeError: an engine that shards parameters has the bank, and will not keep what is written to it.
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
        """Leave word of a training forward, which counts when that has come to its end.

        Args:
            start: (K, d) of `start`, where the bank may not have been started.
            u: (B, N, d) directions of patches.
            similarity: (B, N, K) cosines.
            assignment: (B, N, K) of the last round.
            assigned: (B, N) prototypes.
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
        """Move the bank by what is pending."""
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
                "The prototypes' bank is part of a flat parameter of FSDP1 and cannot be moved there. Shard with "
                "FSDP2 (fully_shard; fsdp_version: 2 in accelerate), or train with DDP."
            )
        if self._first_move is None:
            return
        before, after = self._first_move
        self._seen_kept, self._first_move = True, None
        now = _local(self.weight)
        if now.shape == before.shape and not torch.equal(before, after) and torch.equal(now, before):
            raise RuntimeError(
                "The prototypes' bank has been put back to what it was before a training step: FSDP shards the whole "
                "model as one unit, and keeps nothing that a forward writes. Shard each block (fully_shard on every "
                "block, then on the model), or train with DDP."
            )

    def forget(self) -> None:
        """Drop what is pending."""
        self.pending, self.pending_starts, self._first_move = None, False, None

    def _after(self, weight: Tensor, pending: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows of the bank and their idle counts, moved by the same rows of what is pending."""
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

    # -- how the bank travels -----------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As training would go on, without disturbing a step that is under way."""
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
        # In half precision a step of one in a hundred changes nothing; PEFT recasts by the layer's own type.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if self.pending is not None:
            self.pending = fn(self.pending).float()
        return self


def _is_set(weight: Tensor) -> Tensor:
    """(K, 1) which rows of a bank hold a direction."""
    return weight.square().sum(dim=-1, keepdim=True) > SHORTEST**2


def _local(tensor: Any) -> Tensor:
    """The rows of a parameter that this process has: all of them, or FSDP2's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole_like(rows: Tensor, parameter: Any) -> Tensor:
    """Rows of this process in the form that the parameter has."""
    if not hasattr(parameter, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def _rows_like(pending: Tensor, weight: Any) -> Tensor:
    """The rows of what is pending that this process has of the bank."""
    pending = pending.to(weight.device)
    if not hasattr(weight, "to_local"):
        return pending
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    whole = DTensor.from_local(pending, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=weight.placements).to_local()


@torch.no_grad()
def finish(banks: list[PrototypeBank]) -> None:
    """Let drafts be pending, when a training forward has come to its end.

    What all processes have seen is added up, in one call; starts and far patches are those of the first process.
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
    """What a process other than the first adds."""
    width = bank.weight.shape[-1]
    counts = torch.ones_like(draft, dtype=torch.bool)
    counts[:, width:-1] = False
    if bank.may_be_unstarted:
        counts[:, :width] = False
    return torch.where(counts, draft, 0.0)
