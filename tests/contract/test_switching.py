# SPDX-License-Identifier: Apache-2.0
"""Several adapters, switching them off and on, taking them out; what a model is afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import (
    ALL_KERNELS,
    CASES,
    PROMPT_CHILD,
    Batch,
    Case,
    adapter_parameters,
    assert_different,
    assert_equal,
    each_case,
    one_per_architecture,
    one_per_column,
    predict,
    prompted,
    prompted_base,
    set_head,
    train,
    trains_alone,
)
from peft import PeftModel, get_layer_status, get_model_status
from torch import Tensor, nn


class Boom(Exception):
    """Raised inside a forward."""


@contextmanager
def broken_forward(model: nn.Module) -> Iterator[None]:
    """Let the last prompted attention layer's surroundings fail in mid-forward, prompts already made."""
    ends = (".mlp", ".feed_forward", ".ffn", ".fc2", ".intermediate", ".DenseReluDense")
    layers = [module for name, module in model.named_modules() if name.endswith(ends)]

    def fail(*_: Any) -> None:
        raise Boom

    handle = layers[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def break_forward(model: nn.Module, batch: Batch) -> None:
    with broken_forward(model), pytest.raises(Boom):
        model(**batch)


def census(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching an adapter could leave behind."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            name: [
                len(hooks)
                for key, hooks in sorted(module.__dict__.items())
                if key.endswith("_hooks") and isinstance(hooks, dict)
            ]
            for name, module in model.named_modules()
        },
        "configs": {
            name: (type(module.config), id(module.config))
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "forwards": {name: "forward" in module.__dict__ for name, module in model.named_modules()},
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


# -- off and on -------------------------------------------------------------------------------------------------------


@each_case(kernels=ALL_KERNELS)
def test_disabled_equals_the_base_model(case: Case) -> None:
    """Also nested, with a trained head, and after an exception inside."""
    batch = case.batch()
    expected = predict(case.base(), batch)
    model = case.model()
    train(model, batch, 1)
    set_head(model)
    active = predict(model, batch)
    assert_different(active, expected, "prompted and base logits")
    with model.disable_adapter():
        assert_equal(predict(model, batch), expected, "logits with the adapter disabled")
        with model.disable_adapter():
            assert_equal(predict(model, batch), expected, "logits with the adapter disabled twice")
    assert_equal(predict(model, batch), active, "logits after disabling")
    with pytest.raises(Boom), model.disable_adapter():
        raise Boom
    assert_equal(predict(model, batch), active, "logits after an exception while disabled")
    with model.disable_adapter():
        break_forward(model, batch)
        assert_equal(predict(model, batch), expected, "logits of the disabled adapter after an exception in forward")
    assert_equal(predict(model, batch), active, "logits after an exception in a disabled forward")


@each_case()
def test_training_goes_on_after_disabling(case: Case) -> None:
    model, batch = case.model(), case.batch()
    grads = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.disable_adapter():
        predict(model, batch)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == grads
    assert train(model, batch, 2) == train(case.model(), batch, 2)


@each_case(kernels=ALL_KERNELS, heads=True)
def test_an_exception_in_forward_leaves_nothing(case: Case) -> None:
    model, batch, other = case.model(), case.batch(), case.batch((4, 8), seed=3)
    expected = predict(model, batch)
    before = census(model)
    break_forward(model, other)
    model.train()
    break_forward(model, other)
    model.eval()
    assert census(model) == before
    assert_equal(predict(model, batch), expected, "logits after an exception in forward")
    fresh = case.model()
    assert train(model, batch, 2) == train(fresh, batch, 2)


@each_case(kernels=ALL_KERNELS, heads=True)
@pytest.mark.parametrize("after", ["training", "exception", "two-adapters"])
def test_unload_gives_the_base_model_back(case: Case, after: str) -> None:
    batch, base = case.batch(), case.base()
    expected, before, values = predict(base, batch), census(base), tensors(base)
    model = case.model(base)
    if after == "two-adapters":
        model.add_adapter("other", case.config(**case.method.other))
        model.set_adapter("other")
        predict(model, batch)
    else:
        train(model, batch, 1)
        predict(model, batch)
    if after == "exception":
        break_forward(model, batch)
    unloaded = model.unload()
    assert unloaded is base
    heads = case.architecture.heads
    found = census(base)
    for name in [name for name in before["configs"] if name.startswith(heads or "?")]:
        # PEFT leaves the active adapter's head, which is a copy of the original, config and all
        assert before["configs"].pop(name)[0] is found["configs"].pop(name)[0]
    for what, expected_value in before.items():
        assert found[what] == expected_value, f"unload changed {what}"
    for name, tensor in tensors(base).items():
        if not name.startswith(heads or "?"):
            assert_equal(tensor, values[name], name)
    assert not [name for name, _ in base.named_modules() if PROMPT_CHILD in name]
    if not heads or after == "two-adapters":  # the second adapter's head was not trained
        assert_equal(predict(base, batch), expected, "logits of the base model before and after")
    again = case.model(base)
    assert predict(again, batch).shape == expected.shape


@each_case(lambda case: bool(case.architecture.heads), heads=True)
def test_unload_keeps_the_trained_head_and_disable_uses_the_original(case: Case) -> None:
    batch, base = case.batch(), case.base()
    original = predict(base, batch)
    model = case.model(base)
    assert set_head(model)
    with model.disable_adapter():
        assert_equal(predict(model, batch), original, "logits with the original head")
    trained = {
        name: tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if ".modules_to_save.default." in name
    }
    unloaded = dict(model.unload().named_parameters())
    for name, tensor in trained.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert_equal(unloaded[plain], tensor, plain)
    expected = case.base()
    expected.load_state_dict(expected.state_dict() | unloaded)
    assert_equal(predict(base, batch), predict(expected, batch), "logits of the base model with the trained head")
    assert_different(predict(base, batch), original, "logits with trained and original head", 1e-2)


# -- several adapters -------------------------------------------------------------------------------------------------


@each_case()
def test_adapters_are_independent_and_can_be_deleted(case: Case) -> None:
    batch = case.batch()
    model = case.model()
    first = predict(model, batch)
    torch.manual_seed(7)
    model.add_adapter("other", case.config(**case.method.other))
    assert_equal(predict(model, batch), first, "logits after adding an inactive adapter")
    model.set_adapter("other")
    second = predict(model, batch)
    assert_different(second, first, "logits of the two adapters")
    frozen = {name: tensor.detach().clone() for name, tensor in adapter_parameters(case, model, "default").items()}
    train(model, batch, 2)
    set_head(model, "other")
    assert_different(predict(model, batch), second, "logits of the second adapter after training it")
    for name, tensor in adapter_parameters(case, model, "default").items():
        assert_equal(tensor, frozen[name], name)
        assert not tensor.requires_grad
    model.set_adapter("default")
    assert_equal(predict(model, batch), first, "logits of the first adapter after training the second")
    assert {p.requires_grad for p in adapter_parameters(case, model, "default").values()} == {True}
    assert {p.requires_grad for p in adapter_parameters(case, model, "other").values()} == {False}

    model.delete_adapter("other")
    assert "other" not in model.peft_config
    assert not [name for name in model.state_dict() if ".other" in name]
    for module in model.modules():
        assert "other" not in getattr(module, "prompt_config", {}), "the deleted adapter's settings are still there"
    assert_equal(predict(model, batch), first, "logits of the first adapter after deleting the second")
    with pytest.raises(ValueError):
        model.set_adapter("other")
    torch.manual_seed(7)
    model.add_adapter("other", case.config(**case.method.other))
    model.set_adapter("other")
    assert_equal(predict(model, batch), second, "logits of an adapter that was deleted and added again")


@each_case(trains_alone)
def test_two_active_adapters_add_their_prompts(case: Case) -> None:
    model, batch = case.model(), case.batch()
    alone = predict(model, batch)
    model.add_adapter("other", case.config(**case.method.other))
    model.base_model.set_adapter(["default", "other"])
    both = predict(model, batch)
    assert torch.isfinite(both).all()
    assert_different(both, alone, "logits of one adapter and of both")
    model.base_model.set_adapter("default")
    assert_equal(predict(model, batch), alone, "logits of one adapter after both were active")


@each_case(lambda case: not trains_alone(case) and one_per_architecture(case))
def test_two_active_heads_are_refused(case: Case) -> None:
    """By PEFT: one model has one head at a time."""
    model = case.model()
    model.add_adapter("other", case.config(**case.method.other))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])


