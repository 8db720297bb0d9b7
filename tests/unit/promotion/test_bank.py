# SPDX-License-Identifier: Apache-2.0
"""The bank of prototypes: when it starts and moves, when it does not, and how it travels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from test_training import checkpointing
from tiny_promotion import DENSE, SMALL, adapted, banks, classifier, images, sgd, step, trained, units
from torch import Tensor, nn

from peft_promptmoe import ProMotionConfig
from peft_promptmoe.promotion.bank import PrototypeBank, far_apart, farthest, moved
from peft_promptmoe.promotion.prototypes import unit_rows


def weights(model: nn.Module) -> list[Tensor]:
    return [bank.weight.detach().clone() for bank in banks(model)]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other), f"banks differ by {(one - other).abs().max():.3g}"


def assert_moved(left: list[Tensor], right: list[Tensor], least: float = 1e-5) -> None:
    for one, other in zip(left, right, strict=True):
        assert (one - other).abs().max() > least


class Listener:
    """Keeps the directions of patches that a unit's start is asked for with."""

    def __init__(self, own: Any, number: int, seen: dict[int, Tensor]) -> None:
        self.own, self.number, self.seen = own, number, seen

    def __call__(self, adapter: str, config: Any, u: Tensor, *rest: Any) -> Tensor:
        self.seen[self.number] = u
        return self.own(adapter, config, u, *rest)


# -- starting ---------------------------------------------------------------------------------------------------------


def test_the_first_training_batch_starts_the_bank_with_patches_of_its_own() -> None:
    model = adapted()
    assert all(weight.abs().max() == 0.0 for weight in weights(model))
    model.eval()
    with torch.no_grad():
        model(**images())
    assert all(weight.abs().max() == 0.0 for weight in weights(model)), "evaluation started the bank"
    seen: dict[int, Tensor] = {}
    for number, unit in enumerate(units(model)):
        unit._start = Listener(unit._start, number, seen)
    step(model, images())
    model.eval()
    for number, weight in enumerate(weights(model)):
        patches = seen[number].flatten(0, 1)
        for row in weight:
            assert (patches - row).abs().amax(dim=1).min() < 1e-5
        assert len(weight.unique(dim=0)) == len(weight)


def test_what_the_first_forward_groups_by_is_what_is_kept() -> None:
    """A second forward of the same batch starts from the same prototypes."""
    model = adapted(estimation_rounds=1).train()
    model(**images())
    first = [unit.last_assignment["default"].prototypes for unit in units(model)]
    model(**images())
    for unit, prototypes in zip(units(model), first, strict=True):
        torch.testing.assert_close(unit.last_assignment["default"].prototypes, prototypes)


def test_a_start_lies_far_apart() -> None:
    groups = torch.eye(6).repeat_interleave(50, dim=0)
    groups = unit_rows(groups + 0.01 * torch.randn_like(groups))
    chosen = far_apart(groups, torch.rand(6).tolist())
    assert chosen.argmax(dim=1).sort().values.tolist() == list(range(6))


@pytest.mark.parametrize("broken", [[0], [2, 3], [0, 1, 2, 3]])
def test_a_first_batch_with_pixels_that_are_no_numbers_spoils_no_start(broken: list[int]) -> None:
    """Patches of its other images start the bank, or if it has none, those of the next batch."""
    model, first = adapted().train(), images()
    first["pixel_values"][broken] = torch.nan
    model(**first)
    for seed in range(1, 4):
        step(model, images(seed=seed))
    for bank in banks(model):
        bank.settle()
        assert not bank.may_be_unstarted, "each further step would look again"
        cosines = bank.weight @ bank.weight.T
        torch.testing.assert_close(cosines.diagonal(), torch.ones(len(cosines)))
        assert cosines.fill_diagonal_(0.0).max() < 0.95


def test_patches_that_are_no_numbers_are_never_chosen() -> None:
    u = torch.eye(6)
    u[[0, 2, 5]] = torch.nan
    for seed in range(20):
        draws = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        assert far_apart(u, draws).argmax(dim=1).sort().values.tolist() == [1, 3, 4]


def test_farthest_patches_come_first() -> None:
    u = torch.eye(5)
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.3], [-0.5, -0.6], [0.0, 0.8], [0.1, 0.0]])
    assert farthest(u, similarity, 3).argmax(dim=1).tolist() == [2, 4, 1]


# -- moving -----------------------------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    bank, sums = unit_rows(torch.randn(3, 4)), 5.0 * torch.randn(3, 4)
    sums[1] = 0.0
    sums[2, 0] = torch.nan
    found = moved(bank, sums, 0.9)
    expected = 0.9 * bank[0] + 0.1 * sums[0] / sums[0].norm()
    torch.testing.assert_close(found[0], expected / expected.norm())
    torch.testing.assert_close(found[1:], bank[1:])


def test_the_bank_moves_in_training_and_not_in_the_forward_that_says_so() -> None:
    model, batch = adapted(), images()
    step(model, batch)
    step(model, batch)
    started = weights(model)
    assert all(bank.pending is not None for bank in banks(model))
    step(model, batch)
    assert_moved(weights(model), started)


