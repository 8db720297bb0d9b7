# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch (`adapter_names`): every sample gets what its own adapter gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Batch, Case, assert_equal, each_case, one_per_column, predict, set_head
from peft import PeftModel
from torch import Tensor

OF_ONE_SHAPE = ("bert", "t5", "llama", "bloom")
NAMES = ["second", "__base__", "default"]


def mixes(case: Case) -> bool:
    """Prompts that are rows of attention, and that no decoder sees as tokens."""
    seen = case.task_type == "SEQ_2_SEQ_LM" and case.variant_name == "sample"
    return case.method_name in ("mept", "vapt") and not seen


def does_not_mix(case: Case) -> bool:
    return one_per_column(case) and not mixes(case)


def two_adapters(case: Case, alike: bool = False) -> PeftModel:
    """In float64, with different heads, and different numbers of prompts or `alike`."""
    model = case.model(case.base().double())
    torch.manual_seed(2)
    model.add_adapter("second", case.config(**({} if alike else case.method.other)))
    set_head(model, "second")
    return model.double().eval()


def one_by_one(model: PeftModel, batch: Batch) -> Tensor:
    """Each sample from the batch in which all samples have its adapter."""
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        found[name] = predict(model, batch)
    with model.disable_adapter():
        found["__base__"] = predict(model, batch)
    return torch.stack([found[name][number] for number, name in enumerate(NAMES)])


@each_case(mixes)
def test_each_sample_gets_its_own_adapter(case: Case) -> None:
    check_each_sample(case, two_adapters(case))


@each_case(lambda case: mixes(case) and case.variant_name == "token" and case.architecture_name in OF_ONE_SHAPE)
def test_each_sample_gets_its_own_adapter_of_one_shape(case: Case) -> None:
    """Tokens then choose among the experts of all adapters at once."""
    check_each_sample(case, two_adapters(case, alike=True))


def check_each_sample(case: Case, model: PeftModel) -> None:
    batch = case.batch()
    expected = one_by_one(model, batch)
    within = max(case.architecture.tolerance, 1e-6)  # rotary tables are float32
    model.set_adapter("default")
    found = predict(model, batch, adapter_names=NAMES)
    if batch.get("attention_mask") is not None and found.ndim > 2 and case.task_type != "SEQ_2_SEQ_LM":
        real = batch["attention_mask"].bool()  # nobody reads what stands at padding
        found, expected = found[real], expected[real]
    torch.testing.assert_close(found, expected, rtol=within, atol=within)
    active = predict(model, batch)
    assert_equal(predict(model, batch, adapter_names=["default"] * 3), active, "logits of one adapter, named")
    with model.disable_adapter():
        base = predict(model, batch)
        assert_equal(predict(model, batch, adapter_names=NAMES), base, "logits of named adapters while all are off")
    assert_equal(predict(model, batch), active, "logits after mixed batches")


@each_case(lambda case: mixes(case) and case.architecture.generates)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_each_sample_generates_by_its_own_adapter(case: Case, settings: dict[str, Any]) -> None:
    model = two_adapters(case).float() if case.architecture.single else two_adapters(case)
    batch = case.prompt_only(case.batch(side="left" if case.is_causal_lm and case.architecture.left else "right"))
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **settings}
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        found[name] = model.generate(**batch, **wanted)
    with model.disable_adapter():
        found["__base__"] = model.generate(**batch, **wanted)
    expected = torch.stack([found[name][number] for number, name in enumerate(NAMES)])
    assert_equal(model.generate(**batch, **wanted, adapter_names=NAMES), expected, "generated tokens")


@each_case(mixes)
def test_wrong_names_are_refused(case: Case) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    for names, message in (
        (["default"] * 2, r"adapter_names has 2 names, but this batch has 3 samples"),
        (["default", "other", "default"], r"names other, but this model has default"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, adapter_names=names)
    with pytest.raises(TypeError, match="list with one adapter name"):
        model(**batch, adapter_names="default")
    model.train()
    with pytest.raises(ValueError, match="adapter_names is for inference"):
        model(**batch, adapter_names=["default"] * 3)
    assert_equal(predict(model.eval(), batch), expected, "logits after a refused mixed batch")


@each_case(does_not_mix)
def test_mixed_batches_are_refused(case: Case) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    refusal = r"does not mix adapters within a batch|adapters cannot share a batch"
    with pytest.raises(ValueError, match=refusal):
        model(**batch, adapter_names=["default"] * len(next(iter(batch.values()))))
    if case.architecture.generates:
        with pytest.raises(ValueError, match=refusal):
            model.generate(**case.prompt_only(batch), adapter_names=["default"] * 3, max_new_tokens=2)
    assert_equal(predict(model, batch), expected, "logits after a refused mixed batch")
