# SPDX-License-Identifier: Apache-2.0
"""For every family of the table: projecting prompt rows directly equals running the attention layer on them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from peft import get_peft_model
from tiny import FAMILIES, make_model
from tiny import Family as Builder
from torch import Tensor

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.positions import Positions, first_position, row_positions
from peft_promptmoe.engine.projection import harvest, project_directly
from peft_promptmoe.models.families import FAMILIES as TABLE
from peft_promptmoe.models.families import TIMM_FAMILIES, VISION_FAMILIES

P, TOKENS = 5, 7

_bert = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
_small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def _other(model: str, config: str, **settings: Any) -> Builder:
    def build(attn_implementation: str) -> Any:
        made = getattr(transformers, config)(attn_implementation=attn_implementation, **settings)
        return getattr(transformers, model)(made)

    return Builder(build, FAMILIES["bert"].oracle, "FEATURE_EXTRACTION", True)


MODELS = {
    "bert": FAMILIES["bert"],
    "roberta": _other("RobertaModel", "RobertaConfig", **_bert, **_small),
    "distilbert": _other("DistilBertModel", "DistilBertConfig", **_bert, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    "modernbert": _other("ModernBertModel", "ModernBertConfig", **_bert, **_small, local_attention=4),
    "t5": FAMILIES["t5_sees"],
    "bart": FAMILIES["bart"],
    "whisper": _other(
        "WhisperForAudioClassification",
        "WhisperConfig",
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
    ),
    "gpt2": FAMILIES["gpt2"],
    "llama": FAMILIES["llama"],
    "mistral": _other(
        "MistralForCausalLM", "MistralConfig", **_bert, **_small, num_key_value_heads=2, sliding_window=4
    ),
    "qwen3": FAMILIES["qwen3"],
    "gemma3_text": FAMILIES["gemma3"],
}


NOWHERE = Positions()


def layer_positions(layer: Any, hidden: Tensor) -> Positions:
    """Positions of P rows before a text that starts in another column for each sample."""
    site = layer.site
    if site.rotary is None:
        return NOWHERE
    kind = {"layer_type": site.rotary_type} if site.rotary_type else {}
    given = site.rotary(hidden, torch.arange(TOKENS)[None], **kind)
    at = first_position(site, {"position_embeddings": given}, torch.tensor([0, 3]))
    return row_positions(site, at, torch.arange(-P, 0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_direct_is_harvest(name: str, implementation: str) -> None:
    model = make_model(MODELS[name], implementation)
    prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=P, routing="sample"))
    layers = prompt_layers(prompted)
    assert len(layers) == 3
    for layer in layers:
        assert layer.site.family is TABLE[name]
        normed = torch.randn(2, P, layer.site.width, dtype=torch.float64)
        positions = layer_positions(layer, torch.zeros(2, TOKENS, layer.site.width, dtype=torch.float64))
        assert (positions.cos is None) == (name in ("bert", "roberta", "distilbert", "t5", "bart", "whisper", "gpt2"))
        direct = project_directly(layer.site, normed, positions)
        reference = harvest(layer.site, normed, positions)
        assert direct.key.shape == reference.key.shape and direct.key.abs().max() > 0.1
        torch.testing.assert_close(direct.key, reference.key, rtol=0, atol=1e-12)
        torch.testing.assert_close(direct.value, reference.value, rtol=0, atol=1e-12)


def test_every_family_is_here() -> None:
    assert MODELS.keys() == {name for name, family in TABLE.items() if family.own is None}


# SigLIP's layers hand on no argument by which to stop them at the kernel, and DINOv3's cannot run on rows without a
# place in the image: these two are compared block by block only. The rest compute attention their own way.
VISION = sorted(VISION_FAMILIES.keys() - {"siglip_vision_model", "dinov3_vit", "videomae", "eomt", "vjepa2"})


def make_vision_model(name: str) -> Any:
    torch.manual_seed(0)
    if name not in VISION_FAMILIES:
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
        return timm.create_model("vit_tiny_patch16_224", qk_norm=True, **settings).eval().double()
    config = transformers.AutoConfig.for_model(name, **_small, image_size=32, patch_size=8)
    return transformers.AutoModel.from_config(config).eval().double()


@pytest.mark.parametrize("name", [*VISION, "timm.layers.attention.Attention"])
def test_direct_is_harvest_for_images(name: str) -> None:
    prompted = get_peft_model(make_vision_model(name), MEPTConfig(num_virtual_tokens=P, routing="sample"))
    layers = prompt_layers(prompted)
    assert len(layers) == 3
    for layer in layers:
        assert layer.site.family is (VISION_FAMILIES | TIMM_FAMILIES)[name] and layer.site.family.direct
        normed = torch.randn(2, P, layer.site.width, dtype=torch.float64)
        direct, reference = project_directly(layer.site, normed, NOWHERE), harvest(layer.site, normed, NOWHERE)
        assert direct.key.shape == reference.key.shape and direct.key.abs().max() > 0.05
        torch.testing.assert_close(direct.key, reference.key, rtol=0, atol=1e-12)
        torch.testing.assert_close(direct.value, reference.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["modernbert", "gpt2"])
def test_a_wrapped_fused_projection_is_asked_itself(name: str) -> None:
    model = make_model(MODELS[name], "sdpa")
    layer = prompt_layers(get_peft_model(model, MEPTConfig(num_virtual_tokens=P, routing="sample")))[0]
    normed = torch.randn(2, P, layer.site.width, dtype=torch.float64)
    positions = layer_positions(layer, torch.zeros(2, TOKENS, layer.site.width, dtype=torch.float64))
    plain = project_directly(layer.site, normed, positions)
    fused = layer.site.family.fused

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    setattr(layer.site.attention, fused, Wrapped(getattr(layer.site.attention, fused)))
    wrapped = project_directly(layer.site, normed, positions)
    torch.testing.assert_close(wrapped.key, plain.key, rtol=0, atol=1e-12)
    torch.testing.assert_close(wrapped.value, plain.value, rtol=0, atol=1e-12)
