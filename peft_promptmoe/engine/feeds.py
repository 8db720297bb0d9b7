# SPDX-License-Identifier: Apache-2.0
"""Inputs for a trial run of the base model: a few tokens, one image, or a short audio signal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.reader import text_reader
from ..models.targets import is_encoder_decoder
from .model_hooks import prompt_layers

TOKENS = 3
FRAMES = 8
SAMPLES = 4000  # audio samples if the config does not describe the convolutions


def feed_of(model: Any) -> Callable[[], Any] | None:
    """Function that runs the model on a few tokens, an image or audio. None if it needs other inputs."""
    if any(parameter.is_meta for name, parameter in model.named_parameters() if "promptmoe" not in name):
        return None
    reader = text_reader(model)
    if reader is not None:
        ids = torch.arange(5, 5 + TOKENS, device=next(reader.parameters()).device)[None]
        return lambda: reader(input_ids=ids)
    name = getattr(model, "main_input_name", None)
    sizes = _image(model)
    if sizes is not None:
        image = _ramp(sizes).to(next(model.parameters()))
        return lambda: model(**{name: image}) if name else model(image)
    return _sound_feed(model)


def _ramp(sizes: tuple[int, ...]) -> torch.Tensor:
    """Tensor (1, *sizes) with numbers from -1 to 1."""
    return torch.linspace(-1.0, 1.0, math.prod(sizes)).reshape(1, *sizes)


def _image(model: Any) -> tuple[int, ...] | None:
    """(channels, rows, columns) of the model's images. None if unknown."""
    found = (layer.site.patches for layer in prompt_layers(model) if layer.site.patches is not None)
    for patches in found:
        if patches.image_size is not None:
            return (patches.embedding.in_channels, *patches.image_size)
    timm = getattr(model, "timm_model", model)
    if size := getattr(timm, "pretrained_cfg", {}).get("input_size"):
        return tuple(size)
    side = getattr(getattr(model, "config", None), "image_size", None)
    if getattr(model, "main_input_name", None) != "pixel_values" or side is None:
        return None
    return (getattr(model.config, "num_channels", 3), *([side, side] if isinstance(side, int) else side))


def _sound_feed(model: Any) -> Callable[[], Any] | None:
    """Function that runs the encoder of an audio model, also inside a wrapper. None for other models."""
    whole: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        return None
    encoder = whole.get_encoder() if is_encoder_decoder(whole) else whole
    sizes = _sound(encoder.main_input_name, encoder.config)
    if sizes is None:
        return None
    sound = _ramp(sizes).to(next(encoder.parameters()))
    return lambda: encoder(**{encoder.main_input_name: sound})


def _sound(name: str, config: Any) -> tuple[int, ...] | None:
    """Shape of the audio input: (samples,), or frames and features of a spectrogram. None for other models."""
    features = getattr(config, "input_feat_per_channel", None)
    if name == "input_features" and features is not None:
        return (4 * FRAMES, features)
    if name != "input_values":
        return None
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (config.max_length, config.num_mel_bins)
    if not hasattr(config, "conv_stride"):
        return (SAMPLES,)
    samples = FRAMES
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return (samples,)
