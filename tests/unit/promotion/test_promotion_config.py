# SPDX-License-Identifier: Apache-2.0
"""What ProMotion's config and tuner refuse, and what follows from the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftConfig, get_peft_model
from tiny_promotion import SHAPE, SMALL, adapted, backbone, classifier, images, units
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

from peft_promptmoe import ProMotionConfig

TEMPERATURES = ("sinkhorn_eps", "margin_temperature", "read_temperature")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_dim": 0}, "bottleneck_dim must be from 1"),
        ({"bottleneck_dim": 10, "num_heads": 3}, "num_heads=3 does not divide bottleneck_dim=10"),
        ({"num_prototypes": 10_000, "bottleneck_dim": 4_096}, "make more than 4194304 values"),
        ({"bottleneck_dim": 4_096}, "tensors of more than 4194304 values"),
        ({"denoise_steps": 10**6}, "denoise_steps must be from 0"),
        ({"estimation_rounds": 10**6}, "estimation_rounds must be from 1"),
        ({"sinkhorn_rounds": 0}, "sinkhorn_rounds must be from 1"),
        ({"proposal": "pool", "num_prototypes": 8}, "got num_prototypes=8"),
        ({"proposal": "pool", "bank_momentum": 0.9}, "bank_momentum has no effect"),
        ({"proposal": "pool", "reseed_after": 2}, "reseed_after=2 needs a bank that learns"),
        ({"bank_momentum": 1.0, "reseed_after": 2}, "reseed_after=2 needs a bank that learns"),
        ({"denoise_steps": 0, "denoise_weight": 1.0}, "has no effect with denoise_steps=0"),
        ({"denoise_steps": 0, "noisy_features": True}, "needs a denoiser"),
        ({"feedback": False, "margin_weight": 0.0, "compact_weight": 0.0}, "prototypes without any effect"),
        ({"feedback": False, "read_top": 1}, "read_top has no effect"),
        ({"read_top": 17}, "read_top must be from 1 to 16"),
        ({"balance": 1.5}, "balance must be at most 1"),
        ({"denoise_share": 0.0}, "denoise_share must be greater than 0"),
        ({"denoise_share": 2.0}, "denoise_share must be at most 1"),
        ({"noise_std": 0.0}, "noise_std must be greater than 0"),
        ({"unit_scale": 0.0}, "unit_scale must be greater than 0"),
        ({"sinkhorn_eps": float("nan")}, "sinkhorn_eps must be at least 1e-06"),
        *(({name: 1e-40}, f"{name} must be at least 1e-06") for name in TEMPERATURES),
        ({"denoiser": "none"}, "denoiser must be one of"),
        ({"bank_momentum": 1.5}, "bank_momentum must be at most 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProMotionConfig(**settings)


@pytest.mark.parametrize("name", [f for f in ProMotionConfig.__dataclass_fields__ if f in vars(ProMotionConfig())])
def test_wrong_types_are_refused(name: str) -> None:
    if name not in ProMotionConfig.__annotations__:
        return
    with pytest.raises((TypeError, ValueError)):
        ProMotionConfig(**{name: [object()]})


def test_unset_weights_follow_from_the_other_settings(tmp_path: Path) -> None:
    assert (ProMotionConfig().denoise_weight, ProMotionConfig().bank_momentum) == (1.0, 0.99)
    plain = ProMotionConfig(denoise_steps=0, proposal="pool")
    assert (plain.denoise_weight, plain.bank_momentum) == (None, None)
    again = dataclasses.replace(plain, denoise_steps=1, proposal="bank")
    assert (again.denoise_weight, again.bank_momentum) == (1.0, 0.99)
    plain.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == plain.to_dict()
    assert "num_virtual_tokens" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_units_of_older_adapters_keep_their_scale(tmp_path: Path) -> None:
    assert ProMotionConfig().unit_scale == 0.25
    ProMotionConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    assert stored["unit_scale"] == 0.25
    file.write_text(json.dumps({name: value for name, value in stored.items() if name != "unit_scale"}))
    assert PeftConfig.from_pretrained(tmp_path).unit_scale == 1.0  # type: ignore[attr-defined]


def test_sizes_are_those_of_the_specification() -> None:
    """58,753 trained values at width 768 and 33,025 at 384."""
    for width, count in ((768, 58_753), (384, 33_025)):
        with torch.device("meta"):
            base = ViTModel(ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=6))
            model = get_peft_model(base, ProMotionConfig(layers_to_transform=[0]))
        assert model.get_nb_trainable_parameters()[0] == count
        assert sum(p.numel() for name, p in model.named_parameters() if "promotion_bank" in name) == 16 * 32


def blocks_of(model: nn.Module) -> list[int]:
    return [unit.site.index for unit in units(model)]


def test_units_stand_behind_every_block_unless_somebody_says() -> None:
    config = ProMotionConfig(**SMALL)
    base = classifier(num_hidden_layers=12, hidden_size=8)
    assert blocks_of(get_peft_model(base, config)) == [*range(12)] == config.layers_to_transform
    every = ProMotionConfig(**SMALL, target_modules=r".*encoder\.layer\.\d+\.attention")
    assert blocks_of(get_peft_model(classifier(), every)) == [0, 1, 2]


def test_a_method_that_is_called_read_blocks_says_nothing() -> None:
    class Own(ViTModel):
        def read_blocks(self) -> None: ...

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = get_peft_model(Own(ViTConfig(image_size=32, patch_size=4, **sizes)), ProMotionConfig(num_prototypes=2))
    assert model.peft_config["default"].layers_to_transform == [0, 1, 2, 3]


def test_no_unit_stands_behind_the_last_block_whose_map_a_backbone_puts_out() -> None:
    base = backbone()
    base.config.out_features = base._out_features = ["stage2"]
    assert list(base.out_features) == ["stage2"]
    assert blocks_of(get_peft_model(base, ProMotionConfig(**SMALL))) == [0, 1]


class Levels(nn.Module):
    """A model that says which blocks it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False)
        self.read_blocks = [1]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixel_values).last_hidden_state


