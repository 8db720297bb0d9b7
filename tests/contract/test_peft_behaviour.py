# SPDX-License-Identifier: Apache-2.0
"""What PEFT's own tests ask of every method (its PeftCommonTester), behaviour by behaviour, where no other file does.

Elsewhere: round trips, meta device, deep copies (test_saving), unload, disable, switch, delete, status, layer indices
(test_switching), gradients, checkpointing, precision, compilation (test_training), generation (test_generation),
entry points (test_entry_points).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    PROMPT_CHILD,
    Case,
    adapter_parameters,
    assert_different,
    assert_equal,
    each_case,
    gradients,
    one_per_architecture,
    predict,
    prompted_base,
    train,
)
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"
USUAL = {
    *[("mept", "bert"), ("mept", "llama"), ("mept", "t5"), ("vapt", "vit"), ("vapt", "timm_vit")],
    *[("pmoe", "vit"), ("pmoe", "timm_vit")],
}


def every_case() -> pytest.MarkDecorator:
    """These do not depend on how prompts join, so most architectures wait for the full run."""
    return each_case(one_per_architecture, slow=lambda case: (case.method_name, case.architecture_name) not in USUAL)


# -- attributes and names ---------------------------------------------------------------------------------------------


@every_case()
def test_a_model_has_what_users_of_peft_call(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    base = case.base()
    model = case.model(base)
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "get_base_model", "print_trainable_parameters"):
        assert callable(getattr(model, name))
    assert model.get_base_model() is base and model.base_model.model is base
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"] and model.base_model.prefix == case.method.prefix
    assert case.method.prefix.rstrip("_") in repr(model).lower()
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


@every_case()
def test_an_adapter_has_the_name_it_was_given(case: Case) -> None:
    model = case.model(adapter="my-adapter")
    assert model.active_adapter == "my-adapter" and list(model.peft_config) == ["my-adapter"]
    mine = [name for name, p in model.named_parameters() if p.requires_grad]
    assert mine and all(".my-adapter." in name for name in mine)
    assert not [name for name, _ in model.named_parameters() if ".default." in name]


@every_case()
def test_names_that_contain_each_other_stay_apart(case: Case, tmp_path: Path) -> None:
    """ "one", "one1" and "1": no name is found by looking for it within another."""
    model, batch = case.model(adapter="one"), case.batch()
    for seed, name in enumerate(("one1", "e1")):
        torch.manual_seed(20 + seed)
        model.add_adapter(name, case.config())
    expected = {}
    for name in model.peft_config:
        model.set_adapter(name)
        expected[name] = predict(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "e1", adapter_name="one1")
    loaded.load_adapter(tmp_path / "one1", adapter_name="e1")
    loaded.load_adapter(tmp_path / "one", adapter_name="one")
    for theirs, mine in (("e1", "one1"), ("one1", "e1"), ("one", "one")):
        loaded.set_adapter(mine)
        assert_equal(predict(loaded, batch), expected[theirs], f"logits of {theirs!r} under the name {mine!r}")
    assert_different(expected["one"], expected["one1"], "logits of two adapters")
    loaded.delete_adapter("e1")
    assert list(loaded.peft_config) == ["one1", "one"]
    assert_equal(
        predict(loaded, batch), expected["one"], "logits after deleting an adapter whose name is in another's"
    )


@every_case()
def test_parts_of_the_model_give_no_adapter_their_name(case: Case) -> None:
    """PEFT would leave their tensors out of the files of all other adapters."""
    base = case.base()
    parts = {part for name, _ in case.model().named_modules() for part in name.split(".") if PROMPT_CHILD in name}
    assert "model" in parts and parts & {"0", "1"}
    for name in ("1", "model", "weight", "attention", "classifier"):
        if name in parts | {"weight"} | {part for path, _ in base.named_modules() for part in path.split(".")}:
            with pytest.raises(ValueError, match="name of a module of the model"):
                case.model(base, adapter=name)
    assert PROMPT_CHILD not in dict(base.named_modules())


def test_another_methods_adapter_may_have_the_same_name() -> None:
    """LoRA's, injected first; both train."""
    case = Case("mept", "bert", "sample", "sdpa")
    base = inject_adapter_in_model(LoraConfig(target_modules=["query"], init_lora_weights=False), case.base())
    lora = predict(base, case.batch())
    model = case.model(base)
    assert_different(predict(model, case.batch()), lora, "logits with LoRA and with prompts besides")
    assert list(model.peft_config) == ["default"]


# -- save and load in all variants ------------------------------------------------------------------------------------


@every_case()
def test_selected_adapters_are_saved_and_no_others(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.add_adapter("other", case.config(**case.method.other))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir() if path.name != "README.md"] == ["other"]
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert {WEIGHTS, "adapter_config.json"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["no-such-adapter"])


