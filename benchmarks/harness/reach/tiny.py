# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of any type of transformers, made from the defaults of its config."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from .sizes import GROUPED_HEADS, OVERRIDES, SIZES, VOCABULARY

VOCABULARY_FIELD = re.compile(r"vocab_size|^n_vocab")
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
TYPE_LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
ONE_EACH = ("depths", "num_hidden_layers", "encoder_layers", "layers", "stage_depths", "stage_num_blocks")
WIDTH_LISTS = ("hidden_sizes", "embed_dims", "dims", "neck_hidden_sizes", "embed_dim", "stage_dims")
LARGEST = 40_000_000
KINDS: dict[str, tuple[str, str]] = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "vision": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "audio": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "vision-language": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
}
ENCODERS_AS_DECODERS = [
    "bert",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "bert-generation",
]
DECODERS_ALONE = [
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "whisper",
    "trocr",
]


def model_types(kind: str) -> list[str]:
    """Types of which transformers has a model of the kind."""
    names = getattr(modeling_auto, KINDS[kind][1])
    return [name for name in names if name == name.lower() and name in transformers.CONFIG_MAPPING]


def build(kind: str, model_type: str) -> Any:
    """A tiny model in evaluation mode; whatever its config or its code raises, where it cannot be made tiny."""
    make = getattr(transformers, KINDS[kind][0]).from_config
    last: Exception | None = None
    for plain_heads in (False, True):
        try:
            config = transformers.CONFIG_MAPPING[model_type]
            made = config(**settings_of(config, plain_heads) | _role(kind, model_type))
            of_several = getattr(modeling_auto, KINDS[kind][1])[model_type]
            if made.architectures is None and isinstance(of_several, (list, tuple)):
                made.architectures = [of_several[0]]
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in make(made).parameters())
            if size > LARGEST:
                raise MemoryError(f"{size / 1e6:.0f}M parameters")
            torch.manual_seed(0)
            return make(made).eval()
        except Exception as error:  # what a config does not like takes any form
            last = last or error
    assert last is not None
    raise last


def _role(kind: str, model_type: str) -> dict[str, Any]:
    if kind == "causal" and model_type in ENCODERS_AS_DECODERS:
        return {"is_decoder": True}
    if kind == "causal" and model_type in DECODERS_ALONE:
        return {"is_decoder": True, "is_encoder_decoder": False}
    return {}


def settings_of(cls: type[PreTrainedConfig], plain_heads: bool = False) -> dict[str, Any]:
    """Arguments that make a config of the class small."""
    default = cls()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    heads = next(
        (fields[n] for n in ("num_attention_heads", "n_head", "num_heads") if isinstance(fields.get(n), int)), 0
    )
    kinds = next((_distinct(fields[name]) for name in TYPE_LISTS[:3] if _is_list(fields.get(name), str)), [])
    layers, special, settings = max(2, len(kinds)), 3, {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = settings_of(type(value), plain_heads) | {"model_type": type(value).model_type}
        elif name.endswith(("_token_id", "_token_index")) and _outside(value):
            special += 1
            number = VOCABULARY - special
            settings[name] = [number] if isinstance(value, list) else number
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_token_id"):
            settings |= _number(name, value, layers, 4 if plain_heads or heads == value else 2)
        elif _is_list(value, int):
            settings |= _numbers(name, value)
    for name in TYPE_LISTS:
        if _is_list(fields.get(name), str) and (kinds or name == "mlp_layer_types"):
            settings[name] = (_distinct(fields[name]) * layers)[:layers]
    settings |= OVERRIDES.get(cls.model_type, {})
    return {name: value for name, value in settings.items() if value != "__drop__"}


def _number(name: str, value: int, layers: int, grouped: int) -> dict[str, int]:
    if VOCABULARY_FIELD.search(name) and value > 0:
        return {name: VOCABULARY}
    if name in GROUPED_HEADS:
        return {name: grouped}
    if name in LENGTH_FIELDS:
        return {name: 512} if value > 1024 else {}
    wanted = SIZES.get(name)
    if wanted is None or value <= 0 or (value < wanted and name != "hidden_size"):
        return {}
    return {name: layers if name in DEPTH_FIELDS else wanted}


def _numbers(name: str, value: list[int]) -> dict[str, list[int]]:
    count = len(value)
    if name in ONE_EACH:
        return {name: [1] * count}
    if name == "conv_dim":
        return {name: [32] * count}
    if name in WIDTH_LISTS:
        return {name: [32 * min(number + 1, 4) for number in range(count)]}
    if name in ("num_attention_heads", "num_heads", "encoder_attention_heads"):
        return {name: [2] * count}
    return {name: [SIZES[name]] * count} if name in ("image_size", "patch_size", "img_size") else {}


def _outside(value: Any) -> bool:
    largest = max(value) if _is_list(value, int) else value
    return isinstance(largest, int) and largest >= VOCABULARY


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, of) for each in value)


def _distinct(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights under which every part of the model matters: fresh ones make attention nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2 and "A_log" not in name and "conv1d" not in name:
            inputs = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            table = "embed" in name and parameter.ndim == 2 and parameter.shape[0] >= 100
            spread = (
                1.0 if table else 0.5 if "relative" in name and "bias" in name else 0.9 / math.sqrt(max(inputs, 1))
            )
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        elif "sink" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias") and parameter.ndim == 1 and "dt_bias" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif torch.isnan(parameter).any() or parameter.abs().max() > 1e4:
            parameter.zero_()
        elif parameter.ndim == 1 and 0 < parameter.abs().max() < 0.02:  # layer scale, which hides a block
            parameter.fill_(0.5)