def test_no_unit_stands_behind_the_last_level_that_heads_read() -> None:
    assert blocks_of(get_peft_model(Levels(), ProMotionConfig(**SMALL))) == [0, 1]
    without_last = ProMotionConfig(**SMALL, exclude_modules=r".*\.1\..*")
    assert blocks_of(get_peft_model(Levels(), without_last)) == [0]


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (lambda: BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)), {}, "patch grid"),
        (classifier, {"task_type": "SEQ_CLS"}, "Leave task_type unset"),
        (classifier, {"layers_to_transform": [5]}, "names layer 5, not among .*: 0 to "),
        (classifier, {"modules_to_save": ["projection"]}, "would copy the patch embedding"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, depth=2),
            {"backbone_eval": False},
            "drops patches in training",
        ),
        (lambda: ViTMAEModel(ViTMAEConfig(**SHAPE)), {}, "masks and shuffles patches"),
    ],
    ids=["text", "task", "layers", "embedding", "dropped-patches", "hidden-patches"],
)
def test_models_that_do_not_fit_are_refused_untouched(base: Any, settings: dict[str, Any], message: str) -> None:
    model = base()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ProMotionConfig(**SMALL, **settings))
    assert [name for name, _ in model.named_modules()] == before


def test_too_many_prototypes_are_refused_with_the_grid() -> None:
    model = adapted(num_prototypes=5).eval()
    with pytest.raises(ValueError, match=r"num_prototypes=5 .* 16 patches \(4 x 4\)"):
        model(**images())
    assert model(**images(shape=(32, 48))).logits.shape == (4, 3)


def test_too_many_prototypes_are_refused_at_once_where_images_have_one_size() -> None:
    def base(**settings: Any) -> Any:
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, **settings)

    with pytest.raises(ValueError, match=r"num_prototypes=5 .* 16 patches \(4 x 4\)"):
        get_peft_model(base(), ProMotionConfig(num_prototypes=5))
    get_peft_model(base(), ProMotionConfig(num_prototypes=4))
    get_peft_model(base(dynamic_img_size=True), ProMotionConfig(num_prototypes=5))
