# SPDX-License-Identifier: Apache-2.0
"""What trains and what does not; checkpointing, reduced precision, compilation and the balance loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ALL_KERNELS,
    PROMPT_CHILD,
    Batch,
    Case,
    adapter_parameters,
    assert_equal,
    each_case,
    fit,
    gradients,
    logits,
    one_per_architecture,
    predict,
    train,
)
from torch import Tensor, nn

BALANCE = 0.3


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        limit = tolerance * max(1.0, float(gradient.abs().max()))
        difference = float((found[name] - gradient).abs().max())
        assert difference <= limit, f"the gradient of {name} differs by {difference:.3g}, allowed is {limit:.3g}"


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within what half precision makes of large random weights."""
    error = float((found.float() - expected).norm() / expected.norm())
    assert error < 0.2, f"half precision is off by {error:.0%}"


def with_balance(case: Case, weight: float = BALANCE) -> dict[str, Any]:
    assert case.method.balance is not None
    return {case.method.balance: weight}


def has_balance(case: Case) -> bool:
    return case.method.balance is not None


# -- what trains ------------------------------------------------------------------------------------------------------


@each_case()
def test_only_the_adapter_and_the_head_train(case: Case) -> None:
    model = case.model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if ".modules_to_save.default." in name}
    assert trained - heads == adapter_parameters(case, model).keys()
    found = {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in heads}
    assert {name.removeprefix("transformer.") for name in found} == set(case.architecture.heads)


@each_case(kernels=ALL_KERNELS)
@pytest.mark.parametrize("active", ["one", "all"])
def test_every_trained_tensor_gets_a_gradient(case: Case, active: str) -> None:
    method = case.method
    settings = {method.active: 1 if active == "one" else method.widths[-1]} if method.active else {}
    model = case.model(**settings)
    _, found = gradients(model, case.batch())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert name in found, f"{name} gets no gradient"
            assert torch.isfinite(found[name]).all(), name
            if case.task_type == "QUESTION_ANS" and name.endswith(".bias"):
                continue  # added to every token's score, so a softmax over tokens does not see it
            assert found[name].abs().max() > 1e-7, f"the gradient of {name} is zero"
        else:
            assert name not in found
    if method.router and active == "one":
        assert any(method.router in name for name in found)


@each_case()
def test_training_changes_nothing_of_the_base_model(case: Case) -> None:
    model = case.model()
    mine = adapter_parameters(case, model).keys()

    def others() -> dict[str, Tensor]:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {
            name: tensor.detach().clone()
            for name, tensor in tensors.items()
            if name not in mine and ".modules_to_save." not in name and (case.method.state or " ") not in name
        }

    before, trained = (
        others(),
        {name: tensor.detach().clone() for name, tensor in adapter_parameters(case, model).items()},
    )
    train(model, case.batch(), 3)
    after = others()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_equal(after[name], tensor, name)
    for name, tensor in adapter_parameters(case, model).items():
        assert not torch.equal(tensor, trained[name]), f"{name} did not train"


@each_case()
def test_training_lowers_the_loss(case: Case) -> None:
    losses = train(case.model(), case.batch(), 8, rate=0.02)
    assert losses[-1] < losses[0] - 1e-3


@each_case(lambda case: bool(case.method.noisy) and one_per_architecture(case))
def test_noise_of_training_is_off_in_evaluation(case: Case) -> None:
    model, plain, batch = case.model(**case.method.noisy), case.model(), case.batch()
    assert_equal(predict(model, batch), predict(plain, batch), "evaluation with and without the settings for noise")
    model.train()
    first, second = predict(model, batch), predict(model, batch)
    assert not torch.equal(first, second), "training forwards should differ by their noise"


# -- activation checkpointing -----------------------------------------------------------------------------------------


def checkpointing(model: nn.Module, reentrant: bool) -> None:
    """Switch activation checkpointing on as the Trainer does."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # transformers before 5.20
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    else:
        enable({"use_reentrant": reentrant})


class AttentionCalls:
    """Counts the forward calls of prompted attention layers."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.layers = [
            module for module in model.modules() if hasattr(getattr(module, PROMPT_CHILD, None), "prompt_config")
        ]
        for layer in self.layers:
            layer.register_forward_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        self.count += 1


@each_case()
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_gradients(case: Case, reentrant: bool) -> None:
    check_checkpointing(case, reentrant, {})


