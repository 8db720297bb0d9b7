# SPDX-License-Identifier: Apache-2.0
"""Vision models beside classifiers: dense prediction, detection, video, and towers by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from .inputs import Inputs, noise
from .tiny import settings_of

FOUR = {"num_hidden_layers": 4}
BLOCKS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SWIN = {
    "depths": [1, 1, 1, 1],
    "embed_dim": 16,
    "image_size": 64,
    "num_heads": [1, 2, 2, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "window_size": 4,
}
RESNET = {"depths": [1, 1, 1, 1], "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32]}
DETR = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}
NECK = {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16}
HEAD = {"reassemble_hidden_size": 64, "head_hidden_size": 8, "patch_size": 14} | NECK
STEPS = {"hidden_size": 64, "image_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 8}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        model: class of transformers.
        settings: of its config, beside what makes any config small.
        inputs: what it is run on.
        backbone: class of the config of its backbone, and
        of_backbone: its settings.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Inputs] = field(default_factory=lambda: images(32))
    backbone: str | None = None
    of_backbone: dict[str, Any] = field(default_factory=dict)


def images(side: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": noise(2, 3, side, side)}


def frames() -> Inputs:
    return {"pixel_values": noise(2, 4, 3, 32, 32)}


def _videos_alone() -> Inputs:
    return {"pixel_values_videos": noise(2, 4, 3, 32, 32), "skip_predictor": True}


def _patches() -> Inputs:
    return {
        "pixel_values": noise(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }


def _sized() -> Inputs:
    return images(32)() | {"image_sizes": torch.tensor([[32, 32]] * 2)}


def _with_words() -> Inputs:
    return images(32)() | {"input_ids": torch.arange(5, 13).repeat(2, 1)}


_BEIT = {"image_size": 32, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "patch_size": 8} | BLOCKS
_DINOV2 = {
    "hidden_size": 64,
    "image_size": 56,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "patch_size": 14,
    "reshape_hidden_states": False,
}
_CONVNEXT = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_UPERNET = {"auxiliary_channels": 16, "hidden_size": 32}
_DPT = {"backbone_config": None, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False} | FOUR | NECK

CASES: dict[str, dict[str, Case]] = {
    "dense": {
        "beit": Case("BeitForSemanticSegmentation", {"out_indices": [0, 1, 2, 3]} | FOUR),
        "depth_anything": Case("DepthAnythingForDepthEstimation", HEAD, images(56), "Dinov2Config", _DINOV2),
        "dpt (depth)": Case("DPTForDepthEstimation", _DPT),
        "dpt (segmentation)": Case("DPTForSemanticSegmentation", _DPT),
        "prompt_depth_anything": Case(
            "PromptDepthAnythingForDepthEstimation", HEAD, images(56), "Dinov2Config", _DINOV2
        ),
        "segformer": Case(
            "SegformerForSemanticSegmentation",
            {"depths": [1] * 4, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 2]},
            images(64),
        ),
        "upernet (beit)": Case(
            "UperNetForSemanticSegmentation",
            _UPERNET | {"auxiliary_in_channels": 64},
            images(32),
            "BeitConfig",
            _BEIT | {"add_fpn": True, "reshape_hidden_states": True},
        ),
        "upernet (convnext)": Case(
            "UperNetForSemanticSegmentation",
            _UPERNET | {"auxiliary_in_channels": 32},
            images(64),
            "ConvNextConfig",
            _CONVNEXT,
        ),
        "upernet (swin)": Case(
            "UperNetForSemanticSegmentation",
            _UPERNET | {"auxiliary_in_channels": 64},
            images(64),
            "SwinConfig",
            SWIN,
        ),
        "vitpose": Case(
            "VitPoseForPoseEstimation",
            {"num_labels": 4},
            images(32),
            "VitPoseBackboneConfig",
            BLOCKS | {"image_size": [32, 32], "num_hidden_layers": 2, "out_indices": [2], "patch_size": [8, 8]},
        ),
        "zoedepth": Case(
            "ZoeDepthForDepthEstimation",
            NECK
            | {"bin_embedding_dim": 16, "bottleneck_features": 16, "num_attractors": [2] * 4}
            | {"bin_configurations": [{"max_depth": 10.0, "min_depth": 0.001, "n_bins": 8, "name": "nyu"}]},
            images(32),
            "BeitConfig",
            _BEIT | {"reshape_hidden_states": False, "use_relative_position_bias": True},
        ),
    },
    "detection": {
        "detr": Case(
            "DetrForObjectDetection",
            DETR | {"backbone": None, "use_pretrained_backbone": False, "use_timm_backbone": False},
            images(64),
            "ResNetConfig",
            RESNET | {"out_features": ["stage4"]},
        ),
        "eomt": Case(
            "EomtForUniversalSegmentation", {"num_blocks": 2, "num_queries": 5, "num_upscale_blocks": 1} | FOUR
        ),
        "mask2former": Case(
            "Mask2FormerForUniversalSegmentation",
            {"decoder_layers": 2, "encoder_layers": 1, "feature_size": 32, "hidden_dim": 32, "mask_feature_size": 32},
            images(64),
            "SwinConfig",
            SWIN,
        ),
        "rt_detr": Case(
            "RTDetrForObjectDetection",
            {
                "d_model": 32,
                "decoder_in_channels": [32] * 3,
                "encoder_hidden_dim": 32,
                "encoder_in_channels": [16, 32, 32],
                "num_denoising": 0,
                "num_queries": 5,
            },
            images(64),
            "RTDetrResNetConfig",
            RESNET | {"out_features": ["stage2", "stage3", "stage4"]},
        ),
        "yolos": Case("YolosForObjectDetection", {"image_size": [32, 32], "num_detection_tokens": 5}),
    },
    "video": {
        "timesformer": Case("TimesformerForVideoClassification", {"num_frames": 4}, frames),
        "videomae": Case("VideoMAEForVideoClassification", {"num_frames": 4, "tubelet_size": 2}, frames),
        "vivit": Case("VivitForVideoClassification", {"num_frames": 4, "tubelet_size": [2, 8, 8]}, frames),
        "vjepa2": Case(
            "VJEPA2Model",
            {"crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 32, "pred_num_attention_heads": 2}
            | {"pred_num_hidden_layers": 1, "tubelet_size": 2},
            _videos_alone,
        ),
    },
    "towers": {
        "aimv2": Case("Aimv2VisionModel"),
        "blip": Case("BlipVisionModel"),
        "clip": Case("CLIPVisionModel"),
        "clipseg": Case("CLIPSegVisionModel"),
        "dinov2": Case("Dinov2Model"),
        "dinov3_convnext": Case(
            "DINOv3ConvNextModel", {"depths": [1] * 4, "hidden_sizes": [16, 32, 32, 64]}, images(64)
        ),
        "dinov3_vit": Case("DINOv3ViTModel"),
        "groupvit": Case("GroupViTVisionModel"),
        "idefics3": Case("Idefics3VisionTransformer"),
        "ijepa": Case("IJepaModel"),
        "internvl": Case("InternVLVisionModel"),
        "mlcd": Case("MLCDVisionModel"),
        "owlvit": Case("OwlViTVisionModel"),
        "pixtral": Case("PixtralVisionModel", inputs=_sized),
        "sam": Case("SamVisionModel", STEPS | {"global_attn_indexes": [1], "window_size": 4}, images(64)),
        "siglip": Case("SiglipVisionModel"),
        "siglip2": Case("Siglip2VisionModel", {"num_patches": 16}, _patches),
        "vit (masked)": Case("ViTForMaskedImageModeling", {"encoder_stride": 8}),
        "vit_mae": Case("ViTMAEModel"),
        "vitdet": Case("VitDetModel"),
    },
}


# One timm model of each kind of block, small ones; the rest of a module is built alike.
TIMM = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "naflexvit_base_patch16_gap",
    "vit_dlittle_patch16_reg1_gap_256",
    "flexivit_small",
    "vit_betwixt_patch16_reg4_gap_256",
    "cait_xxs24_224",
    "convit_tiny",
    "crossvit_tiny_240",
    "davit_tiny",
    "efficientformer_l1",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "levit_128",
    "maxvit_tiny_tf_224",
    "mvitv2_tiny",
    "nest_tiny",
    "pit_ti_224",
    "pvt_v2_b0",
    "samvit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tnt_s_patch16_224",
    "twins_svt_small",
    "visformer_tiny",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
    "resnet18",
]


def build_case(kind: str, name: str) -> tuple[Any, Inputs]:
    """A tiny random model in evaluation mode, and inputs that it takes."""
    case = CASES[kind][name]
    cls = getattr(transformers, case.model)
    settings = settings_of(cls.config_class) | case.settings
    if case.backbone is not None:
        settings["backbone_config"] = getattr(transformers, case.backbone)(**case.of_backbone)
    torch.manual_seed(0)
    return cls(cls.config_class(**settings)).eval(), case.inputs()
