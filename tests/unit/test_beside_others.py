# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT's other methods in the same model: what is done to them passes our layers by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_promptmoe import MEPTConfig, PMoEConfig, VAPTConfig
from peft_promptmoe.adapter_state import AdapterState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SIZES)), {"pixel_values": pixels}


def pmoe() -> PMoEConfig:
    return PMoEConfig(
        experts=[Dinov2Model(Dinov2Config(image_size=32, patch_size=8, **SIZES))],
        modules_to_save=[],
        num_virtual_tokens=2,
    )


OURS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "mept": (llama, lambda: MEPTConfig(num_virtual_tokens=2, init_weights=False)),
    # a projector that all layers share is a layer to PEFT, too
    "vapt": (vit, lambda: VAPTConfig(num_virtual_tokens=2, init_weights=False, modules_to_save=[])),
    "pmoe": (vit, pmoe),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
}


def both(ours: str, other: str, prompts_first: bool) -> tuple[Any, dict[str, Tensor]]:
    """A model of another method's adapter "other" with prompts "ours" in it, each active under its own name."""
    torch.manual_seed(0)
    make, config = OURS[ours]
    model, batch = make()
    if prompts_first:
        inject_adapter_in_model(config(), model, adapter_name="ours")
    model = get_peft_model(model, OTHERS[other](), adapter_name="other")
    if not prompts_first:
        inject_adapter_in_model(config(), model.base_model.model, adapter_name="ours")
    for module in model.modules():
        if hasattr(module, "_active_adapter"):
            module._active_adapter = ["ours" if isinstance(module, AdapterState) else "other"]
    return model.eval(), batch


@pytest.mark.parametrize("prompts_first", [True, False], ids=["prompts-first", "prompts-last"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("ours", OURS)
@torch.no_grad()
def test_another_methods_merge_passes_by(ours: str, other: str, prompts_first: bool) -> None:
    model, batch = both(ours, other, prompts_first)
    expected = model(**batch).logits
    theirs = [m for m in model.modules() if hasattr(m, "merged_adapters") and not isinstance(m, AdapterState)]
    model.merge_adapter()
    assert theirs and all(module.merged for module in theirs)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert not any(module.merged for module in theirs)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, AdapterState) for module in merged.modules())


@pytest.mark.parametrize("way", ["merge_adapter", "unmerge_adapter", "merge_and_unload"])
def test_prompts_are_not_merged_and_nothing_beside_them_is(way: str) -> None:
    torch.manual_seed(0)
    base, batch = llama()
    inject_adapter_in_model(OTHERS["lora"](), base, adapter_name="other")
    model = get_peft_model(base, MEPTConfig(num_virtual_tokens=2)).eval()
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(ValueError, match="MEPT cannot be merged into the base weights"):
            getattr(model, way)()
        assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))
        assert torch.equal(model(**batch).logits, expected)
