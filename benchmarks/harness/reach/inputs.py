# SPDX-License-Identifier: Apache-2.0
"""Inputs that a model of any kind can be run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .sizes import VOCABULARY

LENGTH = 12
Inputs = dict[str, Any]
SHAPES = {"pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4]] * 2)}


def parameters_of(model: Any) -> list[str]:
    """Names of what the model's forward takes."""
    return list(inspect.signature(inspect.unwrap(type(model).forward)).parameters)


def _tokens() -> Tensor:
    return torch.randint(5, VOCABULARY - 60, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    """Normal values, the same ones for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _side(model: Any) -> int:
    for config in (model.config, getattr(model.config, "vision_config", None)):
        side = getattr(config, "image_size", None) or getattr(config, "img_size", None)
        if side is not None:
            return int(side if isinstance(side, int) else list(side)[-1])
    return 64


def candidates(model: Any, kind: str) -> Iterator[Inputs]:
    """Inputs with labels, the likeliest first; a model that none of them suits is not judged."""
    yield from {"vision": _images, "audio": _sounds, "speech": _sounds}.get(kind, _texts)(model, kind)


def _texts(model: Any, kind: str) -> Iterator[Inputs]:
    taken, ids = parameters_of(model), _tokens()
    decoder = {"decoder_input_ids": ids[:, :6].clone()} if "decoder_input_ids" in taken else {}
    inputs: Inputs = {"input_ids": ids, "labels": ids.clone()}
    if "attention_mask" in taken:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "bbox" in taken:
        inputs["bbox"] = torch.zeros(2, LENGTH, 4, dtype=torch.long)
    if kind == "classification":
        inputs["labels"] = torch.tensor([0, 1])
        if getattr(model.config, "is_encoder_decoder", False) and isinstance(model.config.eos_token_id, int):
            ids[:, -1] = model.config.eos_token_id
    elif getattr(model.config, "is_encoder_decoder", False):
        inputs["labels"] = ids[:, :6].clone()
    if kind == "seq2seq":
        yield inputs | decoder
    yield inputs
    if decoder:
        yield inputs | decoder
    if "input_features" in taken:
        yield inputs | {"input_features": _frames(model)}
    if "pixel_values" in taken:
        side = _side(model)
        pixels = {"pixel_values": noise(2, 3, side, side)}
        yield inputs | pixels
        yield inputs | pixels | decoder
        yield pixels | decoder | {"labels": ids[:, :6].clone()}


def _bins(model: Any) -> int:
    """Features of a frame of sound."""
    configs = (model.config, getattr(model.config, "audio_config", None))
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size")
    return next((getattr(config, name) for config in configs for name in names if getattr(config, name, None)), 80)


def _frames(model: Any) -> Tensor:
    """(2, bins, 8 * LENGTH) of sound, of which Voxtral Realtime makes as many tokens as the text has."""
    return noise(2, _bins(model), 8 * LENGTH)


def _images(model: Any, kind: str) -> Iterator[Inputs]:
    labels = {"labels": torch.tensor([0, 1])}
    for side in (_side(model), 32, 64, 224):
        yield {"pixel_values": noise(2, 3, side, side)} | labels
    patches = {
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }
    yield {"pixel_values": noise(2, 16, 3 * 8 * 8)} | patches | labels  # SigLIP 2
    yield {"input_ids": _tokens() % 30} | labels  # ImageGPT
    yield from _texts(model, "classification")  # what reads text as well


def _sounds(model: Any, kind: str) -> Iterator[Inputs]:
    taken, ids = parameters_of(model), _tokens()
    more: Inputs = {"labels": ids[:, :6].clone() if kind == "speech" else torch.tensor([0, 1])}
    if "decoder_input_ids" in taken:
        more["decoder_input_ids"] = ids[:, :6].clone()
    channels = getattr(getattr(model.config, "decoder_config", None), "num_channels", None)
    if channels is not None:  # Dia writes several codes at a time
        yield {"input_ids": ids, "decoder_input_ids": ids[:, :6, None].repeat(1, 1, channels)}
    bins, codes = _bins(model), getattr(model.config, "num_codebooks", None)
    if codes is not None:  # Kyutai reads a token and its codes of sound
        several = torch.cat([ids[..., None], ids[..., None].repeat(1, 1, codes) % 60], dim=-1)
        yield {"input_ids": several, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if "input_values" in taken:
        for shape in ((2, 8000), (2, 1024, bins), (2, 64, bins), (2, 1024, 128), (2, 64, 80), (2, 16000)):
            yield {"input_values": noise(*shape) * 0.5} | more
    if "input_features" in taken:
        for shape in ((2, bins, 512), (2, 64, bins), (2, 64, 160), (2, bins, 64), (2, bins, 1024)):
            yield {"input_features": noise(*shape)} | more
        if "input_ids" in taken:  # Voxtral Realtime adds a frame to each token
            yield {"input_ids": ids, "input_features": _frames(model), "labels": ids.clone()}
    if "input_ids" in taken:
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more | {"labels": ids.clone()}


# -- an image within a text -------------------------------------------------------------------------------------------


def _packed(model: Any) -> Inputs:
    config = model.config.vision_config
    first = lambda value: value if isinstance(value, int) else value[0]  # noqa: E731
    patch, frames = first(config.patch_size), first(getattr(config, "temporal_patch_size", 2))
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    return {"pixel_values": noise(32, channels * frames * patch**2), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _plain(model: Any) -> Inputs:
    return {"pixel_values": noise(2, 3, _side(model), _side(model))}


def _several(model: Any) -> Inputs:
    return {"pixel_values": noise(2, 1, 3, _side(model), _side(model))}


def _with_sizes(model: Any) -> Inputs:
    return _plain(model) | {"image_sizes": torch.tensor([[_side(model)] * 2] * 2)}


def _with_shapes(model: Any) -> Inputs:
    patch = model.config.vision_config.patch_size
    shapes = {
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    }
    return {"pixel_values": noise(2, 16, 3 * patch**2)} | shapes


IMAGES: dict[str, Callable[[Any], Inputs]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"), _packed),
    **dict.fromkeys(("llava", "paligemma", "gemma3", "internvl", "aya_vision", "cohere2_vision", "janus"), _plain),
    **dict.fromkeys(("deepseek_vl", "got_ocr2", "video_llava", "ovis2", "kosmos-2", "git"), _plain),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _several),
    "mistral3": _with_sizes,
    "lfm2_vl": _with_shapes,
}


def with_image(model: Any, model_type: str) -> Inputs:
    """Text with as many image tokens as the model makes of one image for each sample."""
    image, ids = IMAGES[model_type](model), _tokens()
    ids[:, LENGTH - 4 :] = ids[:, LENGTH - 4 :] % 100 + 5
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    count = None if model_type == "git" else _image_tokens(model, image)
    if count is not None and token is not None:
        ids = torch.cat([ids[:, :2], torch.full((2, count), token), ids[:, 2:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} | image
    taken = parameters_of(model)
    if "mm_token_type_ids" in taken:
        inputs["mm_token_type_ids"] = (ids == token).long()
    if "token_type_ids" in taken and model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == token).long()
    if model_type == "kosmos-2":
        count = model.config.latent_query_num
        ids = torch.cat([ids[:, :1], torch.full((2, count), 9), ids[:, 1:]], dim=1)
        place = torch.zeros_like(ids)
        place[:, 1 : 1 + count] = 1
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        inputs["image_embeds_position_mask"] = place
    return inputs


@torch.no_grad()
def _image_tokens(model: Any, image: Inputs) -> int | None:
    for owner in (model, getattr(model, "model", None)):
        if hasattr(owner, "get_image_features"):
            found = owner.get_image_features(**image)
            found = getattr(found, "pooler_output", found)
            parts = found if isinstance(found, (list, tuple)) else [found]
            return int(sum(part.numel() // part.shape[-1] for part in parts)) // 2
    return None