@pytest.mark.parametrize("why", ["evaluation", "inference-mode", "frozen", "inactive", "disabled", "momentum-1"])
def test_the_bank_stays(why: str) -> None:
    model, batch = adapted(bank_momentum=1.0 if why == "momentum-1" else 0.9), images()
    step(model, batch)
    step(model, batch)
    model.eval()
    before = weights(model)
    assert all(weight.abs().max() > 0 for weight in before)
    if why != "evaluation":
        model.train()
    if why == "frozen":
        model.set_requires_grad("default", requires_grad=False)
    if why == "inactive":
        model.add_adapter("other", ProMotionConfig(**SMALL, layers_to_transform=[0, 2]))
        model.set_adapter("other")
    if why == "disabled":
        model.base_model.disable_adapter_layers()
    for seed in range(2):
        if why == "inference-mode":
            with torch.inference_mode():
                model(**images(seed=seed))
        else:
            model(**images(seed=seed))
    model.eval()
    assert_same(weights(model), before)


def test_a_prototype_without_patches_moves_to_far_ones() -> None:
    bank = PrototypeBank(3, 4, 0.9, reseed_after=2)
    with torch.no_grad():
        bank.weight.copy_(torch.eye(4)[:3])
    u = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])[None]
    similarity = u @ bank.weight.T
    assigned = torch.tensor([[0, 1, 0]])
    share = torch.nn.functional.one_hot(assigned, 3).float()
    for turn in range(2):
        bank.begin()
        torch.testing.assert_close(bank.weight[2], torch.eye(4)[2])
        bank.leave(bank.start(u[0]), u, similarity, share, assigned)
        bank.pending, bank.draft = bank.draft, None
        assert bank.idle[2].item() == turn
    bank.begin()
    assert bank.idle.flatten().tolist() == [0.0, 0.0, 0.0]
    # Its own candidate is the third farthest of the three patches.
    assert bank.weight[2].norm().item() == pytest.approx(1.0) and bank.weight[2, 2].item() == 0.0


# -- a step that is run again, broken or saved ------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_banks_losses_and_gradients(reentrant: bool) -> None:
    """With the noise of the lessons, which is drawn again; over three steps, so that a bank moved twice would show."""
    results = []
    for checkpoint in (False, True):
        model = DENSE.model(denoise_weight=1.0, noisy_features=True, init_weights=True)
        if checkpoint:
            checkpointing(model, reentrant)
        optimizer = sgd(model, 0.5)
        losses = [step(model, DENSE.batch(seed=seed), optimizer) for seed in range(2)]
        losses.append(step(model, DENSE.batch(seed=2)))
        grads = {name: p.grad.clone() for name, p in trained(model).items()}
        model.eval()
        results.append((losses, grads, weights(model)))
    (losses, grads, kept), (again, found, moved_banks) = results
    torch.testing.assert_close(torch.stack(again), torch.stack(losses), rtol=1e-6, atol=1e-6)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(moved_banks, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_forward_that_breaks_leaves_nothing_for_the_bank() -> None:
    model, batch = adapted(), images()
    for _ in range(2):
        step(model, batch)
    model.eval()
    before = weights(model)
    last = model.get_base_model().classifier

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model.train()(**images(seed=3))
    handle.remove()
    model.eval()
    assert_same(weights(model), before)


def test_what_is_pending_counts_in_evaluation_when_saved_and_when_copied(tmp_path: Path) -> None:
    model, batch = adapted(), images()
    optimizer = sgd(model)
    for seed in range(3):
        step(model, images(seed=seed), optimizer)
    saved = {name: t.clone() for name, t in get_peft_model_state_dict(model).items() if "bank" in name}
    unmoved = weights(model)
    model.save_pretrained(tmp_path)
    assert_same(weights(model), unmoved)
    copied = copy.deepcopy(model).eval()
    model.eval()
    assert_moved(weights(model), unmoved)
    assert_same(list(saved.values()), weights(model))
    assert_same(weights(copied), weights(model))
    loaded = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_evaluation_without_a_change_of_mode_sees_the_bank_moved() -> None:
    model, batch = adapted(init_weights=False), images()
    step(model, batch)
    for unit in units(model):
        unit.train(False)
    with torch.no_grad():
        found = model(**batch).logits
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, found)


def test_parameters_by_name_are_all_that_a_copy_needs() -> None:
    model, batch = adapted(init_weights=False), images()
    optimizer = sgd(model)
    for seed in range(3):
        step(model, images(seed=seed), optimizer)
    model.eval()
    fresh = adapted().eval()
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name])
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    for each in (model, fresh):
        step(each, batch)
        step(each, batch)
        each.eval()
    assert_same(weights(fresh), weights(model))


def test_what_is_loaded_is_not_moved_by_what_was_pending() -> None:
    model = adapted()
    for seed in range(3):
        step(model, images(seed=seed))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(3, 6):
        step(model, images(seed=seed))
    model.load_state_dict(kept)
    model.eval()
    assert_same(weights(model), [tensor for name, tensor in kept.items() if "promotion_bank" in name])


def test_banks_are_not_trained_whatever_is_switched() -> None:
    model = adapted()
    model.add_adapter("other", ProMotionConfig(**SMALL, layers_to_transform=[0, 2]))
    model.set_adapter("other")
    model.set_requires_grad("default")
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert not any(bank.weight.requires_grad for name in ("default", "other") for bank in banks(model, name))


@pytest.mark.parametrize("reseed", [0, 3])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, reseed: int) -> None:
    def run(model: nn.Module, seeds: range) -> None:
        optimizer = sgd(model)
        for seed in seeds:
            step(model, images(seed=seed), optimizer)

    whole = adapted(reseed_after=reseed)
    run(whole, range(6))
    broken = adapted(reseed_after=reseed)
    run(broken, range(3))
    broken.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(classifier(), tmp_path, is_trainable=True)
    run(resumed, range(3, 6))
    whole.eval(), resumed.eval()
    assert_same(weights(resumed), weights(whole))
    for name, parameter in trained(whole).items():
        assert torch.equal(parameter, trained(resumed)[name]), name