@each_case(has_balance)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_gradients_of_a_balance_loss(case: Case, reentrant: bool) -> None:
    check_checkpointing(case, reentrant, with_balance(case))


def check_checkpointing(case: Case, reentrant: bool, settings: dict[str, Any]) -> None:
    batch = case.batch()
    loss, expected = gradients(case.model(**settings), batch)
    model = case.model(**settings)
    calls = AttentionCalls(model)
    checkpointing(model, reentrant)
    if not reentrant and "pixel_values" in batch:  # else no frozen block in front of the first unit is run again
        batch["pixel_values"].requires_grad_(True)
    found_loss, found = gradients(model, batch)
    runs = 3 if case.architecture_name == "swin" else 2  # its stages are checkpointed, and the blocks in them
    assert calls.count == runs * len(calls.layers) > 0, "checkpointing was not active"
    # Re-entrant checkpointing runs forward without gradients, where gates join the mask instead of queries and keys.
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=2e-6)
    assert_same_gradients(found, expected, 1e-5)


# -- precision --------------------------------------------------------------------------------------------------------


@each_case()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_half_precision_base_keeps_the_adapter_in_fp32(case: Case, dtype: torch.dtype) -> None:
    batch = case.batch()
    model = case.model(base=case.base().to(dtype))
    for name, parameter in adapter_parameters(case, model).items():
        assert parameter.dtype == torch.float32, name
    found = predict(model, batch)
    assert found.dtype == dtype
    assert_near(found, predict(case.model(), batch))
    loss, given = gradients(model, batch)
    assert torch.isfinite(loss)
    for name, gradient in given.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


@each_case()
def test_autocast_is_finite_and_near(case: Case) -> None:
    batch, model = case.batch(), case.model(**(with_balance(case) if has_balance(case) else {}))
    expected = predict(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(model, batch)
        _, given = gradients(model, batch)
    assert_near(found, expected)
    for name, gradient in given.items():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    if case.method.state is None:  # what a method keeps beside its trained tensors has moved
        assert_equal(predict(model, batch), expected, "logits after autocast")


# -- compilation ------------------------------------------------------------------------------------------------------


def compiles_its_loss(case: Case) -> bool:
    """GPT-2's own loss logs a warning and DeBERTa's asks how many labels there are, which no compiler takes; the base
    models alone fail the same way."""
    return case.architecture_name not in ("gpt2", "deberta_v3")


def compiles(case: Case) -> bool:
    """DPT captures its hidden states under a lock, which no compiler takes; so does the base model alone."""
    return case.architecture_name != "dpt_vit"


def compiles_whole(case: Case) -> bool:
    """Some mixtures of experts go through those that were chosen, where the graphs of the base models break, too."""
    return case.architecture_name not in ("gpt_oss", "deepseek_v3")


COMPILED_TWICE = ("bert", "llama")


@each_case(
    lambda case: compiles_its_loss(case) and compiles(case),
    slow=lambda case: not one_per_architecture(case) and case.architecture_name not in COMPILED_TWICE,
)
def test_compiled_training_equals_eager(case: Case) -> None:
    settings = with_balance(case) if has_balance(case) else {}
    batch = case.batch()
    loss, expected = gradients(case.model(**settings), batch)
    model = case.model(**settings)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=compiles_whole(case), backend="aot_eager")
    found_loss, found = gradients(model, batch, forward=compiled)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected, 1e-5)


@each_case(lambda case: not compiles_its_loss(case) or case.architecture_name in ("bert", "t5"))
def test_compiled_evaluation_equals_eager(case: Case) -> None:
    model, batch = case.model(), case.batch()
    if not compiles_its_loss(case):
        batch = case.prompt_only(batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predict(compiled, batch), predict(model, batch), rtol=1e-5, atol=1e-5)


# -- balance loss -----------------------------------------------------------------------------------------------------


def balance_gradients(case: Case, batch: Batch, weight: float = BALANCE, **settings: Any) -> dict[str, Tensor]:
    """What the balance loss adds to the gradients."""
    _, expected = gradients(case.model(case.base().double(), **settings).double(), batch)
    _, found = gradients(case.model(case.base().double(), **settings, **with_balance(case, weight)).double(), batch)
    assert found.keys() == expected.keys()
    return {name: found[name] - expected[name] for name in found}


