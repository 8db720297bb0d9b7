# SPDX-License-Identifier: Apache-2.0
"""Losses of a method's own reach the optimiser through the model's loss, which they are not part of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Batch, Case, assert_equal, each_case, gradients, predict
from test_trainer import trainer_for
from test_training import assert_same_gradients, checkpointing, compiles
from torch import Tensor, nn

from peft_promptmoe import last_aux_losses
from peft_promptmoe.promotion import layer

WEIGHTS = (0.7, 0.5, 0.3)


def has_own(case: Case) -> bool:
    return bool(case.method.auxiliary)


def weighted(case: Case, factor: float = 1.0) -> dict[str, Any]:
    return {name: factor * weight for name, weight in zip(case.method.auxiliary, WEIGHTS, strict=True)}


def adapted(case: Case, factor: float = 1.0) -> nn.Module:
    return case.model(case.base().double(), **weighted(case, factor)).double()


def seeded(model: nn.Module, batch: Batch, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """With the same random lessons each time."""
    torch.manual_seed(5)
    return gradients(model, batch, **kwargs)


def by_hand(case: Case, batch: Batch, patch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of (task + losses).backward(), the losses taken out on their way."""
    model = adapted(case)
    terms: list[Tensor] = []

    def keep(carrier: Tensor, term: Tensor, *_: Any) -> Tensor:
        terms.append(term)
        return carrier

    patch.setattr(layer, "carry_loss", keep)
    torch.manual_seed(5)
    model.train()
    loss = model(**{name: x.double() if x.is_floating_point() else x for name, x in batch.items()}).loss
    assert terms
    (loss + torch.stack(terms).sum()).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_case(has_own)
def test_own_losses_are_in_the_gradient_and_not_in_the_reported_loss(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = case.batch()
    with monkeypatch.context() as patch:
        loss, expected = by_hand(case, batch, patch)
    plain_loss, plain = seeded(adapted(case, 0.0), batch)
    found_loss, found = seeded(adapted(case), batch)
    assert_equal(found_loss, loss, "reported loss")
    assert_equal(found_loss, plain_loss, "reported losses with and without the method's own")
    assert_same_gradients(found, expected, 1e-12)
    assert max(float((found[name] - plain[name]).abs().max()) for name in found) > 1e-3


@each_case(has_own)
def test_own_losses_survive_accumulation_and_scaling(case: Case) -> None:
    batch = case.batch()
    _, expected = seeded(adapted(case), batch)
    model = adapted(case).train()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    for bank in [module for module in model.modules() if hasattr(module, "pending")]:
        bank.momentum = 1.0  # four forwards would move it four times
    for _ in range(4):
        torch.manual_seed(5)
        (model(**batch).loss / 4).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-9)
    for scale in (2.0**14, float("inf")):
        scaled, before, after = scaled_step(adapted(case).train(), batch, scale)
        if scale < float("inf"):
            assert_same_gradients(scaled, expected, 1e-9)
            moved = {name: before[name] - 0.1 * expected[name] for name in expected}
            assert_same_gradients({name: after[name] for name in expected}, moved, 1e-9)
        else:  # the step is left out
            assert_same_gradients(after, before, 0.0)


def scaled_step(
    model: nn.Module, batch: Batch, scale: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Gradients, and what trains before and after a step, of torch's own scaler of losses."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    torch.manual_seed(5)
    scaler.scale(model(**batch).loss).backward()
    scaler.unscale_(optimizer)
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    scaler.step(optimizer)
    return found, before, {name: p.detach() for name, p in trained.items()}


@each_case(has_own)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_own_losses_survive_checkpointing(case: Case, reentrant: bool) -> None:
    batch = case.batch()
    _, expected = seeded(adapted(case), batch)
    model = adapted(case)
    checkpointing(model, reentrant)
    _, found = seeded(model, batch)
    assert_same_gradients(found, expected, 1e-9)


@each_case(lambda case: has_own(case) and compiles(case))
def test_own_losses_survive_compilation(case: Case) -> None:
    """Without the random lessons: a compiler draws other numbers."""
    settings, batch = weighted(case) | {case.method.auxiliary[0]: 0.0}, case.batch()
    _, expected = gradients(case.model(**settings), batch)
    _, plain = gradients(case.model(**weighted(case, 0.0)), batch)
    model = case.model(**settings)
    torch._dynamo.reset()
    _, found = gradients(model, batch, forward=torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert_same_gradients(found, expected, 1e-5)
    assert max(float((found[name] - plain[name]).abs().max()) for name in found) > 1e-3


@each_case(has_own)
def test_own_losses_are_off_in_evaluation(case: Case) -> None:
    batch = case.batch()
    grads = []
    for factor in (0.0, 1.0):
        model = case.model(**weighted(case, factor))
        assert_equal(predict(model, batch), predict(case.model(), batch), "logits in evaluation")
        model(**batch).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert last_aux_losses(model) == {}
    assert_same_gradients(grads[1], grads[0])


@each_case(has_own)
def test_own_losses_are_told(case: Case, tmp_path: Path) -> None:
    """After a step of the stock Trainer."""
    model = case.model(**weighted(case))
    trainer_for(case, model, tmp_path, eval_strategy="no", save_strategy="no", max_steps=1).train()
    told = last_aux_losses(model)
    assert set(told) == {"denoise", "denoise_ratio", "margin", "compact"}
    assert all(0.0 < value < 100.0 for value in told.values())
