# SPDX-License-Identifier: Apache-2.0
"""Loads an encoder from a folder: only the libraries' own classes and safetensors, never remote code.

A folder may be untrusted. Its config.json is reduced to the entries that describe the architecture before a library
reads it. The encoder is first built on the meta device, so that everything is checked that needs no weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.integrations import skip_init_on_device
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from .records import MAX_DEPTH, MAX_WIDTH, ExpertRecord, read_tensors
from .sources import Source, explained

# Entries of config.json that name code, other files or kernels, or that make lists as long as a number says.
UNREAD = ("attn_implementation", "auto_map", "id2label", "label2id", "num_labels", "name_or_path")
# Arguments of `timm.create_model` that say where weights come from, or make something else than the model.
NOT_ARGUMENTS = (
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "features_only",
    "model_name",
    "no_jit",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "pruned",
    "scriptable",
)
# Plain vision transformers. The configs of others may name further models, which would be fetched as they are built.
PLAIN = (
    "beit",
    "clip",
    "clip_vision_model",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "siglip",
    "siglip_vision_model",
    "vit",
    "vit_mae",
    "vit_msn",
)
# Of image and text; the text tower is left out.
TWO_TOWERS = ("clip", "siglip")
# Names of numbers that decide how much is built: what a record calls them, and their limit.
NUMBERS = {
    "hidden_size": ("width", MAX_WIDTH),
    "embed_dim": ("width", MAX_WIDTH),
    "num_hidden_layers": ("depth", MAX_DEPTH),
    "depth": ("depth", MAX_DEPTH),
    "depths": ("", MAX_DEPTH),
    "layers": ("", MAX_DEPTH),
}
NOT_PRETRAINED = ("custom_load", "file", "hf_hub_filename", "hf_hub_id", "source", "state_dict", "url")


def build_skeleton(source: Source, record: ExpertRecord | None) -> nn.Module:
    """Build the encoder on the meta device (without memory), as config.json describes it.

    Raises:
        ValueError: it is no image model, or its config.json differs from the recorded expert.
    """
    _check_kind(source, record)
    _check_numbers(source, record)
    if source.is_timm:
        with explained(source), torch.device("meta"):
            return _make_timm(source)
    cls, config = _plan(source)
    with explained(source), torch.device("meta"):
        return cls(config, **_without_pooler(cls))


@skip_init_on_device
def load_encoder(source: Source) -> nn.Module:
    """Load the encoder with its weights, in evaluation mode. Experts are never left on the meta device.

    Raises:
        ValueError: the files lack some of its weights.
    """
    if source.is_timm:
        # Its random weights are overwritten; prompts begin the same with and without an expert to be loaded.
        with explained(source), torch.random.fork_rng(devices=[]):
            encoder = _make_timm(source)
            missing = _fill_timm(encoder, source)
    else:
        cls, config = _plan(source)
        with explained(source), _quiet():
            encoder, report = cls.from_pretrained(
                source.folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **_without_pooler(cls),
            )
            missing = list(report["missing_keys"])
    if missing := sorted(set(missing) & set(read_tensors(encoder))):
        raise ValueError(
            f"The weights of expert {source.name!r} lack {len(missing)} of its tensors, among them {missing[0]!r}: "
            "they do not belong to the model that its config.json describes."
        )
    return encoder.eval()


def _check_kind(source: Source, record: ExpertRecord | None) -> None:
    """Raise ValueError if it is no plain vision transformer, or another one than recorded. Builds nothing."""
    kind = source.settings["architecture" if source.is_timm else "model_type"]
    if not source.is_timm and kind not in PLAIN:
        raise ValueError(
            f"Expert {source.name!r} is a {kind}. Experts that are loaded by name are plain vision transformers: "
            f"{', '.join(PLAIN)}, or timm's. If it is one of these, load it yourself and pass the module."
        )
    if record is not None and record.type not in (kind, f"{kind}_vision_model"):
        raise ValueError(
            f"Expert {source.name!r} is a {kind!r:.80}, but the adapter was trained with {record.name!r} of type "
            f"{record.type}. Use the expert that it was trained with."
        )


def _check_numbers(source: Source, record: ExpertRecord | None) -> None:
    """Raise ValueError for sizes that differ from the recorded ones or are absurd. Builds nothing."""
    settings = source.settings
    if source.is_timm:
        parts = [settings, settings.get("model_args")]
    else:
        parts = [settings.get("vision_config") if settings["model_type"] in TWO_TOWERS else settings]
    for part in [part for part in parts if isinstance(part, dict)]:
        for name, (field, limit) in NUMBERS.items():
            found = part.get(name)
            for value in found if isinstance(found, list) else [found]:
                if isinstance(value, (int, float)) and not 0 < value <= limit:
                    raise ValueError(
                        f"Expert {source.name!r} has {name}={value} in config.json, above the limit {limit}."
                    )
            if record is not None and field and isinstance(found, int) and found != getattr(record, field):
                raise ValueError(
                    f"Expert {source.name!r} has {name}={found}, but the adapter was trained with {record.name!r} of "
                    f"{field} {getattr(record, field)}. Use the expert that it was trained with."
                )


def _plan(source: Source) -> tuple[Any, Any]:
    """Class and config of transformers for a folder."""
    settings = _reduced(source.settings)
    with explained(source):
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        if settings["model_type"] in TWO_TOWERS:
            config = config.vision_config
        cls = MODEL_MAPPING.get(type(config), None)
    if getattr(cls, "main_input_name", None) != "pixel_values":
        raise ValueError(
            f"Expert {source.name!r} is a {settings['model_type']}, which reads no images. Experts are plain vision "
            "transformers (ViT, DINOv2, CLIP's vision tower)."
        )
    return cls, config


def _reduced(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _reduced(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in UNREAD and not name.startswith("_")
    }


def _without_pooler(cls: Any) -> dict[str, bool]:
    """Arguments that leave the pooler out: it is not used, and checkpoints of classifiers lack it."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls).parameters else {}


def _make_timm(source: Source) -> nn.Module:
    import timm
    from timm.models import PretrainedCfg

    settings = source.settings
    known, arguments = settings.get("pretrained_cfg", settings), dict(settings.get("model_args") or {})
    arguments.pop("num_classes", None)  # newer timm stores it here, too; the head is left out
    if odd := sorted(set(arguments) & set(NOT_ARGUMENTS)):
        raise ValueError(f"model_args has {', '.join(odd)}, which no model of a folder may set")
    # A prefix would make it the name of another source.
    if not re.fullmatch(r"\w+(\.[\w\-]+)?", settings["architecture"]) or not timm.is_model(settings["architecture"]):
        raise ValueError(f"timm has no architecture {settings['architecture']!r:.80}")
    allowed = {field.name for field in dataclasses.fields(PretrainedCfg)} - {*NOT_PRETRAINED, "num_classes"}
    return timm.create_model(
        settings["architecture"],
        pretrained=False,
        pretrained_cfg={name: value for name, value in known.items() if name in allowed},
        num_classes=0,
        **arguments,
    )


def _fill_timm(encoder: nn.Module, source: Source) -> list[str]:
    """Load weights like timm, which converts those of other libraries. Return the names that the files lack."""
    weights = {
        name.removeprefix("timm_model."): tensor for file in source.files for name, tensor in load_file(file).items()
    }
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        weights = convert(weights, encoder)
    return list(encoder.load_state_dict(weights, strict=False).missing_keys)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report about the unused head. Missing weights are checked here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
