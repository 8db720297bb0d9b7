# SPDX-License-Identifier: Apache-2.0
"""Layers that prompts cannot join are left out with one message where others can be joined, else refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def made(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model.double().eval()


def shared_keys(kind: str) -> Any:
    """Gemma with as many layers that have keys as take them from others."""
    names = {
        "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig"),
        "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig"),
    }
    model, config = names[kind]
    settings = TEXT | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    }
    if kind == "gemma3n":
        settings |= {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4, "head_dim": 16}
    else:
        settings |= {"global_head_dim": 16}  # not as wide as the layers with windows
    return made(model, getattr(transformers, config)(**settings))


def attach(model: nn.Module, **settings: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        prompted = get_peft_model(model, MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings))
    return prompted.eval(), [str(w.message) for w in caught if "leave out" in str(w.message)]


def names(model: nn.Module) -> list[str]:
    return [layer.site.name for layer in prompt_layers(model)]


@pytest.mark.parametrize("routing", ["token", "sample"])
@pytest.mark.parametrize("kind", ["gemma4", "gemma3n"])
@torch.no_grad()
def test_layers_that_take_keys_of_others_get_no_prompts_and_nothing_leaks(kind: str, routing: str) -> None:
    static = {"num_experts": 1, "num_shared_experts": 0} if routing == "sample" else {}
    prompted, said = attach(shared_keys(kind), routing=routing, init_weights=False, **static)
    assert names(prompted) == [f"model.layers.{index}.self_attn" for index in (0, 1)]
    assert len(said) == 1 and "join 2 attention layers and leave out 2" in said[0] and "of another layer" in said[0]
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 11) % 55 + 5
    assert torch.equal(prompted(input_ids=ids).logits[:, :8], prompted(input_ids=other).logits[:, :8])
    more = prompted.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    again = prompted.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(more, again)


def test_a_layer_that_takes_keys_of_another_is_refused_where_it_is_named() -> None:
    with pytest.raises(ValueError, match="takes those of another layer"):
        attach(shared_keys("gemma4"), target_modules=["self_attn"])


def qwen_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, image_token_id=62, vision_start_token_id=60
    )
    return made("Qwen2VLForConditionalGeneration", config)


def qwen_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2, 12), generator=generator)
    ids[:, 2:6] = 62
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator).double()
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 62).long()}


@torch.no_grad()
def test_a_vision_tower_is_skipped_and_images_work(tmp_path: Any) -> None:
    model, inputs = qwen_vl(), qwen_inputs()
    base = model(**inputs).logits
    prompted, said = attach(model, routing="token")
    assert len(said) == 1 and "visual.blocks.*.attn" in said[0] and "cu_seqlens" in said[0]
    assert all("language_model" in name for name in names(prompted)) and len(names(prompted)) == 2
    got = prompted(**inputs).logits
    assert (got - base).abs().max() > 1e-3
    with prompted.disable_adapter():
        assert torch.equal(prompted(**inputs).logits, base)
    prompted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is left out was said when the adapter was made
        warnings.filterwarnings("ignore", ".*generic rule")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        loaded = PeftModel.from_pretrained(qwen_vl(), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, got)
    assert torch.equal(prompted.unload()(**inputs).logits, base)


def git_model() -> Any:
    vision = VISION | {"num_channels": 3}
    settings = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
    return made("GitForCausalLM", transformers.GitConfig(**settings, vision_config=vision))


def test_a_language_model_of_which_only_the_image_tower_is_reached_is_refused() -> None:
    model = git_model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no layer of its language model"):
        attach(model)
    assert [name for name, _ in model.named_modules()] == before
    prompted, _ = attach(model, target_modules=r".*image_encoder.*self_attn", routing="sample")
    assert len(names(prompted)) == 2


@pytest.mark.parametrize("kind", ["whisper", "umt5"])
def test_an_encoder_with_a_head_of_its_own_is_joined(kind: str) -> None:
    """Their `get_decoder()` gives the model itself, for want of a decoder."""
    if kind == "umt5":
        config = transformers.UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = made("UMT5EncoderModel", config)
    else:
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        audio = {
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        }
        model = made("WhisperForAudioClassification", transformers.WhisperConfig(vocab_size=64, **sizes, **audio))
    prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=3))
    assert len(names(prompted)) == 2 and all("encoder" in name for name in names(prompted))