@each_case(has_balance)
def test_the_balance_loss_reaches_routers_and_is_not_in_the_reported_loss(case: Case) -> None:
    batch = case.batch()
    plain, balanced = case.model(), case.model(**with_balance(case))
    loss, before = gradients(plain, batch)
    balanced_loss, after = gradients(balanced, batch)
    assert_equal(balanced_loss, loss, "reported losses with and without balance loss")
    changed = [name for name in before if (before[name] - after[name]).abs().max() > 1e-6]
    assert case.method.router is not None
    routers = [name for name in before if case.method.router in name]
    assert routers and set(routers) <= set(changed)


@each_case(has_balance)
def test_the_balance_loss_is_the_gradient_of_what_is_reported(case: Case) -> None:
    """Along the steepest direction in the space of the routers, by finite differences."""
    batch = case.batch()
    added = balance_gradients(case, batch)
    model = case.model(case.base().double(), **with_balance(case)).double()
    root = getattr(model.get_base_model(), PROMPT_CHILD)
    parameters = {name: p for name, p in model.named_parameters() if str(case.method.router) in name}
    norm = float(sum((added[name] ** 2).sum() for name in parameters)) ** 0.5
    values, step = [], 1e-4
    model.train()
    for move in (step, -2 * step):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(move / norm * added[name])
        model(**fit(model, batch))
        values.append(len(parameters) * root.last_balance_loss)
    slope = (values[0] - values[1]) / (2 * step)
    assert norm > 1e-3
    assert abs(slope - norm) < 0.02 * norm, f"the gradient has norm {norm:.4g} and the slope is {slope:.4g}"


@each_case(has_balance)
def test_the_balance_loss_survives_accumulation_and_scaling(case: Case) -> None:
    batch, settings = case.batch(), with_balance(case)
    _, expected = gradients(case.model(**settings), batch)
    model = case.model(**settings)
    model.train()
    for _ in range(4):
        (model(**batch).loss / 4).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-6)
    _, scaled = gradients(case.model(**settings), batch, scale=2.0**14)
    assert_same_gradients(scaled, expected, 1e-6)


@each_case(has_balance)
def test_the_balance_loss_is_the_same_in_tuples(case: Case) -> None:
    batch, settings = case.batch(), with_balance(case)
    _, expected = gradients(case.model(**settings), batch)
    model = case.model(**settings).train()
    loss, *_ = model(**batch, return_dict=False)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-6)


@each_case(has_balance)
def test_two_forwards_before_one_backward_keep_their_balance_losses_apart(case: Case) -> None:
    settings, one, two = with_balance(case), case.batch(seed=1), case.batch(seed=2)
    model = case.model(**settings)
    _, first = gradients(model, one)
    _, second = gradients(model, two)
    model.train()
    model.zero_grad()
    (model(**one).loss + 3.0 * model(**two).loss).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, {name: first[name] + 3.0 * second[name] for name in found}, 1e-5)


@each_case(has_balance)
def test_the_balance_loss_is_off_in_evaluation_and_for_one_expert(case: Case) -> None:
    batch = case.batch()
    plain, balanced = case.model(), case.model(**with_balance(case))
    assert_equal(predict(balanced, batch), predict(plain, batch), "logits in evaluation")
    grads = []
    for model in (plain, balanced):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(grads[1], grads[0])
    assert getattr(balanced.get_base_model(), PROMPT_CHILD).last_balance_loss is None
    single = case.method.single
    alone = case.model(**single, **with_balance(case))
    found = gradients(alone, batch)[1]
    assert_same_gradients(found, gradients(case.model(**single), batch)[1])
    assert getattr(alone.get_base_model(), PROMPT_CHILD).last_balance_loss is None
    assert not [name for name in found if str(case.method.router) in name]


@each_case(has_balance)
def test_padding_does_not_count_in_the_balance_loss(case: Case) -> None:
    # Ten choices never fall on four experts evenly, where the balance loss has no gradient.
    short = balance_gradients(case, case.batch((6, 6, 6, 6, 6)))
    padded = balance_gradients(case, case.batch((6, 6, 6, 6, 6), pad_to=11))
    assert max(float(value.abs().max()) for value in short.values()) > 1e-4
    # The task's own gradient cancels only to single precision where transformers computes the loss in it.
    assert_same_gradients(padded, short, 2e-5)


@each_case(has_balance)
def test_logits_in_training_are_those_of_evaluation_when_nothing_is_random(case: Case) -> None:
    model, batch = case.model(**with_balance(case)), case.batch()
    expected = predict(model, batch)
    model.train()
    torch.testing.assert_close(logits(model, batch).detach(), expected, rtol=1e-4, atol=1e-4)
