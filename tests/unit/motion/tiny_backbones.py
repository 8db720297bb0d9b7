# SPDX-License-Identifier: Apache-2.0
"""Small vision backbones of every kind that maps are read from, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    GLPNConfig,
    GLPNForDepthEstimation,
    ResNetBackbone,
    ResNetConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinBackbone,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

PATCH = 14
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 4 * PATCH,
    "patch_size": PATCH,
}
MLP: dict[str, Any] = {"intermediate_size": 64}
NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 16, 16, 32], "fusion_hidden_size": 16}


def dinov2(**more: Any) -> Any:
    return Dinov2Backbone(Dinov2Config(**{**SIZES, "out_indices": [2, 3, 4], **more}))


def timm_vit(**more: Any) -> Any:
    sizes: dict[str, Any] = {"img_size": 64, "depth": 6, "embed_dim": 48, "num_classes": 0, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **more})


def swin() -> Any:
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16}
    return SwinBackbone(SwinConfig(**sizes, depths=[1, 1, 1], num_heads=[1, 2, 4], out_indices=[1, 2, 3]))


def resnet() -> Any:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return ResNetBackbone(ResNetConfig(**sizes, out_indices=[2, 3]))


BACKBONES: dict[str, Callable[[], Any]] = {
    "beit": lambda: BeitModel(BeitConfig(**SIZES, **MLP)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **MLP)),
    "deit": lambda: DeiTModel(DeiTConfig(**SIZES, **MLP)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2-backbone": dinov2,
    "dinov2-registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, **MLP)),
    "resnet-backbone": resnet,
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **MLP)),
    "swin-backbone": swin,
    "timm": timm_vit,
    "vit": lambda: ViTModel(ViTConfig(**SIZES, **MLP)),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**SIZES, **MLP)),
}


def depth_anything(kind: str = "relative") -> Any:
    inner = Dinov2Config(**SIZES, out_indices=[1, 2, 3, 6], reshape_hidden_states=False)
    sizes: dict[str, Any] = {"patch_size": PATCH, "reassemble_hidden_size": 32, "head_hidden_size": 8, **NECK}
    config = DepthAnythingConfig(backbone_config=inner, depth_estimation_type=kind, max_depth=20, **sizes)
    return DepthAnythingForDepthEstimation(config)


def dpt() -> Any:
    return DPTForDepthEstimation(DPTConfig(**SIZES, **MLP, **NECK, backbone_out_indices=[1, 2, 3, 5]))


def dpt_on_backbone() -> Any:
    inner = Dinov2Config(**SIZES, out_indices=[1, 2, 3, 6], reshape_hidden_states=False)
    return DPTForDepthEstimation(DPTConfig(backbone_config=inner, **NECK))


def glpn() -> Any:
    sizes: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 8}
    return GLPNForDepthEstimation(GLPNConfig(**sizes, num_encoder_blocks=4, num_attention_heads=[1, 1, 2, 2]))


DEPTH_MODELS: dict[str, Callable[[], Any]] = {
    "depth-anything": depth_anything,
    "depth-anything-metric": lambda: depth_anything("metric"),
    "dpt": dpt,
    "dpt-backbone": dpt_on_backbone,
    "glpn": glpn,
}


def batch(task: str, size: tuple[int, int] = (60, 70), labels: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Two images with labels for "flow", "depth" or "joint"; `size` is of no whole patches."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.randn(2, 3, *size, generator=generator)}
    labels = labels or size
    if task != "depth":
        inputs["next_pixel_values"] = torch.randn(2, 3, *size, generator=generator)
        inputs["flow_labels"] = 4 * torch.randn(2, 2, *labels, generator=generator)
    if task != "flow":
        inputs["depth_labels"] = 1 + 10 * torch.rand(2, *labels, generator=generator)
    return inputs
