# SPDX-License-Identifier: Apache-2.0
"""Architectures that only the generic rule reaches: right, or refused; never silently wrong."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generic_models import (
    _BART,
    _WAV2VEC,
    ARCHITECTURES,
    AT_ATTACH,
    EXACT,
    NOT_ON_INTERFACE,
    WORKS,
    make_inputs,
    make_model,
    run,
    with_outcome,
)
from naive_blocks import rows_through_blocks
from peft import PeftModel, get_peft_model
from test_training import assert_same_gradients, checkpointing
from torch import Tensor, nn
from transformers import BertConfig, SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel, Wav2Vec2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.transformers_attention import ConfigView
from peft_promptmoe.models import sites
from peft_promptmoe.models.families import FAMILIES

P = 3


def attach(name: str, model: nn.Module, **settings: Any) -> tuple[Any, list[str]]:
    """The prompted model in eval mode, and the warnings that making it gave."""
    settings = ARCHITECTURES[name].mept | settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "The head of .* stays frozen")  # no task type is given here
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
        warnings.filterwarnings("ignore", "The head of .* stays frozen")  # which is meant here
        torch.manual_seed(1)
        prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=P, **settings))
    return prompted.eval(), [str(warning.message) for warning in caught]


def census(model: nn.Module) -> str:
    """A digest of what attaching could change: tensors, modules, hooks, config views (and `requires_grad`, apart)."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._load_state_dict_pre_hooks)
        view = isinstance(getattr(module, "config", None), ConfigView)
        digest.update(f"{name}{type(module).__name__}{hooks}{view}{module.training}".encode())
    return digest.hexdigest()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def static_rows(model: nn.Module) -> list[torch.Tensor]:
    return [layer.mept_prompts["default"].weight.detach()[0] * 25.0 for layer in prompt_layers(model)]


@pytest.mark.parametrize("name", with_outcome(EXACT))
def test_equals_rows_run_through_the_whole_block(name: str) -> None:
    model = make_model(name)
    one = {
        "num_experts": 1,
        "num_shared_experts": 0,
        "routing": "sample",
        "init_weights": False,
        "decoder_sees_prompts": False,
    }
    prompted, _ = attach(name, model, **one)
    for padded in (False, True) if model.main_input_name == "input_ids" and ARCHITECTURES[name].pads else (False,):
        inputs = make_inputs(model, padded)
        got = run(model, inputs)
        with prompted.disable_adapter():
            base = run(model, inputs)
            with rows_through_blocks(model, [layer.site for layer in prompt_layers(model)], static_rows(model), P):
                expected = run(model, inputs)
        assert (expected - base).abs().max() > 0.03, "the prompts have no effect to compare"
        torch.testing.assert_close(got, expected, rtol=0, atol=ARCHITECTURES[name].tolerance)


@pytest.mark.parametrize("name", ["mt5", "switch_transformers", "mbart", "pegasus", "marian", "m2m_100", "t5gemma"])
def test_decoder_sees_the_last_rows_as_run_through_the_block(name: str) -> None:
    model = make_model(name)
    prompted, _ = attach(name, model, num_experts=1, num_shared_experts=0, init_weights=False)
    got = []
    for padded in (False, True) if model.main_input_name == "input_ids" else (False,):
        inputs = make_inputs(model, padded)
        got.append((inputs, run(model, inputs)))
    sites, rows = [layer.site for layer in prompt_layers(model)], static_rows(model)
    prompted.unload()
    for inputs, output in got:
        with rows_through_blocks(model, sites, rows, P, last_stays=True):
            expected = run(model, inputs)
        torch.testing.assert_close(output, expected, rtol=0, atol=ARCHITECTURES[name].tolerance)


