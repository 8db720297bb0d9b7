# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter`: static prompts side by side, weighted in attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, predict
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig, export_prefix

STATIC: dict[str, Any] = {"num_virtual_tokens": 3, "num_experts": 1, "init_weights": False}
NAMES = ["llama", "gpt2", "bert", "t5", "bloom", "mistral", "gemma3", "vit"]


def static(**settings: Any) -> MEPTConfig:
    return MEPTConfig(**STATIC | {"decoder_sees_prompts": False, "modules_to_save": []} | settings)


def three(name: str, kernel: str = "sdpa", **settings: Any) -> PeftModel:
    """A model with adapters "a", its copy "same" and "b"."""
    case = Case("mept", name, "token" if Case("mept", name, "token", "sdpa").is_causal_lm else "sample", kernel)
    torch.manual_seed(1)
    model = get_peft_model(case.base(), static(**settings), adapter_name="a")
    for other in ("same", "b"):
        model.add_adapter(other, static(**settings))
    tensors = dict(model.named_parameters())
    for path, tensor in tensors.items():
        if ".same." in path:
            tensor.data.copy_(tensors[path.replace(".same.", ".a.")])
    return model.eval()


def batch_of(name: str) -> dict[str, Tensor]:
    case = Case("mept", name, "token" if name in ("llama", "gpt2", "bloom", "mistral", "gemma3") else "sample", "sdpa")
    return case.batch()


def active(model: PeftModel, *names: str) -> PeftModel:
    model.base_model.set_adapter(list(names))
    return model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_says_how_often_rows_count(name: str, kernel: str) -> None:
    model, batch = three(name, kernel), batch_of(name)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "once")
    model.add_weighted_adapter(["a", "b"], [2.0, 1.0], "twice")
    model.add_weighted_adapter(["a", "same"], [0.5, 0.5], "halves")
    model.add_weighted_adapter(["twice", "b"], [1.0, 1.0], "nested")
    for combined, parts in {
        "once": ("a", "b"),
        "twice": ("a", "same", "b"),
        "halves": ("a",),
    }.items():
        expected = predict(active(model, *parts), batch)
        torch.testing.assert_close(predict(active(model, combined), batch), expected, rtol=1e-4, atol=2e-5)
    twice, nested = predict(active(model, "twice"), batch), predict(active(model, "nested"), batch)
    assert (nested - twice).abs().max() > 1e-4
    assert (twice - predict(active(model, "once"), batch)).abs().max() > 1e-4


@pytest.mark.parametrize("settings", [{"routing": "sample"}, {"routing": "token"}], ids=["sample", "token"])
def test_shared_experts_are_among_the_prompts(settings: dict[str, Any]) -> None:
    model, batch = three("llama", num_shared_experts=2, **settings), batch_of("llama")
    model.add_weighted_adapter(["a", "b"], [2.0, 1.0], "both")
    expected = predict(active(model, "a", "same", "b"), batch)
    torch.testing.assert_close(predict(active(model, "both"), batch), expected, rtol=1e-4, atol=2e-5)


def test_a_combination_generates_saves_loads_and_trains(tmp_path: Path) -> None:
    model = three("llama")
    model.add_weighted_adapter(["a", "b"], [2.0, 0.3], "both")
    model.set_adapter("both")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids > 0).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(written, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings))
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(Case("mept", "llama", "token", "sdpa").base(), tmp_path / "both")
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    given = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert given and all(".both." in path and bool(gradient.abs().max() > 0) for path, gradient in given.items())
    with pytest.raises(ValueError, match="its prompts have weights"):
        export_prefix(model, tmp_path / "prefix")


def routed(model: PeftModel) -> None:
    model.add_adapter("routed", static(num_experts=2))


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (routed, (["a", "routed"], [1.0, 1.0], "new"), "routers cannot be combined"),
        (None, (["a", "b"], [1.0], "new"), "Pass one weight per adapter"),
        (None, (["a", "a"], [1.0, 1.0], "new"), "different adapters"),
        (None, (["a", "b"], [1.0, 0.0], "new"), "weights must be greater than 0"),
        (None, (["a", "b"], [1.0, -1.0], "new"), "weights must be greater than 0"),
        (None, (["a", "b"], [1.0, 1.0], "a"), "already"),
        (None, (["a", "other"], [1.0, 1.0], "new"), "no adapter 'other'"),
        (None, (["a", "b"], [1.0, 1.0], "new", "linear"), "combination_type must be 'cat'"),
        (
            lambda model: model.add_adapter("c", static(num_virtual_tokens=2)),
            (["a", "c"], [1.0, 1.0], "new"),
            "different values of num_virtual_tokens",
        ),
        (
            lambda model: model.add_adapter("c", static(prompt_positions="unrotated")),
            (["a", "c"], [1.0, 1.0], "new"),
            "different values of prompt_positions",
        ),
        (
            lambda model: model.add_adapter("c", static(layers_to_transform=[0])),
            (["a", "c"], [1.0, 1.0], "new"),
            "in different layers",
        ),
        (
            lambda model: model.add_adapter("c", static(modules_to_save=["lm_head"])),
            (["a", "c"], [1.0, 1.0], "new"),
            "saved modules",
        ),
    ],
    ids=[
        *("routed", "weights", "one-twice", "zero", "negative", "taken", "missing", "linear"),
        *("lengths", "positions", "layers", "heads"),
    ],
)
def test_what_one_adapter_cannot_stand_for_is_refused(prepare: Any, arguments: tuple[Any, ...], message: str) -> None:
    model = three("llama")
    if prepare is not None:
        prepare(model)
    before = {name for name, _ in model.named_modules()}
    with pytest.raises((ValueError, TypeError), match=message):
        model.add_weighted_adapter(*arguments)
    assert {name for name, _ in model.named_modules()} == before
    assert "new" not in model.peft_config


def test_prompts_that_a_decoder_sees_have_no_weights() -> None:
    model: nn.Module = three("t5", decoder_sees_prompts=True)
    with pytest.raises(ValueError, match="as tokens"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
