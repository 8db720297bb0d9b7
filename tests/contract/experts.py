# SPDX-License-Identifier: Apache-2.0
"""Folders with tiny frozen backbones, which the cases of pMoE name as their experts.

A case's adapter is loaded by name in processes of its own, so the folders stand at a place that all of them know.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

ROOT = Path(tempfile.gettempdir()) / f"peft_promptmoe_test_experts_{os.getuid()}"
_SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
_TIMM = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}


def _dinov2(folder: Path) -> None:
    _large(Dinov2Model(Dinov2Config(hidden_size=16, **_SHAPE))).save_pretrained(folder)


def _vit(folder: Path) -> None:
    _large(ViTModel(ViTConfig(hidden_size=32, **_SHAPE), add_pooling_layer=False)).save_pretrained(folder)


def _timm(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = _large(timm.create_model("vit_tiny_patch16_224", num_classes=0, **_TIMM))
    pretrained = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32], "num_classes": 0}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": _TIMM,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")


MAKERS: dict[str, Callable[[Path], None]] = {"dinov2": _dinov2, "vit": _vit, "timm": _timm}


def expert(name: str) -> str:
    """Folder of an expert, made if it is not there yet."""
    target = ROOT / name
    if not target.exists():
        ROOT.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=ROOT))
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            MAKERS[name](partial)
        try:
            partial.rename(target)
        except OSError:  # another process was quicker
            shutil.rmtree(partial)
    return str(target)


def _large(model: nn.Module) -> nn.Module:
    """Weights by which every token matters."""
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            weight.add_(0.1 * noise) if weight.ndim == 1 else weight.copy_(0.25 * noise)
    return model