# -- what cannot be ---------------------------------------------------------------------------------------------------


@each_case(one_per_column)
def test_merging_is_refused(case: Case) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into the base weights"):
            merge()
    assert_equal(predict(model, batch), expected, "logits after a refused merge")


REFUSALS = [
    pytest.param(case, settings, pattern, id=f"{case}-{number}")
    for case in CASES
    for number, (architecture, settings, pattern) in enumerate(case.method.refusals)
    if architecture == case.architecture_name and case.kernel == "sdpa" and one_per_architecture(case)
]


@each_case(one_per_column)
def test_layers_that_do_not_exist_are_refused(case: Case) -> None:
    base, batch = case.base(), case.batch()
    expected, before = predict(base, batch), census(base)
    with pytest.raises(ValueError, match=r"layers_to_transform.*7"):
        case.model(base, layers_to_transform=[7])
    assert census(base) == before
    assert_equal(predict(base, batch), expected, "logits of the base model after a refusal")


@pytest.mark.parametrize("case, settings, pattern", REFUSALS)
def test_what_a_method_refuses(case: Case, settings: dict[str, Any], pattern: str) -> None:
    base, batch = case.base(), case.batch()
    expected, before = predict(base, batch), census(base)  # the first loss may write its kind into the config
    with pytest.raises(ValueError, match=pattern):
        case.model(base, **settings)
    assert census(base) == before
    assert_equal(predict(base, batch), expected, "logits of the base model after a refusal")