@pytest.mark.parametrize("name", with_outcome(EXACT, WORKS))
def test_the_whole_contract(name: str, tmp_path: Path) -> None:
    # Frozen as with an adapter: torch multiplies in another order where a weight asks for its gradient.
    model = make_model(name).requires_grad_(False)
    before, inputs = census(model), make_inputs(model, padded=ARCHITECTURES[name].pads)
    base = run(model, inputs)
    prompted, messages = attach(name, model)
    arch = ARCHITECTURES[name]
    expected = [arch.says] if arch.says is not None else []
    assert len(messages) == len(expected) and all(map(str.__contains__, messages, expected)), messages
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "routing='sample' on a causal language model reads the whole input")
        got = run(prompted, inputs)
        assert torch.isfinite(got).all()
        assert not torch.equal(got, base)
        with prompted.disable_adapter():
            assert torch.equal(run(prompted, inputs), base)
        prompted.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same as before
            loaded = PeftModel.from_pretrained(make_model(name), tmp_path).eval()
        assert torch.equal(run(loaded, inputs), got)
    assert prompted.unload() is model
    assert torch.equal(run(model, inputs), base)
    assert census(model) == before


# Blocks whose attention reads their own input (norms behind it, or none), and one that scales what its norm returns.
OF_THE_BLOCK = ["xlm-roberta", "olmo2", "marian", "wav2vec2", "falcon_h1"]


def learned(name: str, reentrant: bool) -> dict[str, Tensor]:
    """Gradients of an adapter; of the model only what checkpointing asks for is in training mode."""
    prompted, _ = attach(name, make_model(name).requires_grad_(False))
    base = prompted.get_base_model()
    base.config.use_cache = False
    if reentrant:
        checkpointing(base, reentrant)
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    output = prompted(**make_inputs(base))
    output.get("logits", output.get("last_hidden_state")).square().sum().backward()
    return {key: p.grad for key, p in prompted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", OF_THE_BLOCK)
def test_blocks_that_run_again_in_the_backward_pass_find_their_input(name: str) -> None:
    expected = learned(name, reentrant=False)
    assert expected
    assert_same_gradients(learned(name, reentrant=True), expected, 1e-9)


def test_families_that_compute_attention_themselves_are_all_here() -> None:
    assert {name for name, family in FAMILIES.items() if family.own is not None} <= ARCHITECTURES.keys()


def causal_models() -> list[str]:
    return [name for name in with_outcome(EXACT, WORKS) if ARCHITECTURES[name].auto == "AutoModelForCausalLM"]


@pytest.mark.parametrize("name", causal_models())
def test_no_later_token_reaches_an_earlier_logit_by_default(name: str) -> None:
    model = make_model(name)
    prompted, _ = attach(name, model, init_weights=False)
    assert prompted.peft_config["default"].routing == "token"
    ids = make_inputs(model)["input_ids"]
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 17) % 50 + 5
    with torch.no_grad():
        before, after = prompted(input_ids=ids).logits, prompted(input_ids=changed).logits
    assert not torch.equal(before[:, 4:], after[:, 4:])
    # The experts of a model's own round as the rest of the batch has it.
    torch.testing.assert_close(
        before[:, :4], after[:, :4], rtol=0, atol=1e-10 if before.dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("name", with_outcome(*AT_ATTACH))
def test_refused_before_anything_is_changed(name: str) -> None:
    model = make_model(name)
    before, training = census(model), trainable(model)
    with pytest.raises(ValueError, match=ARCHITECTURES[name].outcome):
        attach(name, model)
    assert census(model) == before
    assert trainable(model) == training


@pytest.mark.parametrize("name", ["gpt_neox", "lfm2", "qwen2", "ijepa"])
def test_a_norm_that_was_overlooked_is_noticed_before_anything_stays(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    before, training = census(model), trainable(model)
    monkeypatch.setattr(sites, "input_norm", lambda *_: None)
    monkeypatch.setattr(sites, "family_of", lambda *_: None)
    with pytest.raises(ValueError, match="no norm was found between the two"):
        attach(name, model)
    assert census(model) == before
    assert trainable(model) == training


def test_a_cap_that_the_kernel_is_not_told_of_refuses_token_routing() -> None:
    model = make_model("qwen2")
    prompted, _ = attach("qwen2", model, routing="token")
    for layer in prompt_layers(model):
        layer.site.attention.attn_logit_softcapping = 30.0  # as Gemma 2 has it, but handed to nobody
    with pytest.raises(ValueError, match=r"caps its attention scores.*routing='sample'"):
        run(prompted, {"input_ids": torch.tensor([[5, 6, 7]])})


def test_bias_inside_the_attention_layer_refuses_prompts_that_the_decoder_sees() -> None:
    model = make_model("umt5")
    before = census(model)
    with pytest.raises(ValueError, match="decoder_sees_prompts=False"):
        attach("umt5", model, decoder_sees_prompts=True)
    assert census(model) == before


# Decoders that make their mask from the encoder's output, or read times off its frames; encoders whose tables are as
# long as their text.
UNLENGTHENED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _BART | {"num_mel_bins": 8, "max_source_positions": 16},
    ),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        _BART | {"input_feat_per_channel": 8, "conv_channels": 16},
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
    ),
}


