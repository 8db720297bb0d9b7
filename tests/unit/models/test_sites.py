# SPDX-License-Identifier: Apache-2.0
"""The table finds the layers, norms and rotary types it should; targets that cannot work are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers
from peft import get_peft_model
from torch import nn

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.models.families import FAMILIES
from peft_promptmoe.models.inspection import calls_in_order, passes_on_keywords

_LM: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
_BERT: dict[str, Any] = {name: value for name, value in _LM.items() if name != "num_key_value_heads"}
_BART: dict[str, Any] = {
    "vocab_size": 20,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
_T5: dict[str, Any] = {
    "vocab_size": 20,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Expected:
    """What the table must find in a model of three layers; `{i}` stands for the layer's number."""

    model: str
    config: str
    settings: dict[str, Any]
    attention: str
    norm: str | None
    rotary: str | None = None
    rotary_types: tuple[str | None, ...] = (None, None, None)
    causal: bool = False
    by_token: bool = False
    bias_owner: str | None = None
    knows_input_spread: bool = False
    first_norm: str | None = field(default="same")


EXPECTED: dict[str, Expected] = {
    "bert": Expected(
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
        "bert.encoder.layer.{i}.attention.self",
        None,
        knows_input_spread=True,
    ),
    "roberta": Expected(
        "RobertaForTokenClassification",
        "RobertaConfig",
        _BERT,
        "roberta.encoder.layer.{i}.attention.self",
        None,
        knows_input_spread=True,
    ),
    "distilbert": Expected(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 20, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16},
        "distilbert.transformer.layer.{i}.attention",
        None,
        knows_input_spread=True,
    ),
    "modernbert": Expected(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _BERT | {"local_attention": 4, "global_attn_every_n_layers": 3},
        "model.layers.{i}.attn",
        "model.layers.{i}.attn_norm",
        "model.rotary_emb",
        ("full_attention", "sliding_attention", "sliding_attention"),
        first_norm="Identity",
    ),
    "t5": Expected(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        "encoder.block.{i}.layer.0.SelfAttention",
        "encoder.block.{i}.layer.0.layer_norm",
        bias_owner="encoder.block.0.layer.0.SelfAttention",
    ),
    "whisper": Expected(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _BART | {"pad_token_id": 0},
        "model.encoder.layers.{i}.self_attn",
        "model.encoder.layers.{i}.self_attn_layer_norm",
    ),
    "bart": Expected(
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
        "model.encoder.layers.{i}.self_attn",
        None,
        knows_input_spread=True,
    ),
    "gpt2": Expected(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 20, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16},
        "transformer.h.{i}.attn",
        "transformer.h.{i}.ln_1",
        causal=True,
        by_token=True,
    ),
    "llama": Expected(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LM,
        "model.layers.{i}.self_attn",
        "model.layers.{i}.input_layernorm",
        "model.rotary_emb",
        causal=True,
        by_token=True,
    ),
    "mistral": Expected(
        "MistralForSequenceClassification",
        "MistralConfig",
        _LM,
        "model.layers.{i}.self_attn",
        "model.layers.{i}.input_layernorm",
        "model.rotary_emb",
        causal=True,
    ),
    "qwen3": Expected(
        "Qwen3Model",
        "Qwen3Config",
        _LM | {"head_dim": 16},
        "layers.{i}.self_attn",
        "layers.{i}.input_layernorm",
        "rotary_emb",
        causal=True,
        by_token=True,
    ),
    "gemma3_text": Expected(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LM | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "model.layers.{i}.self_attn",
        "model.layers.{i}.input_layernorm",
        "model.rotary_emb",
        ("sliding_attention", "full_attention", "sliding_attention"),
        causal=True,
        by_token=True,
    ),
}


def build(name: str) -> Any:
    expected = EXPECTED[name]
    return getattr(transformers, expected.model)(getattr(transformers, expected.config)(**expected.settings))


def test_every_family_is_here() -> None:
    """But for those that compute attention themselves, which the contract of the generic rule tries as a whole."""
    assert EXPECTED.keys() == {name for name, family in FAMILIES.items() if family.own is None}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_table_finds(name: str) -> None:
    expected, model = EXPECTED[name], build(name)
    modules = dict(model.named_modules())
    layers = prompt_layers(get_peft_model(model, MEPTConfig(num_virtual_tokens=2)))
    assert [layer.site.name for layer in layers] == [expected.attention.format(i=i) for i in range(3)]
    for i, layer in enumerate(layers):
        site = layer.site
        assert site.attention is modules[expected.attention.format(i=i)]
        if i == 0 and expected.first_norm != "same":
            assert type(site.norm).__name__ == expected.first_norm
        assert site.norm is (modules[expected.norm.format(i=i)] if expected.norm else None)
        assert site.rotary is (modules[expected.rotary] if expected.rotary else None)
        assert site.rotary_type == expected.rotary_types[i]
        assert (site.causal, site.by_token) == (expected.causal, expected.by_token)
        assert site.bias_owner is (modules[expected.bias_owner] if expected.bias_owner else None)
        assert (site.input_std is not None) == expected.knows_input_spread
        assert site.index == i and site.width == 16
        assert site.attention in list(site.block.modules())
        assert type(site.block).__name__.endswith(("Layer", "Block")), type(site.block)
        if expected.norm and expected.first_norm == "same":
            assert site.norm in list(site.block.modules())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "bart"])
