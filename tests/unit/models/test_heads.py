# SPDX-License-Identifier: Apache-2.0
"""Names of heads mean what they say, though PEFT goes by endings of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_promptmoe import MEPTConfig, VAPTConfig
from peft_promptmoe.models.heads import apart

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": 32, "patch_size": 8, "num_labels": 3, "num_hidden_layers": 4}


def dpt(cls: Any) -> Any:
    torch.manual_seed(0)
    necks = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return cls(DPTConfig(**SIZES, **IMAGES, **necks, reassemble_factors=[4, 2, 1, 0.5])).eval()


def beit(cls: Any) -> Any:
    torch.manual_seed(0)
    return cls(BeitConfig(**SIZES, **IMAGES, out_indices=[1, 2, 3, 4], pool_scales=[1, 2])).eval()


DENSE = [
    pytest.param(dpt, DPTForDepthEstimation, ["neck", "head.head"], id="depth"),
    pytest.param(dpt, DPTForSemanticSegmentation, ["neck", "head.head", "auxiliary_head.head"], id="segmentation"),
    pytest.param(beit, BeitForSemanticSegmentation, None, id="beit"),
]


@pytest.mark.parametrize("config", [VAPTConfig, MEPTConfig])
@pytest.mark.parametrize(("make", "cls", "heads"), DENSE)
def test_a_head_within_a_head_loads_again(
    make: Any, cls: Any, heads: list[str] | None, config: Any, tmp_path: Path
) -> None:
    model = get_peft_model(make(cls), config(num_virtual_tokens=2))
    found = model.peft_config["default"].modules_to_save
    assert heads is None or found == heads
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        pixels = torch.randn(1, 3, 32, 32)
        expected = model.eval()(pixel_values=pixels)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(cls), tmp_path)(pixel_values=pixels)
    key = "logits" if "logits" in expected else "predicted_depth"
    assert torch.equal(loaded[key], expected[key])
    outside = {name for name, _ in make(cls).named_parameters() if name.startswith(("neck", "head", "decode_head"))}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert outside and all(any(_plain(name) == wanted for name in trained) for wanted in outside)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def test_a_users_own_name_may_be_a_head_within_a_head(tmp_path: Path) -> None:
    settings = {"num_virtual_tokens": 2, "modules_to_save": ["neck", "head"]}
    get_peft_model(dpt(DPTForDepthEstimation), MEPTConfig(**settings)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dpt(DPTForDepthEstimation), tmp_path)
    assert loaded.peft_config["default"].modules_to_save == ["neck", "head.head"]


class Head(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


OWN = {"promptmoe", "mept_router"}


def test_names_that_our_own_modules_end_with_are_whole_paths() -> None:
    model = Head(block=Head(router=nn.Linear(2, 2)), other=nn.Linear(2, 2))
    assert apart(model, ["router", "other"], OWN) == ["block.router", "other"]


def test_names_that_are_already_apart_stay() -> None:
    model = Head(body=Head(norm=nn.LayerNorm(2)), norm=nn.LayerNorm(2), head=Head(first=nn.Linear(2, 2)))
    assert apart(model, ["norm", "head", "norm"], OWN) == ["norm", "head"]


def test_only_the_outer_one_is_taken_apart() -> None:
    inner = Head(head=nn.Linear(2, 2), pool=nn.Linear(2, 2), act=nn.ReLU())
    model = Head(head=inner, other_head=nn.Linear(2, 2))
    # By its path "other_head" is one of those that the ending "head" takes.
    assert apart(model, ["head"], OWN) == ["head.head", "head.pool", "other_head"]


def test_a_head_with_weights_beside_a_head_is_refused() -> None:
    inner = Head(head=nn.Linear(2, 2))
    inner.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"matches every module whose path ends.*'head' and also a part of it"):
        apart(Head(head=inner), ["head"], OWN)


@pytest.mark.parametrize("name", ["norm", "layernorm"])
def test_an_ending_that_also_takes_what_prompts_pass_through_is_refused(name: str) -> None:
    """ "norm" is the last norm and, for PEFT, every `input_layernorm`."""
    base: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, num_key_value_heads=1, num_hidden_layers=2, **SIZES)
    )
    with pytest.raises(
        ValueError, match=rf"modules_to_save='{name}'.*ends with this name, also 'model.layers.0.input_layernorm'"
    ):
        get_peft_model(base, MEPTConfig(num_virtual_tokens=2, modules_to_save=[name]))
    assert get_peft_model(base, MEPTConfig(num_virtual_tokens=2, modules_to_save=["model.norm"]))


@pytest.mark.parametrize("saved", [["shared"], ["lm_head"]])
def test_what_a_model_calls_as_we_do(saved: list[str], tmp_path: Path) -> None:
    """T5's embeddings are "shared"."""

    def t5() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))

    model = get_peft_model(t5(), MEPTConfig(num_virtual_tokens=2, modules_to_save=saved)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(t5(), tmp_path)
    inputs = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": torch.tensor([[0, 5]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    model.unload()


def test_routers_of_the_base_model_may_train_along(tmp_path: Path) -> None:
    """Prompts have routers, too, which the same ending would take."""

    def mixture() -> SwitchTransformersForConditionalGeneration:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
        sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
        return SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(vocab_size=20, num_experts=2, decoder_start_token_id=0, **sizes, **sparse)
        )

    config = MEPTConfig(num_virtual_tokens=2, modules_to_save=["router"], decoder_sees_prompts=False)
    model = get_peft_model(mixture(), config)
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and ".mlp.router.modules_to_save" in name
    ]
    assert trained and any("mept_router.default" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(mixture(), tmp_path)