def unlengthened(name: str) -> nn.Module:
    torch.manual_seed(0)
    model, config, settings = UNLENGTHENED[name]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    made = getattr(transformers, model)(getattr(transformers, config)(**settings | ids))
    made.set_attn_implementation("eager")  # which gives its weights
    return made.eval()  # type: ignore[no-any-return]


def speech_encoder_decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        Wav2Vec2Config(**sizes, **_WAV2VEC),
        BertConfig(**sizes, vocab_size=64, is_decoder=True, add_cross_attention=True),
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = SpeechEncoderDecoderModel(config)
    model.set_attn_implementation("eager")
    return model.eval()


def inputs_for(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    decoder = {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    if model.main_input_name == "input_ids":
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        return decoder | {"input_ids": torch.randint(5, 60, (2, 7), generator=generator), "attention_mask": mask}
    name, shape = model.main_input_name, {"whisper": (2, 8, 32), "speech_to_text": (2, 40, 8)}
    found = torch.randn(shape.get(model.config.model_type, (2, 4000)), generator=generator)
    mask = torch.ones(found.shape[:2], dtype=torch.long)
    mask[1, mask.shape[1] // 2 :] = 0
    masked = {} if model.config.model_type == "whisper" else {"attention_mask": mask}
    return decoder | {name: found} | masked


@pytest.mark.parametrize("name", [*UNLENGTHENED, "speech-encoder-decoder"])
def test_decoders_that_cannot_see_prompts_attend_to_as_many_frames_as_ever(name: str) -> None:
    model = speech_encoder_decoder() if name == "speech-encoder-decoder" else unlengthened(name)
    inputs = inputs_for(model)
    with torch.no_grad():
        base = model(**inputs, output_attentions=True)
    before = census(model)
    with pytest.raises(ValueError, match="decoder_sees_prompts=False"):
        get_peft_model(model, MEPTConfig(decoder_sees_prompts=True))
    assert census(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=P, init_weights=False)).eval()
    assert prompted.peft_config["default"].decoder_sees_prompts is False
    with torch.no_grad():
        found = prompted(**inputs, output_attentions=True)
    assert found.encoder_last_hidden_state.shape == base.encoder_last_hidden_state.shape
    weights, expected = found.cross_attentions[-1], base.cross_attentions[-1]
    assert weights.shape == expected.shape
    assert torch.equal(weights == 0, expected == 0)  # the same frames are hidden
    assert not torch.equal(found.logits, base.logits)


@pytest.mark.parametrize(
    ("name", "settings", "sees"),
    [
        ("mt5", {}, True),
        ("mbart", {}, True),
        ("umt5", {}, False),
        ("mt5", {"routing": "token"}, False),
        ("mt5", {"decoder_sees_prompts": False}, False),
        ("qwen2", {}, True),  # without a decoder that could, it says nothing
    ],
)
def test_whether_the_decoder_sees_prompts_is_resolved_and_saved(
    name: str, settings: dict[str, Any], sees: bool, tmp_path: Path
) -> None:
    prompted, _ = attach(name, make_model(name), **settings)
    assert prompted.peft_config["default"].decoder_sees_prompts is sees
    prompted.save_pretrained(tmp_path)
    assert MEPTConfig.from_pretrained(tmp_path).decoder_sees_prompts is sees


def test_the_message_names_a_way_out() -> None:
    with pytest.raises(ValueError, match=NOT_ON_INTERFACE) as caught:
        attach("mamba", make_model("mamba"))
    assert "MambaForCausalLM" in str(caught.value) and "AttentionInterface" in str(caught.value)