@each_case(lambda case: one_per_architecture(case) and case.method.joins_attention and case.architecture.told)
def test_an_untested_kernel_is_refused(case: Case) -> None:
    base = case.base()
    for config in {
        id(module.config): module.config for module in base.modules() if hasattr(module, "config")
    }.values():
        config._attn_implementation = "paged|sdpa"
    before = census(base)
    with pytest.raises(ValueError, match=r"Load it with attn_implementation='sdpa'"):
        case.model(base)
    assert census(base) == before


# -- what PEFT tells about a model ------------------------------------------------------------------------------------


@each_case(one_per_architecture)
def test_model_and_layer_status(case: Case) -> None:
    model = case.model()
    status = get_model_status(model)
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = [layer for layer in get_layer_status(model) if layer.name.endswith(PROMPT_CHILD)]
    assert len(layers) == len(prompted_base(model)) > 0
    assert all(layer.requires_grad == {"default": True} for layer in layers)
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == status.trainable_params and total > trainable


@each_case(one_per_architecture)
def test_set_requires_grad(case: Case) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    model.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(case, model).values())
    assert_equal(predict(model, batch), expected, "logits after set_requires_grad")
    model.set_requires_grad("default")
    assert all(parameter.requires_grad for parameter in adapter_parameters(case, model).values())


@each_case(
    lambda case: "layers_to_transform" in type(case.config()).__dataclass_fields__ and one_per_architecture(case)
)
@pytest.mark.parametrize("layers", [1, [0], [0, 1]], ids=["int", "list", "all"])
def test_layers_to_transform(case: Case, layers: int | list[int], tmp_path: Any) -> None:
    base, batch = case.base(), case.batch()
    model = case.model(base, layers_to_transform=layers)
    names = list(prompted(model))
    wanted = {layers} if isinstance(layers, int) else set(layers)
    found = {int(next(part for part in name.split(".") if part.isdigit())) for name in names}
    assert found == wanted
    expected = predict(model, batch)
    if wanted - case.variant.unread:
        assert_different(expected, predict(case.base(), batch), "prompted and base logits")
    else:
        assert_equal(expected, predict(case.base(), batch), "logits that read nothing of these layers")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_equal(predict(loaded, batch), expected, "logits of a subset of layers after loading")
