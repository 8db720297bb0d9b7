# SPDX-License-Identifier: Apache-2.0
"""Models that only the generic rule knows are tried while an adapter is made: what is seen, and what is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from generic_models import _BART, _WAV2VEC, make_model
from peft import get_peft_model
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine import rehearsal, trial
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.rows import Rows


def attach(model: nn.Module) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, MEPTConfig(num_virtual_tokens=3)), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["qwen2", "llama4_text", "recurrent_gemma", "ijepa", "xlm-roberta", "wav2vec2"])
def test_nothing_is_said_of_models_that_were_tried(name: str) -> None:
    """They say so only where random rows come from, which is another matter."""
    assert not [each for each in attach(make_model(name))[1] if "generic rule" in each]


def test_models_that_cannot_be_tried_are_named() -> None:
    said = attach(Siglip2VisionModel(Siglip2VisionConfig(**_SIZES)))[1]  # wants the shape of each image, too
    start = "siglip2_vision_model is not among"
    assert len([each for each in said if each.startswith(start) and "generic rule" in each]) == 1


_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# Waveforms through convolutions that the config tells of or not, spectrograms, the encoder of two.
SOUNDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hubert": ("HubertModel", _SIZES | _WAV2VEC),
    "audio-spectrogram-transformer": ("ASTModel", _SIZES | {"max_length": 32, "num_mel_bins": 16}),
    "moonshine": ("MoonshineForConditionalGeneration", {"hidden_size": 32, "vocab_size": 64}),
    "speech_to_text": ("Speech2TextForConditionalGeneration", _BART | {"input_feat_per_channel": 8}),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_tried(name: str) -> None:
    cls, settings = SOUNDS[name]
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**settings))
    attach(model)
    assert rehearsal.rehearse(model) == {layer.site.name for layer in prompt_layers(model)}


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("name", ["qwen2", "ijepa"])
def test_a_prompt_that_gets_another_key_than_a_token_is_refused(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    names, right = [path for path, _ in model.named_modules()], rehearsal.project_rows

    def wrong(*given: Any) -> Rows:
        rows = right(*given)
        setattr(rows, part, getattr(rows, part).roll(1, dims=-1))
        return rows

    monkeypatch.setattr(rehearsal, "project_rows", wrong)
    with pytest.raises(ValueError, match="gets another key or value than that token"):
        attach(model)
    assert [path for path, _ in model.named_modules()] == names


def test_trying_draws_nothing_and_changes_no_mode() -> None:
    model = make_model("qwen2").train()
    model.model.layers[0].eval()
    modes = {path: module.training for path, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    prompted = get_peft_model(model, MEPTConfig(num_virtual_tokens=3, prompt_init="random", num_experts=1))
    drawn = [layer for layer in prompted.modules() if hasattr(layer, "mept_prompts")]
    assert len(drawn) == 2
    torch.manual_seed(3)
    rehearsal.rehearse(model)
    assert torch.equal(torch.rand(3), expected)
    assert {path: module.training for path, module in model.named_modules() if path in modes} == modes


def test_a_layer_that_breaks_on_rows_alone_is_refused_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen2")

    def broken(*_: Any) -> Rows:
        raise KeyError("where_from")

    monkeypatch.setattr(trial, "harvest", broken)
    with pytest.raises(ValueError, match=r"raises KeyError \('where_from'\)"):
        attach(model)
