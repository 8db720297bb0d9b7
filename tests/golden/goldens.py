# SPDX-License-Identifier: Apache-2.0
"""Adapters that every later version must load with the outputs that were written down with them.

Base models are on record, too, as checkpoints: those are what users have and what transformers and timm keep loading,
whatever their modules are called in memory. Weights and inputs come from whole numbers and one division, so they are
the same bits on every machine and with every version of torch. Outputs are computed in float64, where the order of
sums shows far below the tolerance.

    python tests/golden/goldens.py

records the adapters of the installed version, and does so once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import peft_promptmoe
from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig

HERE = Path(__file__).parent
BASES, WEIGHTS, OUTPUTS = "bases", "model.safetensors", "outputs.safetensors"
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def numbers(count: int, offset: int) -> Tensor:
    """(count,) float64 between -1 and 1, without pattern to a sum."""
    index = torch.arange(count, dtype=torch.int64) + 1 + 7919 * offset
    return ((index * index * 31 + index * 1009) % 4001 - 2000).double() / 2000.0


@torch.no_grad()
def fill(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Give a model's parameters the numbers; gains and biases stay near what they are made with.

    Router centres were no parameters when 0.1.0 was recorded, and stay at zero.
    """
    named = sorted(item for item in model.named_parameters() if "router_center" not in item[0])
    for offset, (name, weight) in enumerate(named):
        if wanted(name):
            values = numbers(weight.numel(), offset).view(weight.shape)
            if weight.ndim == 1:
                weight.copy_(weight.double().round() + 0.1 * values)
            else:
                weight.copy_(0.4 * values)
    return model.eval()


def ids(rows: int = 2, length: int = 6) -> Tensor:
    return ((numbers(rows * length, 5).abs() * 1000).long() % 18 + 2).view(rows, length)


def pixels() -> Tensor:
    return numbers(2 * 3 * 16 * 16, 3).view(2, 3, 16, 16)


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=3, **SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES))


def expert() -> nn.Module:
    sizes = SIZES | {"hidden_size": 12, "num_hidden_layers": 3}
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False)


def timm_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


MODELS: dict[str, Callable[[], nn.Module]] = {make.__name__: make for make in (bert, llama, t5, vit, expert, timm_vit)}


def save_model(name: str, target: Path) -> None:
    model: Any = fill(MODELS[name]())
    if name == "timm_vit":
        target.mkdir(parents=True)
        save_file(model.state_dict(), target / WEIGHTS)
    else:
        model.save_pretrained(target)


def load_model(name: str, folder: Path) -> nn.Module:
    if name == "timm_vit":
        model = timm_vit()
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()
    more = {"add_pooling_layer": False} if name == "expert" else {}
    model = type(MODELS[name]()).from_pretrained(folder, **more)  # type: ignore[attr-defined]
    vars(model).pop("name_or_path", None)  # a place on this machine, which adapters would write down
    return model.eval()


@dataclass
class Golden:
    """One adapter on record.

    Attributes:
        base: name of the base model.
        config: makes the adapter's config.
        inputs: of the model.
        settings: arguments of the config.
        experts: names of the backbones that are handed over with the adapter.
    """

    base: str
    config: Any
    inputs: Callable[[], dict[str, Tensor]]
    settings: dict[str, Any]
    experts: tuple[str, ...] = ()

    def make(self, bases: Path) -> PeftModel:
        """A fresh adapter with numbers in it, also where training would begin at zero."""
        experts = {"experts": [load_model(name, bases / name) for name in self.experts]} if self.experts else {}
        model = get_peft_model(load_model(self.base, bases / self.base), self.config(**self.settings, **experts))
        fill(model, lambda name: "promptmoe" in name or "modules_to_save" in name)
        return model

    def load(self, folder: Path) -> PeftModel:
        bases = folder.parent / BASES
        config = self.config.from_pretrained(folder)
        if self.experts:
            config.experts = [load_model(name, bases / name) for name in self.experts]
        return PeftModel.from_pretrained(load_model(self.base, bases / self.base), folder, config=config).eval()

    @torch.no_grad()
    def outputs(self, model: PeftModel) -> Tensor:
        """Logits in float64."""
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs().items()}
        if self.base == "timm_vit":
            return model.double()(inputs["pixel_values"])
        return model.double()(**inputs).logits


def text(**more: Any) -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids(), "attention_mask": mask} | more


def images() -> dict[str, Tensor]:
    return {"pixel_values": pixels()}


_MEPT = {"num_virtual_tokens": 2, "num_experts": 3, "top_k": 2}
_PROMOTION = {"num_prototypes": 3, "bottleneck_dim": 4, "sinkhorn_eps": 0.25}
_VAPT = {"num_virtual_tokens": 2, "bottleneck_dim": 2, "projector_scale": 1.0}

GOLDENS: dict[str, Golden] = {
    "mept_sample": Golden("bert", MEPTConfig, text, _MEPT | {"task_type": "SEQ_CLS", "router_centering": True}),
    "mept_token": Golden("llama", MEPTConfig, text, _MEPT | {"task_type": "CAUSAL_LM"}),
    "mept_decoder_sees": Golden(
        "t5", MEPTConfig, lambda: text(decoder_input_ids=ids(2, 4)), _MEPT | {"task_type": "SEQ_2_SEQ_LM"}
    ),
    "vapt_adaptive": Golden("vit", VAPTConfig, images, _VAPT | {"learnable_scale": True}),
    "vapt_adaptive_timm": Golden("timm_vit", VAPTConfig, images, _VAPT | {"share_projector": False}),
    "vapt_deep": Golden("vit", VAPTConfig, images, _VAPT | {"num_static_layers": "all"}),
    "pmoe_token": Golden("vit", PMoEConfig, images, {"num_virtual_tokens": 2}, ("expert",)),
    "pmoe_attention": Golden(
        "vit", PMoEConfig, images, {"num_virtual_tokens": 2, "dispatcher": "attention"}, ("expert",)
    ),
    # Of this classifier's last block nobody reads the patches.
    "promotion_bank": Golden("vit", ProMotionConfig, images, _PROMOTION | {"layers_to_transform": [0]}),
    "promotion_pool": Golden(
        "vit",
        ProMotionConfig,
        images,
        {"num_prototypes": 4, "bottleneck_dim": 4, "proposal": "pool", "num_heads": 2, "layers_to_transform": [0]},
    ),
}


def record(version: str) -> None:
    """Write all adapters of this version, or none.

    Raises:
        SystemExit: there are some already.
    """
    target = HERE / version
    if target.exists():
        raise SystemExit(f"{target} is on record and stays as it is; a new version gets a folder of its own.")
    for name in MODELS:
        save_model(name, target / BASES / name)
    for name, golden in GOLDENS.items():
        model, folder = golden.make(target / BASES).eval(), target / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        save_file({"logits": golden.outputs(model)}, folder / OUTPUTS)


if __name__ == "__main__":
    record(peft_promptmoe.__version__)
    sys.stdout.write(f"recorded {len(GOLDENS)} adapters\n")
