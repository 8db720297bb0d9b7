# SPDX-License-Identifier: Apache-2.0
"""Prompts in encoders of speech stand before the first frame: as rows of a sound that is longer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

P = 3
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_FEATURES = {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3}
_SOUND = {
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "conv_depthwise_kernel_size": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_SEAMLESS = {
    "hidden_size": 32,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48,
    "feature_projection_input_dim": 8,
    "conv_depthwise_kernel_size": 3,
    "num_hidden_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "vocab_size": 32,
}
_NEAR = {"left_max_position_embeddings": 4, "right_max_position_embeddings": 2}
# Model, settings of its config.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "conformer": ("Wav2Vec2ConformerModel", _SIZES | _SOUND | {"max_source_positions": 8}),
    "conformer-no-positions": ("Wav2Vec2ConformerModel", _SIZES | _SOUND | {"position_embeddings_type": None}),
    "wav2vec2-bert": ("Wav2Vec2BertModel", _SIZES | _FEATURES | _NEAR),
    "wav2vec2-bert-relative": (
        "Wav2Vec2BertModel",
        _SIZES | _FEATURES | {"position_embeddings_type": "relative", "max_source_positions": 8},
    ),
    "seamless-m4t": ("SeamlessM4TSpeechEncoder", _SEAMLESS | {"max_source_positions": 8}),
    "seamless-m4t-v2": ("SeamlessM4Tv2SpeechEncoder", _SEAMLESS | _NEAR),
    "parakeet": ("ParakeetEncoder", _SIZES | {"num_mel_bins": 16, "conv_kernel_size": 3, "scale_input": False}),
    "speecht5": (
        "SpeechT5EncoderWithSpeechPrenet",
        _SOUND
        | {"hidden_size": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"decoder_layers": 1, "encoder_layerdrop": 0.0, "encoder_max_relative_position": 5},
    ),
    "wavlm": ("WavLMModel", _SIZES | _SOUND | {"num_buckets": 8, "max_bucket_distance": 16}),
}


def make(name: str, **settings: Any) -> nn.Module:
    """A random float64 encoder whose weights matter."""
    cls, fixed = ENCODERS[name]
    model_cls = getattr(transformers.models, _module(cls)).__dict__.get(cls) or getattr(transformers, cls, None)
    if model_cls is None:
        modelling = getattr(getattr(transformers.models, _module(cls)), f"modeling_{_module(cls)}")
        model_cls = getattr(modelling, cls)
    torch.manual_seed(0)
    model = model_cls(model_cls.config_class(**fixed, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double().eval()  # type: ignore[no-any-return]


def _module(cls: str) -> str:
    names = {
        "Wav2Vec2Conformer": "wav2vec2_conformer",
        "Wav2Vec2Bert": "wav2vec2_bert",
        "SeamlessM4Tv2": "seamless_m4t_v2",
        "SeamlessM4TS": "seamless_m4t",
        "Parakeet": "parakeet",
        "WavLM": "wavlm",
        "SpeechT5": "speecht5",
    }
    return next(module for start, module in names.items() if cls.startswith(start))


def sounds(name: str, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name in ("wavlm", "speecht5", "conformer", "conformer-no-positions"):
        found, mask = {"input_values": torch.randn(2, 60, generator=generator).double()}, torch.ones(2, 60)
    else:
        size = 16 if name == "parakeet" else 8
        found = {"input_features": torch.randn(2, 48, size, generator=generator).double()}
        mask = torch.ones(2, 48)
    mask[1, mask.shape[1] * 2 // 3 :] = 0
    return found | ({"attention_mask": mask.long()} if padded else {})


def attach(model: nn.Module, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model,
            MEPTConfig(num_virtual_tokens=P, num_experts=1, num_shared_experts=0, init_weights=False, **settings),
        ).eval()


def plain(attention: nn.Module, layer: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
    """What the attention layer makes of its input when the rows are part of it and its tables are as long."""
    x = given["hidden_states"]
    batch, length = x.shape[:2]
    longer = torch.cat([layer.site.norm(rows) if layer.site.norm is not None else rows, x], dim=1)
    call: dict[str, Any] = {"hidden_states": longer}
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        call["attention_mask"] = F.pad(mask, (P, 0), value=1)
    elif mask is not None:
        mask = F.pad(mask, (P, 0), value=True if mask.dtype == torch.bool else 0.0)
        call["attention_mask"] = torch.cat([mask[:, :, :1].expand(-1, -1, P, -1), mask], dim=2)
    owner = layer.site.bias_owner
    tables = {"relative_position_embeddings": "embed_positions", "position_embeddings": "encode_positions"}
    for argument, module in tables.items():
        if given.get(argument) is not None:
            call[argument] = getattr(owner, module)(torch.zeros(batch, length + P, 32).double())
    if given.get("position_bias") is not None and hasattr(owner, "pe_k"):
        call["position_bias"] = owner(longer)
    return attention(**call)[0][:, P:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ENCODERS)
def test_rows_are_what_they_are_in_front_of_a_longer_sound(name: str, padded: bool) -> None:
    prompted = attach(make(name))
    layer: Any = prompt_layers(prompted)[0]
    names, heard = list(layer._names), {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        heard["given"] = dict(zip(names, args, strict=False)) | kwargs
        heard["output"] = output[0]

    handle = layer.site.attention.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        prompted(**sounds(name, padded))
        handle.remove()
        rows = (layer.mept_prompts["default"].weight * layer.prompt_config["default"].prompt_scale).expand(2, -1, -1)
        expected = plain(make(name).get_submodule(layer.site.name), layer, heard["given"], rows)
        mask = heard["given"].get("attention_mask")
    real = torch.ones(expected.shape[:2], dtype=torch.bool)
    if mask is not None:
        real = mask.bool() if mask.ndim == 2 else torch.diagonal(mask[:, 0], dim1=-2, dim2=-1)
        real = real if real.dtype == torch.bool else real > -1.0
    real = real.expand(2, -1)
    assert real.all() != padded
    close = 1e-6 if name == "parakeet" else 1e-10  # whose sinusoids are float32
    torch.testing.assert_close(heard["output"][real], expected[real], rtol=0, atol=close)


def test_every_prompt_of_every_layer_learns() -> None:
    for name in ENCODERS:
        prompted = attach(make(name))
        prompted(**sounds(name, padded=True)).last_hidden_state.square().sum().backward()
        for layer in prompt_layers(prompted):
            assert layer.mept_prompts["default"].weight.grad.abs().min() > 0, name


def test_adapters_that_shorten_the_sound_are_left_out_and_named() -> None:
    model = make("wav2vec2-bert", add_adapter=True, num_adapter_layers=1)
    with pytest.warns(UserWarning, match=r"leave out 1 .*adapter.*a convolution before it makes fewer tokens"):
        prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=P))
    assert [layer.site.name for layer in prompt_layers(prompted)] == [f"encoder.layers.{n}.self_attn" for n in (0, 1)]


def test_input_that_is_turned_before_keys_are_made_of_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match="position_embeddings_type='rotary' applies the rotary embedding to the input"
    ):
        attach(make("conformer", position_embeddings_type="rotary"))
