# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses reach the optimiser through the gradient of the model's loss, whatever happens to it on the way."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_promptmoe.routing.auxiliary_loss import add_losses, carry_loss
from peft_promptmoe.routing.prompt_call import CallBook

KINDS = [None, True, False]
KIND_IDS = ["plain", "reentrant", "non-reentrant"]
WEIGHT = 0.3


class Block(nn.Module):
    """Carries the mean square of what it puts out; knows of the model by its book alone."""

    def __init__(self, book: CallBook) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.book = book

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        term = WEIGHT * y.square().mean()
        return carry_loss(y, term, self.book, self.book.call, "block", "default", {"square": term})


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.book = CallBook()
        self.blocks = nn.ModuleList([Block(self.book), Block(self.book)])
        self.reentrant = reentrant

    def forward(self, x: Tensor, own: bool = True) -> Tensor:
        call = self.book.begin()
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        self.book.end(call)
        self.told = call.losses
        loss = x.sin().sum()
        return add_losses(loss, self.book, call) if own else loss


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()


def expected(*batches: tuple[Tensor, float]) -> list[Tensor]:
    """Gradients of the sum of (task + auxiliary losses) * factor, written out."""
    weights = [block.weight.detach().clone().requires_grad_() for block in Model().blocks]
    total = torch.zeros((), dtype=torch.float64)
    for x, factor in batches:
        terms = torch.zeros((), dtype=torch.float64)
        y = x
        for weight in weights:
            y = y * weight
            terms = terms + WEIGHT * y.square().mean()
        total = total + factor * (y.sin().sum() + terms)
    return list(torch.autograd.grad(total, weights))


def found(model: Model) -> list[Any]:
    return [block.weight.grad for block in model.blocks]


def assert_close(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("factor", [1.0, 0.25, 1024.0], ids=["plain", "four-accumulation-steps", "loss-scale"])
def test_the_gradient_follows_the_loss(reentrant: bool | None, factor: float) -> None:
    model, x = Model(reentrant), batch(1)
    loss = model(x)
    assert loss.item() == Model()(x, own=False).item()
    (loss * factor).backward()
    assert_close(found(model), expected((x, factor)))


@pytest.mark.parametrize("reentrant", KINDS, ids=KIND_IDS)
def test_steps_accumulate(reentrant: bool | None) -> None:
    model, batches = Model(reentrant), [batch(seed) for seed in range(4)]
    for x in batches:
        (model(x) / 4).backward()
    assert_close(found(model), expected(*[(x, 0.25) for x in batches]))


@pytest.mark.parametrize("reentrant", KINDS, ids=KIND_IDS)
def test_two_forwards_before_one_backward_stay_apart(reentrant: bool | None) -> None:
    model, one, two = Model(reentrant), batch(1), batch(2)
    (model(one) + 3.0 * model(two)).backward()
    assert_close(found(model), expected((one, 1.0), (two, 3.0)))


@pytest.mark.parametrize("reentrant", KINDS, ids=KIND_IDS)
def test_another_loss_than_the_models_warns_and_adds_nothing(reentrant: bool | None) -> None:
    """Also after a step that was right, whose gradient must not linger."""
    model, x = Model(reentrant), batch(1)
    model(x).backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match="auxiliary losses have no effect"):
        model(x, own=False).backward()
    weights = [block.weight.detach().clone().requires_grad_() for block in model.blocks]
    task = (x * weights[0] * weights[1]).sin().sum()
    assert_close(found(model), list(torch.autograd.grad(task, weights)))


def test_values_are_told_without_their_graph() -> None:
    model, x = Model(), batch(1)
    model(x)
    value = model.told["block", "default", "square"]
    weights = [block.weight.detach() for block in model.blocks]
    assert value.item() == (WEIGHT * (x * weights[0] * weights[1]).square().mean()).item()
    assert not value.requires_grad


def test_forwards_of_several_threads_have_pages_of_their_own() -> None:
    model, batches = Model(), [batch(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(model, batches))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.stack([loss * (number + 1) for number, loss in enumerate(losses)]).sum().backward()
    assert_close(found(model), expected(*[(x, number + 1.0) for number, x in enumerate(batches)]))


def test_recomputed_blocks_of_several_threads_find_their_own_loss() -> None:
    """Both backward passes have come through their losses before either runs a block again."""
    model, batches, both = Model(reentrant=True), [batch(seed) for seed in range(2)], Barrier(2, timeout=60)

    def run(number: int) -> None:
        call = model.book.begin()
        y = batches[number]
        for block in model.blocks:
            y = checkpoint(block, y, use_reentrant=True)
        model.book.end(call)
        y.register_hook(lambda gradient: gradient + 0 * both.wait())
        (add_losses(y.sin().sum(), model.book, call) * (number + 1)).backward()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert_close(found(model), expected(*[(x, number + 1.0) for number, x in enumerate(batches)]))


def test_checkpoints_within_checkpoints_find_their_loss() -> None:
    model, x = Model(), batch(1)

    def both(y: Tensor) -> Tensor:
        for block in model.blocks:
            y = checkpoint(block, y, use_reentrant=True)
        return y

    for factor in (1.0, 0.25):
        model.zero_grad()
        call = model.book.begin()
        y = checkpoint(both, x, use_reentrant=True)
        model.book.end(call)
        (add_losses(y.sin().sum(), model.book, call) * factor).backward()
        assert_close(found(model), expected((x, factor)))


def test_compiled_code_gives_the_same() -> None:
    model, x = Model(), batch(1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (compiled(x) * 2.0).backward()
    assert_close(found(model), expected((x, 2.0)))