@every_case()
def test_only_the_main_process_writes(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").rglob("*.*"))


@every_case()
def test_a_pickled_file_loads_as_a_safe_one_does(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    train(model, batch, 1)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / WEIGHTS).exists()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_equal(predict(loaded, batch), predict(model, batch), "logits of an adapter that was pickled")


@every_case()
def test_a_half_precision_file_loads_into_single_precision(case: Case, tmp_path: Path) -> None:
    model = case.model()
    tensors = {
        name: t.bfloat16() if t.is_floating_point() else t for name, t in get_peft_model_state_dict(model).items()
    }
    model.save_pretrained(tmp_path, state_dict=None)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    for name, tensor in get_peft_model_state_dict(loaded).items():
        assert_equal(tensor, tensors[name].to(tensor.dtype), name)
    assert {p.dtype for p in adapter_parameters(case, loaded).values()} == {torch.float32}


@every_case()
def test_the_same_adapter_loads_twice_under_two_names(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    train(model, batch, 1)
    model.save_pretrained(tmp_path)
    expected = predict(model, batch)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, adapter_name="first")
    loaded.load_adapter(tmp_path, adapter_name="second")
    assert list(loaded.peft_config) == ["first", "second"]
    for name in ("first", "second"):
        loaded.set_adapter(name)
        assert_equal(predict(loaded, batch), expected, f"logits of {name}")


@every_case()
def test_a_trained_adapter_is_loaded_over_a_fresh_one(case: Case, tmp_path: Path) -> None:
    """`load_adapter` under a name that is taken, as the Trainer's load_best_model_at_end does."""
    model, batch = case.model(), case.batch()
    train(model, batch, 2)
    model.save_pretrained(tmp_path)
    fresh = case.model()
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert_equal(predict(fresh.eval(), batch), predict(model, batch), "logits after loading over a fresh adapter")
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trains


@every_case()
def test_an_adapter_loads_where_it_is_told_to(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    model.save_pretrained(tmp_path)
    expected = predict(model, batch)
    for settings in ({"torch_device": "cpu"}, {"device_map": {"": "cpu"}}):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, **settings)
        assert_equal(predict(loaded, batch), expected, f"logits with {settings}")


@every_case()
def test_a_folder_is_known_for_an_adapter(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path / "adapter")
    case.base().save_pretrained(tmp_path / "base")
    assert check_if_peft_model(str(tmp_path / "adapter")) and not check_if_peft_model(str(tmp_path / "base"))


# transformers captures the maps of backbones by hooks that cannot be pickled, with or without an adapter.
@each_case(lambda case: one_per_architecture(case) and not case.architecture.dense)
def test_the_whole_model_can_be_pickled(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_equal(predict(loaded, batch), expected, "logits of a model that was pickled")
    train(loaded, batch, 1)
    assert_equal(predict(model, batch), expected, "logits of the original after training the pickled copy")


# -- without memory for what is loaded over ---------------------------------------------------------------------------


@every_case()
def test_an_adapter_is_made_without_memory_and_filled_later(case: Case) -> None:
    model, batch = case.model(), case.batch()
    train(model, batch, 1)
    tensors = get_peft_model_state_dict(model)
    empty = get_peft_model(case.base(), case.config(), low_cpu_mem_usage=True)
    assert {p.device.type for p in adapter_parameters(case, empty).values()} == {"meta"}
    result = set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert not [name for name, p in empty.named_parameters() if p.is_meta]
    assert_equal(predict(empty.eval(), batch), predict(model, batch), "logits of an adapter made without memory")


@every_case()
def test_an_adapter_is_injected_without_memory(case: Case) -> None:
    base = case.base()
    inject_adapter_in_model(case.config(), base, low_cpu_mem_usage=True)
    assert {p.device.type for p in adapter_parameters(case, base).values()} == {"meta"}
    assert not [name for name, p in base.named_parameters() if p.is_meta and PROMPT_CHILD not in name]


@every_case()
def test_a_second_adapter_is_added_without_memory_and_loaded(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    model.save_pretrained(tmp_path)
    expected = predict(model, batch)
    other = case.model(**case.method.other)
    first = predict(other, batch)
    other.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert_equal(predict(other, batch), first, "logits of the first adapter")
    other.set_adapter("second")
    assert_equal(predict(other, batch), expected, "logits of the second adapter")


# -- training ---------------------------------------------------------------------------------------------------------


@every_case()
def test_preparation_for_quantised_training_changes_nothing_that_matters(case: Case) -> None:
    """PEFT casts, freezes and switches checkpointing on; prompts then train as they would."""
    batch = case.batch()
    _, expected = gradients(case.model(), batch)
    base = prepare_model_for_kbit_training(case.base(), use_gradient_checkpointing=False)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    _, found = gradients(case.model(base), batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@every_case()
def test_an_adapter_follows_a_half_precision_model_if_told_to(case: Case) -> None:
    base = case.base().to(torch.bfloat16)
    torch.manual_seed(1)
    model = get_peft_model(base, case.config(), autocast_adapter_dtype=False)
    # Those of pMoE's further experts follow the experts.
    mine = {name: p for name, p in adapter_parameters(case, model).items() if ".shared." not in name}
    assert {p.dtype for p in mine.values()} == {torch.bfloat16}
    assert torch.isfinite(predict(model.eval(), case.batch())).all()
    loss, found = gradients(model, case.batch())
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in found.values())


@every_case()
def test_an_adapter_for_inference_does_not_train(case: Case) -> None:
    model = case.model(inference_mode=True)
    assert not [name for name, p in adapter_parameters(case, model).items() if p.requires_grad]
    model.add_adapter("other", case.config(**case.method.other))
    model.set_adapter("other")
    assert all(p.requires_grad for p in adapter_parameters(case, model, "other").values())
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in adapter_parameters(case, model, "other").values())


@every_case()
def test_gradients_can_be_asked_for_by_adapter(case: Case) -> None:
    model = case.model()
    model.add_adapter("other", case.config(**case.method.other))

    def wanted(adapter: str) -> set[bool]:
        return {p.requires_grad for p in adapter_parameters(case, model, adapter).values()}

    assert (wanted("default"), wanted("other")) == ({True}, {False})
    model.set_requires_grad("other")
    assert (wanted("default"), wanted("other")) == ({True}, {True})
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert (wanted("default"), wanted("other")) == ({False}, {False})


# -- delete -----------------------------------------------------------------------------------------------------------


@every_case()
def test_deleting_the_active_adapter_makes_another_active(case: Case) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    model.add_adapter("other", case.config(**case.method.other))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="other"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert_equal(predict(model, batch), expected, "logits of the adapter that is left")
    assert all(p.requires_grad for p in adapter_parameters(case, model).values())
    with pytest.raises(ValueError, match="no-such-adapter"):
        model.delete_adapter("no-such-adapter")


@every_case()
def test_without_adapters_the_base_model_answers(case: Case) -> None:
    batch = case.batch()
    expected = predict(case.base(), batch)
    model = case.model()
    model.delete_adapter("default")
    assert not model.peft_config and not adapter_parameters(case, model)
    # PEFT's own wrapper cannot be called without an adapter.
    assert_equal(predict(model.base_model.model, batch), expected, "logits after the last adapter was deleted")
    base = model.base_model.unload()
    assert not [name for name, _ in base.named_modules() if PROMPT_CHILD in name]
    assert_equal(predict(base, batch), expected, "logits of the unloaded model")


# -- generate ---------------------------------------------------------------------------------------------------------


@each_case(lambda case: case.architecture.generates and one_per_architecture(case))
def test_generate_takes_ids_by_position(case: Case) -> None:
    model, batch = case.model(), case.prompt_only(case.batch((6, 6)))
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(input_ids=batch["input_ids"], **settings)
    if case.is_causal_lm:
        assert model.generate(batch["input_ids"], **settings).tolist() == expected.tolist()
    else:  # PEFT takes keywords only for encoder-decoders
        with pytest.raises(TypeError, match="positional"):
            model.generate(batch["input_ids"], **settings)


@each_case(lambda case: case.architecture.generates and one_per_architecture(case))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_generate_runs_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    model = case.model(case.base().to(dtype))
    batch = case.prompt_only(case.batch((6, 6)))
    found = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert found.shape[1] == (9 if case.is_causal_lm else 4)


# -- what only some methods of PEFT can -------------------------------------------------------------------------------


@every_case()
def test_what_only_some_methods_can_is_refused(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    expected = predict(model, batch)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(case.base(), case.config(), mixed=True)
    with pytest.raises(ValueError, match="not compatible"):
        PeftMixedModel(case.base(), case.config())
    with pytest.raises((ValueError, NotImplementedError), match="Hotswapping"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    with pytest.raises(ValueError, match="scaling"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(ValueError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert_equal(predict(model, batch), expected, "logits after refusals")
    assert len(prompted_base(model)) > 0


def test_the_files_of_the_record_are_safe(tmp_path: Path) -> None:
    """The default of `save_pretrained` is safetensors."""
    case = Case("mept", "bert", "sample", "sdpa")
    case.model().save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS) and not list(tmp_path.glob("*.bin"))
