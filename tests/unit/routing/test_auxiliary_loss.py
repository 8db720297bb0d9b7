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

from peft_promptmoe import auxiliary_loss
from peft_promptmoe.routing.auxiliary_loss import add_losses, add_losses_to_tokens, carry_loss, own_losses
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


class TokenModel(Model):
    """Puts out the losses of tokens, of which a trainer makes a loss; two have no label."""

    labelled = torch.tensor([[True, True, False], [True, True, True], [True, True, False], [True, True, True]])

    def forward(self, x: Tensor, own: bool = True) -> Tensor:
        call = self.book.begin()
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        self.book.end(call)
        return add_losses_to_tokens(-x.sin() * self.labelled, self.labelled, self.book, call)


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()


def expected(*batches: tuple[Tensor, float], tokens: Tensor | None = None) -> list[Tensor]:
    """Gradients of the sum of (task + auxiliary losses) * factor, written out; with a mean over `tokens`."""
    weights = [block.weight.detach().clone().requires_grad_() for block in Model().blocks]
    total = torch.zeros((), dtype=torch.float64)
    for x, factor in batches:
        terms = torch.zeros((), dtype=torch.float64)
        y = x
        for weight in weights:
            y = y * weight
            terms = terms + WEIGHT * y.square().mean()
        task = y.sin().sum() if tokens is None else y.sin()[tokens].mean()
        total = total + factor * (task + terms)
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


# -- trainers that make the loss themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reentrant", "compiled"), [*[(kind, False) for kind in KINDS], (None, True)], ids=[*KIND_IDS, "compiled"]
)
def test_a_mean_of_tokens_losses_is_the_models_loss(reentrant: bool | None, compiled: bool) -> None:
    model, x, labelled = TokenModel(reentrant), batch(1), TokenModel.labelled
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    (-forward(x).sum() / labelled.sum() / 4).backward()
    assert_close(found(model), expected((x, 0.25), tokens=labelled))


@pytest.mark.parametrize("reentrant", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("own", [True, False], ids=["with-the-models-loss", "with-another-loss"])
def test_auxiliary_losses_can_be_added_by_hand_and_count_once(reentrant: bool | None, own: bool) -> None:
    model, x = Model(reentrant), batch(1)
    task = model(x, own=own)
    with torch.no_grad():
        model(batch(2))  # a reference, in between
    total = own_losses(model.book)
    assert total is not None
    torch.testing.assert_close(total.item(), sum(value.item() for value in model_terms(model, x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((task + total) * 0.25).backward()
    assert_close(found(model), expected((x, 0.25)))


def model_terms(model: Model, x: Tensor) -> list[Tensor]:
    terms = []
    for block in model.blocks:
        x = x * block.weight.detach()
        terms.append(WEIGHT * x.square().mean())
    return terms


def test_nothing_is_left_to_add_of_an_earlier_forward() -> None:
    model = Model()
    model(batch(1))
    with torch.no_grad():
        assert own_losses(model.book) is None
    assert own_losses(model.book) is not None
    model.book.end(model.book.begin())
    assert own_losses(model.book) is None


TRL_FIELDS = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "mean_logits", "is_top1")}


@pytest.mark.filterwarnings("ignore:.*auxiliary losses have no effect")
def test_heads_of_trl_have_the_gradient_of_the_models_own_loss() -> None:
    from cases import Case, adapter_parameters
    from trl.trainer.utils import add_fused_lm_head

    case = Case("mept", "llama", "token", "sdpa")
    ids, labels = case.batch()["input_ids"], case.batch()["labels"]
    routers = {}
    for kind in ("own", "sft", "dpo", "dpo by hand"):
        model = case.model(balance_loss_weight=10.0).train()
        if kind == "own":
            loss = model(input_ids=ids, labels=labels).loss
        else:
            add_fused_lm_head(model.get_base_model(), outputs=TRL_FIELDS[kind.split()[0]])
            output = model(input_ids=ids, labels=labels, fused_lm_head=True)
            loss = -output.log_probs.sum() / (labels[:, 1:] != -100).sum()
            loss = loss + auxiliary_loss(model) if "hand" in kind else loss
        loss.backward()
        named = adapter_parameters(case, model).items()
        routers[kind] = torch.cat([p.grad.flatten() for name, p in named if "router" in name])
    torch.testing.assert_close(routers["sft"], routers["own"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routers["dpo by hand"], routers["own"], rtol=1e-5, atol=1e-6)
    assert (routers["dpo"] - routers["own"]).abs().max() > 0.1


def test_auxiliary_loss_is_zero_in_evaluation_and_refused_without_an_adapter() -> None:
    from cases import Case

    case = Case("mept", "llama", "token", "sdpa")
    model = case.model(balance_loss_weight=1.0).eval()
    model(**case.batch())
    assert float(auxiliary_loss(model)) == 0.0
    with pytest.raises(ValueError, match="no adapter of peft_promptmoe"):
        auxiliary_loss(case.base())