def test_spread_of_the_block_input_is_that_of_the_norm_before_it(name: str) -> None:
    model = build(name)
    norms = {
        "bert": ("bert.embeddings.LayerNorm", "bert.encoder.layer.{}.output.LayerNorm"),
        "roberta": ("roberta.embeddings.LayerNorm", "roberta.encoder.layer.{}.output.LayerNorm"),
        "distilbert": ("distilbert.embeddings.LayerNorm", "distilbert.transformer.layer.{}.output_layer_norm"),
        "bart": ("model.encoder.layernorm_embedding", "model.encoder.layers.{}.final_layer_norm"),
    }[name]
    for number, path in enumerate([norms[0], norms[1].format(0), norms[1].format(1)]):
        norm = model.get_submodule(path)
        nn.init.constant_(norm.weight, 3.0 * (number + 1))
        nn.init.constant_(norm.bias, 4.0 * (number + 1))
    stds = [layer.site.input_std for layer in prompt_layers(get_peft_model(model, MEPTConfig()))]
    assert stds == pytest.approx([5.0, 10.0, 15.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["no_such_layer"]}, "matches no module of LlamaForCausalLM"),
        ({"target_modules": "no.such.layer"}, "matches no module of LlamaForCausalLM"),
        ({"exclude_modules": ["self_attn"]}, "exclude_modules={'self_attn'} leaves out all attention layers"),
        ({"modules_to_save": ["model"]}, "copies all attention layers of LlamaForCausalLM"),
        ({"layers_to_transform": [7]}, "names layer 7, not among the layers of LlamaForCausalLM .*: 0 to 2 "),
        ({"layers_to_transform": [0, 7]}, "names layer 7, not among the layers of LlamaForCausalLM .*: 0 to 2 "),
        ({"layers_to_transform": [9, 7]}, "names layers 7, 9, not among"),
        ({"layers_to_transform": 3}, "names layer 3, not among"),
        ({"layers_to_transform": []}, "leaves no layer of LlamaForCausalLM to prompt. .* 0 to 2"),
        ({"layers_to_transform": [0], "target_modules": ["layers.1.self_attn"]}, "names layer 0, .*: 1 "),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern='blocks' names no list of blocks"),
        ({"target_modules": ["q_proj"]}, "not their projections"),
        ({"target_modules": "model.layers.1.self_attn.q_proj"}, "not their projections"),
        ({"target_modules": ["self_attn", "v_proj"]}, "'model.layers.0.self_attn.v_proj', a Linear"),
        ({"target_modules": ["mlp"]}, "a LlamaMLP, which is not an attention layer"),
        ({"target_modules": ["lm_head"]}, "a Linear, which is not an attention layer"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_targets_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MEPTConfig(**settings))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers_to_transform": [0, 2]}, [0, 2]),
        ({"layers_to_transform": 1}, [1]),
        ({"target_modules": ["self_attn"]}, [0, 1, 2]),
        ({"target_modules": ["layers.1.self_attn"]}, [1]),
        ({"target_modules": r".*\.[12]\.self_attn"}, [1, 2]),
        ({"target_modules": r".*\.[12]\.self_attn", "layers_to_transform": [2]}, [2]),
        ({"target_modules": ["self_attn"], "layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"exclude_modules": ["layers.1.self_attn"]}, [0, 2]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_targets_that_work(settings: dict[str, Any], layers: list[int]) -> None:
    model = get_peft_model(build("llama"), MEPTConfig(**settings))
    assert [layer.site.index for layer in prompt_layers(model)] == layers


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("t5", "decoder.block.0.layer.0.SelfAttention"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention"),
        ("bart", "model.decoder.layers.1.self_attn"),
        ("bart", "model.decoder.layers.0.encoder_attn"),
    ],
)
def test_decoder_and_cross_attention_stay_untouched(name: str, target: str) -> None:
    with pytest.raises(ValueError, match="in an encoder-decoder that of the encoder"):
        get_peft_model(build(name), MEPTConfig(target_modules=target))


def test_calls_in_order_counts_arguments_before_the_call() -> None:
    class Block(nn.Module):
        def forward(self, x: Any) -> Any:
            y = self.attention(self.norm(x), mask=self.other(x))
            return self.last(y + self.mlp(self.norm2(x)))

    assert calls_in_order(Block.forward) == ("norm", "other", "attention", "norm2", "mlp", "last")


def test_passes_on_keywords() -> None:
    def does(x: Any, **kwargs: Any) -> Any:
        return print(x, **kwargs)

    def keeps(x: Any, **kwargs: Any) -> Any:
        return print(x)

    def has_none(x: Any) -> Any:
        return print(x)

    assert passes_on_keywords(does) and not passes_on_keywords(keeps) and not passes_on_keywords(has_none)
