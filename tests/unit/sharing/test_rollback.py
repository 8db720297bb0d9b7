# SPDX-License-Identifier: Apache-2.0
"""What a model is after a refused file, and after unloading, where it had more than one head or method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from peft_promptmoe import MEPTConfig

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.tensor([[3, 4, 5, 6]])
FILE = "adapter_model.safetensors"


def bart() -> Any:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART.items()}
    return BartForSequenceClassification(BartConfig(vocab_size=20, d_model=16, max_position_embeddings=32, **sizes))


_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForSequenceClassification(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))


HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(vocab_size=20, **SIZES)),
        {"task_type": "SEQ_CLS"},
    ),
    "electra": (
        lambda: ElectraForSequenceClassification(ElectraConfig(vocab_size=20, **SIZES)),
        {"task_type": "SEQ_CLS"},
    ),
    "bart": (bart, {"task_type": "SEQ_CLS"}),
    "t5": (t5, {"task_type": "SEQ_CLS"}),
    "pooler": (
        lambda: BertModel(BertConfig(vocab_size=20, **SIZES)),
        {"task_type": "FEATURE_EXTRACTION", "modules_to_save": ["pooler"]},
    ),
    "language_model": (
        lambda: RobertaForCausalLM(RobertaConfig(vocab_size=20, is_decoder=True, **SIZES)),
        {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"], "routing": "sample"},
    ),
}


def census(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
        "active": {name: getattr(module, "_active_adapter", None) for name, module in model.named_modules()},
        "marks": sorted(vars(model)),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for what, value in expected.items():
        if what == "tensors":
            assert found[what].keys() == value.keys()
            assert all(torch.equal(tensor, value[name]) for name, tensor in found[what].items())
        elif what not in but:
            assert found[what] == value, what


@pytest.mark.parametrize("name", HEADS)
def test_unloading_a_head_of_several_layers(name: str) -> None:
    make, settings = HEADS[name]
    torch.manual_seed(0)
    base = make()
    before = census(base)
    model = get_peft_model(base, MEPTConfig(num_virtual_tokens=2, **settings))
    assert census(base)["types"] != before["types"]
    assert model.unload() is base
    assert_same(census(base), before, but=("trains",))  # as of PEFT's own methods, what was frozen stays so


@pytest.mark.parametrize("entry", ["peft", "second", "transformers"])
@pytest.mark.parametrize("name", HEADS)
def test_a_damaged_file_for_a_head_of_several_layers(name: str, entry: str, tmp_path: Path) -> None:
    """The error is the file's own, and the model is what it was."""
    make, settings = HEADS[name]
    get_peft_model(make(), MEPTConfig(num_virtual_tokens=2, **settings)).save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"damaged")
    base = make()
    model = get_peft_model(base, MEPTConfig(num_virtual_tokens=3, **settings)) if entry == "second" else base
    before = census(base)
    with pytest.raises((SafetensorError, OSError), match=r"(?i)header|safetensors|deserializ"):
        if entry == "peft":
            PeftModel.from_pretrained(base, tmp_path)
        else:
            model.load_adapter(tmp_path, adapter_name="second")
    assert_same(census(base), before)


# -- other methods' adapters in the model -----------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **SIZES))


def lora(name: str) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    return get_peft_model(llama(), config, adapter_name=name).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("names", [("lora", "prompts"), ("default", "default")], ids=["two-names", "one-name"])
def test_a_refused_file_on_top_of_lora(names: tuple[str, str], tmp_path: Path) -> None:
    model = get_peft_model(lora(names[0]), MEPTConfig(num_virtual_tokens=2), adapter_name=names[1])
    model.save_pretrained(tmp_path)
    folder = tmp_path if names[1] == "default" else tmp_path / names[1]
    (folder / FILE).write_bytes(b"damaged")
    beneath = lora(names[0])
    expected, before, config = logits(beneath), census(beneath), beneath.peft_config[names[0]]
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(beneath, folder, adapter_name=names[1])
    assert_same(census(beneath), before)
    assert beneath.peft_config == {names[0]: config}
    assert torch.equal(logits(beneath), expected)


@pytest.mark.parametrize("names", [("lora", "prompts"), ("default", "default")], ids=["two-names", "one-name"])
def test_unloading_prompts_gives_back_the_lora_beneath(names: tuple[str, str]) -> None:
    beneath = lora(names[0])
    expected, before, config = logits(beneath), census(beneath), beneath.peft_config[names[0]]
    model = get_peft_model(beneath, MEPTConfig(num_virtual_tokens=2), adapter_name=names[1])
    assert model.unload() is beneath
    assert_same(census(beneath), before, but=("active", "trains"))
    assert beneath.peft_config == {names[0]: config} and beneath.active_adapters == [names[0]]
    assert torch.equal(logits(beneath), expected)
