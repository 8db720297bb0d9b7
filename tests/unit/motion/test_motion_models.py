# SPDX-License-Identifier: Apache-2.0
"""FlowModel, DepthModel and MotionModel on every kind of backbone: what they read, return, train, save and refuse."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_backbones import BACKBONES, PATCH, SIZES, batch, dinov2, resnet, timm_vit
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Dinov2Config,
    Dinov2Model,
    HieraBackbone,
    HieraConfig,
    LwDetrViTBackbone,
    LwDetrViTConfig,
    TimmBackbone,
    TimmBackboneConfig,
    ViTMAEConfig,
    ViTMAEModel,
    YolosConfig,
    YolosModel,
)
from transformers.utils import ModelOutput

from peft_promptmoe import DepthModel, FlowModel, MotionModel
from peft_promptmoe.motion.backbone import default_levels

MODELS: dict[str, Any] = {"flow": FlowModel, "depth": DepthModel, "joint": MotionModel}

each_backbone = pytest.mark.parametrize("name", sorted(BACKBONES))
each_task = pytest.mark.parametrize("task", sorted(MODELS))


def blocks_of(backbone: Any) -> Any:
    return backbone.blocks if hasattr(backbone, "blocks") else backbone.encoder.layer


@each_task
@each_backbone
def test_it_predicts_at_the_size_of_images_or_labels_and_trains_its_heads(name: str, task: str) -> None:
    model = MODELS[task](BACKBONES[name]()).train()
    inputs = batch(task, labels=(33, 45))
    output = model(**inputs)
    shapes = {"flow": (2, 2, 33, 45), "depth": (2, 33, 45)}
    wanted = {k: v for k, v in shapes.items() if task in (k, "joint")}
    assert {k: tuple(v.shape) for k, v in output.items() if k != "loss"} == wanted
    output.loss.backward()
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and {path.split(".")[0] for path in trained} == set(model.head_names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    free = model(**{k: v for k, v in inputs.items() if "label" not in k})
    assert free.loss is None
    assert all(tuple(v.shape[-2:]) == (60, 70) for v in free.values())


@each_backbone
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path: Path) -> None:
    model = MotionModel(BACKBONES[name](), max_flow=77.0, channels=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = MotionModel.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert 'MotionModel.from_pretrained(".")' in card and "More Information Needed" not in card
    assert not loaded.training and loaded.max_flow == 77.0 and loaded.name_or_path == str(tmp_path)
    inputs = batch("joint")
    expected, found = model(**inputs), loaded(**inputs)
    assert all(torch.equal(expected[key], found[key]) for key in ("loss", "flow", "depth"))


def test_default_levels() -> None:
    assert default_levels("flow", 12) == [3, 4, 5]
    assert default_levels("depth", 12) == [5, 8, 11]
    assert default_levels("flow", 24) == [7, 9, 11]
    assert default_levels("flow", 1) == default_levels("depth", 1) == [0]


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "timm"])
def test_levels_are_the_outputs_of_their_blocks(name: str) -> None:
    backbone = BACKBONES[name]().eval()
    model = FlowModel(backbone, levels=[1, 4])
    seen: dict[int, Tensor] = {}
    for number, block in enumerate(blocks_of(backbone)):
        block.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output}))
    patch = model.reader.patch[0]
    pixels = torch.randn(2, 3, 2 * patch, 3 * patch)
    maps = model.reader.read(backbone, pixels)
    assert sorted(maps) == [1, 4]
    for level, found in maps.items():
        assert torch.equal(found.flatten(2).transpose(1, 2), seen[level][:, -6:])
    # in timm nothing behind the last level is computed
    assert max(seen) == (4 if name == "timm" else 5)


@pytest.mark.parametrize("name", ["dinov2", "dinov2-backbone", "timm"])
def test_what_a_hook_does_to_a_block_is_in_its_map(name: str) -> None:
    """Tuners hook blocks with `prepend=True`, in front of the hooks by which transformers records hidden states."""
    backbone = BACKBONES[name]().eval()
    levels = [1, 2, 3]
    model = FlowModel(backbone, levels=levels)
    pixels = torch.randn(1, 3, 4 * model.reader.patch[0], 4 * model.reader.patch[0])
    before = model.reader.read(backbone, pixels)
    handle = blocks_of(backbone)[levels[-1]].register_forward_hook(lambda m, a, out: out + 1.0, prepend=True)
    after = model.reader.read(backbone, pixels)
    handle.remove()
    read = sorted(before)
    assert all(torch.equal(before[level], after[level]) for level in read[:-1])
    assert not torch.allclose(before[read[-1]], after[read[-1]], atol=0.1) or name == "dinov2-backbone"
    assert not torch.equal(before[read[-1]], after[read[-1]])


def test_an_autobackbone_is_read_at_its_out_indices_or_those_that_are_named() -> None:
    assert FlowModel(dinov2(out_indices=[2, 3, 4])).levels == {"flow": [0, 1, 2]}
    assert FlowModel(dinov2(out_indices=[2, 3, 4]), levels=[2]).levels == {"flow": [1]}
    joint = MotionModel(dinov2(out_indices=[2, 3, 6]), levels={"flow": [1, 2], "depth": [5]})
    assert joint.levels == {"flow": [0, 1], "depth": [2]}
    with pytest.raises(ValueError, match=r"out_indices=\[2, 5\]"):
        FlowModel(dinov2(out_indices=[2, 3, 4]), levels=[1, 4])
    with pytest.warns(UserWarning, match=r"out_indices=\[2, 3\]"):
        FlowModel(dinov2(out_indices=[6]))


def test_blocks_behind_the_last_level_can_be_left_out(tmp_path: Path) -> None:
    """As the docstring says: fewer blocks, the same maps."""
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    cls = type(dinov2())
    full = cls.from_pretrained(tmp_path, out_indices=[2, 3])
    cut = cls.from_pretrained(tmp_path, num_hidden_layers=3, out_indices=[2, 3])
    assert len(cut.encoder.layer) == 3
    pixels = torch.randn(1, 3, 28, 42)
    for one, two in zip(full(pixels).feature_maps, cut(pixels).feature_maps, strict=True):
        assert torch.equal(one, two)


def test_a_model_that_was_loaded_with_fewer_blocks_is_saved_and_loaded(tmp_path: Path) -> None:
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path / "whole")
    model = FlowModel(Dinov2Model.from_pretrained(tmp_path / "whole", num_hidden_layers=3), levels=[1, 2]).eval()
    model.save_pretrained(tmp_path / "flow")
    inputs = batch("flow")
    assert torch.equal(FlowModel.from_pretrained(tmp_path / "flow")(**inputs).flow, model(**inputs).flow)


# -- values -----------------------------------------------------------------------------------------------------------


class PatchColours(nn.Module):
    """A backbone of no attention: every patch's own pixels, mixed; what a patch becomes depends on nothing else."""

    main_input_name = "pixel_values"
    stage_names = ("stem", "stage1")
    out_features = ("stage1",)
    out_indices = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.config = Dinov2Config(image_size=56, patch_size=PATCH)
        self.embedding = nn.Conv2d(3, 64, PATCH, PATCH, bias=False)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> ModelOutput:
        return ModelOutput(feature_maps=(self.embedding(pixel_values),))


def test_padding_to_patches_does_not_change_flow_inside() -> None:
    """Of the same photo, cut within its last patches, the same flow, but for what the border's cells tell others."""
    model = FlowModel(PatchColours(), refinements=0).eval()
    with torch.no_grad():
        model.flow_head.temperature.fill_(6.0)
    frames, after = torch.randn(1, 3, 8 * PATCH, 8 * PATCH), torch.randn(1, 3, 8 * PATCH, 8 * PATCH)
    after[..., : 4 * PATCH, : 4 * PATCH] = frames[..., 2 * PATCH : 6 * PATCH, PATCH : 5 * PATCH]
    whole = model(pixel_values=frames, next_pixel_values=after).flow
    cut = (slice(None), slice(None), slice(0, 7 * PATCH + 3), slice(0, 7 * PATCH + 5))
    part = model(pixel_values=frames[cut], next_pixel_values=after[cut]).flow
    assert part.shape[-2:] == (7 * PATCH + 3, 7 * PATCH + 5)
    inside = (slice(None), slice(None), slice(3 * PATCH, 5 * PATCH), slice(2 * PATCH, 4 * PATCH))
    assert torch.allclose(part[inside], whole[inside], atol=1e-3)
    expected = torch.tensor([-PATCH, -2 * PATCH], dtype=torch.float32)[:, None, None]
    assert (whole[inside] - expected).abs().max() < 0.5


def test_labels_of_another_size_scale_flow_by_each_axis() -> None:
    model, inputs = FlowModel(dinov2()).eval(), batch("flow", size=(56, 70))
    plain = model(**{k: v for k, v in inputs.items() if "label" not in k}).flow
    small = model(**{**inputs, "flow_labels": torch.zeros(2, 2, 28, 14)}).flow
    expected = F.interpolate(plain, (28, 14), mode="bilinear", align_corners=False)
    expected = expected * torch.tensor([14 / 70, 28 / 56])[:, None, None]
    assert torch.allclose(small, expected, atol=1e-5)


def test_the_loss_compares_at_the_labels_size() -> None:
    model, inputs = FlowModel(dinov2(), refinements=0).eval(), batch("flow", labels=(30, 20))
    output = model(**inputs)
    expected = (output.flow - inputs["flow_labels"]).abs().sum(dim=1).mean()
    assert torch.allclose(output.loss, expected, atol=1e-4)
    mask = torch.zeros(2, 30, 20, dtype=torch.bool)
    mask[1, 5:9] = True
    masked = model(**inputs, flow_mask=mask).loss
    assert torch.allclose(masked, (output.flow - inputs["flow_labels"]).abs().sum(dim=1)[mask].mean(), atol=1e-4)


@each_task
@pytest.mark.parametrize("name", ["dinov2-backbone", "timm"])
def test_an_example_does_not_depend_on_its_batch(name: str, task: str) -> None:
    model = MODELS[task](BACKBONES[name]()).eval()
    inputs = {k: v for k, v in batch(task).items() if "label" not in k}
    both = model(**inputs)
    for index in (0, 1):
        alone = model(**{k: v[index : index + 1] for k, v in inputs.items()})
        for key, value in alone.items():
            assert torch.allclose(value[0], both[key][index], atol=1e-4)


def test_nan_pixels_pass_through() -> None:
    inputs = batch("flow")
    inputs["pixel_values"][0] = torch.nan
    flow = FlowModel(dinov2()).eval()(**inputs).flow
    assert flow[0].isnan().all() and flow[1].isfinite().all()


# -- joint ------------------------------------------------------------------------------------------------------------


def test_joint_losses_are_weighted_and_a_task_without_labels_is_left_out() -> None:
    inputs = batch("joint")
    model = MotionModel(dinov2(), task_weights={"depth": 3.0}).eval()
    output = model(**inputs)
    losses = model.last_losses
    assert set(losses) == {"flow", "depth"} and not any(loss.requires_grad for loss in losses.values())
    assert torch.allclose(output.loss, losses["flow"] + 3 * losses["depth"])
    del inputs["flow_labels"]
    output = model(**inputs)
    assert torch.allclose(output.loss, 3 * losses["depth"]) and set(model.last_losses) == {"depth"}
    assert output.flow is not None
    del inputs["next_pixel_values"]
    single = model(**inputs)
    assert single.flow is None and torch.allclose(single.depth, output.depth, atol=1e-4)


def test_threads_do_not_mix_up_their_losses() -> None:
    """Flow's loss of one batch and depth's of another, side by side."""
    model = MotionModel(dinov2()).eval()
    inputs = batch("joint")
    pixels = {key: inputs[key] for key in ("pixel_values", "next_pixel_values")}
    kinds = [pixels | {key: inputs[key]} for key in ("flow_labels", "depth_labels")] + [inputs]
    expected = [model(**each).loss for each in kinds]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: model(**kinds[number % 3]).loss, range(36)))
    for number, loss in enumerate(found):
        assert torch.allclose(loss, expected[number % 3], atol=1e-4)


# -- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2-backbone", "timm", "vit"])
def test_a_frozen_backbone_stays_frozen_and_in_evaluation_mode(name: str) -> None:
    backbone = BACKBONES[name]()
    backbone.train()
    model = FlowModel(backbone).train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    dropouts = [module for module in backbone.modules() if "Drop" in type(module).__name__]
    assert dropouts and not any(module.training for module in dropouts)
    assert model.flow_head.training


def test_full_training_trains_all_that_is_read() -> None:
    model = FlowModel(timm_vit(), freeze_backbone=False).train()
    model(**batch("flow")).loss.backward()
    without = {path for path, parameter in model.named_parameters() if parameter.grad is None}
    assert all(
        path.startswith(("backbone.blocks.3", "backbone.blocks.4", "backbone.blocks.5"))
        for path in without - {"backbone.norm.weight", "backbone.norm.bias"}
    )
    assert "backbone.blocks.2.attn.qkv.weight" not in without


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["dinov2-backbone", "dinov2", "timm"])
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    targets = ["qkv"] if name == "timm" else ["q_proj", "v_proj"]
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = FlowModel(BACKBONES[name]())
        config = LoraConfig(target_modules=targets, modules_to_save=base.head_names, init_lora_weights=False)
        model = get_peft_model(base, config).train()
        assert not model.is_gradient_checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model(**batch("flow")).loss.backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
        if checkpointing:
            model.gradient_checkpointing_disable()
            assert not model.is_gradient_checkpointing
    assert any("lora" in path and gradient.abs().max() > 0 for path, gradient in gradients[1].items())
    assert set(gradients[0]) == set(gradients[1])
    for path, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][path], atol=1e-5), path


@each_task
def test_half_precision_is_finite_and_answers_in_float32(task: str) -> None:
    inputs = batch(task)
    model = MODELS[task](dinov2()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in output.values())
    half = MODELS[task](dinov2()).to(torch.bfloat16).eval()
    frames = {k: v if "label" in k else v.to(torch.bfloat16) for k, v in inputs.items()}
    output = half(**frames)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in output.values())


def test_copies_are_apart() -> None:
    model, inputs = MotionModel(dinov2()).eval(), batch("joint")
    twin = copy.deepcopy(model)
    expected = model(**inputs).flow
    with torch.no_grad():
        twin.flow_head.temperature.add_(1.0)
    assert torch.equal(model(**inputs).flow, expected)
    assert not torch.equal(twin(**inputs).flow, expected)


def test_peft_takes_it_for_a_custom_model() -> None:
    """With a `config` of a model_type it would ask for what models of transformers have."""
    assert not hasattr(FlowModel(dinov2()), "config")


# -- refusals ---------------------------------------------------------------------------------------------------------

INPUTS = batch("joint")
WRONG_INPUTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "labels without a second frame": ({"next_pixel_values": None}, "flow is between two frames"),
    "frames of different sizes": ({"next_pixel_values": torch.zeros(2, 3, 60, 56)}, "different shapes"),
    "one image without a batch": ({"pixel_values": torch.zeros(3, 60, 70)}, "must have the shape \\(B, channels"),
    "no images": ({name: value[:0] for name, value in INPUTS.items()}, r"\(0, 3, 60, 70\), which holds nothing"),
    "flow of no pixels": ({"flow_labels": torch.zeros(2, 2, 0, 70)}, "flow_labels has the shape .* holds nothing"),
    "depth of no pixels": ({"depth_labels": torch.ones(2, 0, 0)}, "depth_labels has the shape .* holds nothing"),
    "pixels as bytes": (
        dict.fromkeys(("pixel_values", "next_pixel_values"), torch.zeros(2, 3, 60, 70, dtype=torch.uint8)),
        "normalised",
    ),
    "the second frame as bytes": ({"next_pixel_values": torch.zeros(2, 3, 60, 70, dtype=torch.uint8)}, "both alike"),
    "flow with channels last": ({"flow_labels": torch.zeros(2, 60, 70, 2)}, "movedim"),
    "flow as integers": ({"flow_labels": torch.zeros(2, 2, 60, 70, dtype=torch.int32)}, "floating point"),
    "flow of another batch": ({"flow_labels": torch.zeros(1, 2, 60, 70)}, "have 1 images, but pixel_values have 2"),
    "depth with a channel": ({"depth_labels": torch.ones(2, 1, 60, 70)}, "squeeze"),
    "depth as integers": ({"depth_labels": torch.ones(2, 60, 70, dtype=torch.int64)}, "floating point"),
    "mask of another size": ({"flow_mask": torch.ones(2, 30, 70)}, "flow_mask must have the shape"),
    "mask without labels": (
        {"depth_labels": None, "depth_mask": torch.ones(2, 60, 70)},
        "depth_mask without depth_labels",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG_INPUTS))
def test_inputs_that_mean_something_else_are_refused(case: str) -> None:
    changes, message = WRONG_INPUTS[case]
    inputs = {key: value for key, value in {**INPUTS, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        MotionModel(dinov2())(**inputs)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    for name, value in batch("joint").items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got ndarray"):
            MotionModel(dinov2())(**{**INPUTS, name: value.numpy()})


def test_flow_of_one_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="next_pixel_values"):
        FlowModel(dinov2())(pixel_values=torch.zeros(1, 3, 56, 56))


WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "channels must be .* got 0"),
    ({"channels": 2.5}, "channels"),
    ({"refinements": -1}, "refinements"),
    ({"max_flow": 0}, "max_flow"),
    ({"max_flow": float("nan")}, "max_flow"),
    ({"min_depth": 0.0}, "min_depth"),
    ({"min_depth": 10.0, "max_depth": 5.0}, "min_depth"),
    ({"task_weights": {"pose": 1.0}}, "pose"),
    ({"task_weights": {"flow": -1.0}}, "task_weights"),
    ({"levels": []}, "levels"),
    ({"levels": [1, 1]}, "levels"),
    ({"levels": 3}, "levels of flow must list .* got 3"),
    ({"levels": {"flow": "3"}}, "levels of flow must list .* got '3'"),
    ({"task_weights": [1.0, 1.0]}, "must be a dict from tasks"),
    ({"levels": {"pose": [1]}}, "pose"),
    ({"levels": [6]}, "blocks \\[6\\]"),
    ({"decoder_output": "inverse"}, "no depth decoder"),
    ({"decoder_output": "disparity"}, "decoder_output"),
    ({"freeze_backbone": "no"}, "freeze_backbone must be True or False"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MotionModel(dinov2(), **settings)


def yolos() -> Any:
    return YolosModel(YolosConfig(**{**SIZES, "image_size": [56, 56]}, intermediate_size=64, num_detection_tokens=5))


def mae() -> Any:
    return ViTMAEModel(ViTMAEConfig(**SIZES, intermediate_size=64, mask_ratio=0.0))


def tokens() -> Any:
    return dinov2(reshape_hidden_states=False)


def timm_windows() -> Any:
    sizes: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


def tuned() -> Any:
    return get_peft_model(dinov2(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (yolos, "cannot be put on a grid"),
        (mae, "shuffles patches"),
        (tokens, "reshape_hidden_states=True"),
        (tuned, "add the adapter to both"),
        (lambda: nn.Conv2d(3, 8, 3), "no backbone"),
    ],
    ids=["tokens behind the patches", "shuffled patches", "tokens for maps", "a PeftModel", "no backbone"],
)
def test_backbones_whose_maps_would_be_wrong_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowModel(make())


@pytest.mark.parametrize("backbone", ["facebook/dinov2-small", None])
def test_a_backbone_that_is_no_model_is_refused(backbone: Any) -> None:
    with pytest.raises(TypeError, match="must be a model"):
        FlowModel(backbone)


@pytest.mark.parametrize("make", [lambda: timm_vit(dynamic_img_size=False), timm_windows])
def test_images_of_a_size_that_timm_does_not_take_are_refused(make: Any) -> None:
    model = FlowModel(make())
    assert model(**batch("flow", (62, 64))).flow.shape == (2, 2, 62, 64)
    with pytest.raises(ValueError, match=r"64 x 64 pixels only, .* dynamic_img_size"):
        model(**batch("flow", (60, 70)))


def hiera() -> Any:
    sizes: dict[str, Any] = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    config = HieraConfig(**sizes, masked_unit_size=[4, 4], query_stride=[2, 2], num_query_pool=1, out_indices=[1, 2])
    return HieraBackbone(config)


def timm_hiera() -> Any:
    return timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 2, 1, 1))


def aimv2() -> Any:
    return Aimv2VisionModel(Aimv2VisionConfig(**{**SIZES, "image_size": 64, "patch_size": 16}))


@pytest.mark.parametrize(("make", "side"), [(hiera, 64), (aimv2, 64), (timm_hiera, 224)])
def test_images_of_a_size_that_a_backbone_does_not_take_are_refused(make: Any, side: int) -> None:
    """Also those with as many patches, which some backbones would take and put in wrong places."""
    model = FlowModel(make())
    assert model(**batch("flow", (side - 2, side))).flow.shape == (2, 2, side - 2, side)
    for size in ((side, side + 32), (side // 2, side * 2)):
        with pytest.raises(ValueError, match=rf"{side} x {side} pixels only, .* {size[0]} x {size[1]}\. Resize"):
            model(**batch("flow", size))


class SquareColours(PatchColours):
    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> ModelOutput:
        side = math.isqrt(pixel_values.shape[-2] * pixel_values.shape[-1] // PATCH**2)
        rows = self.embedding(pixel_values).flatten(2)
        return ModelOutput(feature_maps=(rows.unflatten(2, (side, side)),))


def test_a_backbone_that_takes_square_images_only_says_so() -> None:
    model = FlowModel(SquareColours())
    for side in (4 * PATCH, 7 * PATCH):
        assert model(**batch("flow", (side, side))).flow.shape == (2, 2, side, side)
    for size in ((4 * PATCH, 5 * PATCH), (2 * PATCH, 8 * PATCH)):
        with pytest.raises(ValueError, match=rf"SquareColours takes square images only, .* {size[0]} x {size[1]} "):
            model(**batch("flow", size))


def test_images_are_padded_to_whole_windows() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 64}
    config = LwDetrViTConfig(**sizes, patch_size=8, num_windows=4, window_block_indices=[0], out_indices=[2])
    model = FlowModel(LwDetrViTBackbone(config))
    assert model.reader.patch == (16, 16) and model.reader.strides == {0: (8, 8)}
    assert model(**batch("flow", (40, 56))).flow.shape == (2, 2, 40, 56)


def test_images_of_any_size_that_timm_takes_are_taken() -> None:
    free = timm.create_model("xcit_nano_12_p16_224", img_size=64, depth=3, embed_dim=16, num_heads=2)
    resized = timm_vit()
    for backbone, size in ((free, (96, 64)), (resized, (96, 96))):
        model = FlowModel(backbone)
        if backbone is resized:
            resized.set_input_size(img_size=size)
        assert model(**batch("flow", size)).flow.shape == (2, 2, *size)


def test_images_get_the_precision_of_the_backbone() -> None:
    for make in (timm_vit, resnet):
        model = FlowModel(make()).double().eval()
        inputs = batch("flow")
        assert torch.equal(model(**inputs).flow, model(**{k: v.double() for k, v in inputs.items()}).flow)


def test_levels_that_a_model_does_not_have_are_refused() -> None:
    for backbone in (BACKBONES["dinov2"](), timm_vit()):
        with pytest.raises(ValueError, match="blocks 0 to 5"):
            FlowModel(backbone, levels=[6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [dinov2, timm_vit])
def test_half_precision_is_saved_and_loaded_as_it_is(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = FlowModel(make()).to(dtype).eval()
    model.save_pretrained(tmp_path)
    loaded = FlowModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    grads = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads == {name for name, p in loaded.named_parameters() if p.requires_grad}
    inputs = {key: value.to(dtype) if "pixel" in key else value for key, value in batch("flow").items()}
    assert torch.equal(loaded(**inputs).flow, model(**inputs).flow)


def timm_backbone() -> Any:
    return TimmBackbone(TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2], use_pretrained_backbone=False))


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet10t", num_classes=0), timm_backbone])
def test_convolutions_of_timm_are_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    model = FlowModel(make(), levels=[1]).eval()
    model.save_pretrained(tmp_path)
    inputs = batch("flow")
    assert torch.equal(FlowModel.from_pretrained(tmp_path)(**inputs).flow, model(**inputs).flow)


def test_settings_are_saved_whatever_holds_them(tmp_path: Path) -> None:
    weights = MappingProxyType({"depth": 0.25})
    model = MotionModel(timm_vit(), levels=MappingProxyType({"flow": range(2, 5)}), task_weights=weights).eval()
    model.max_flow = 7.0
    model.save_pretrained(tmp_path)
    loaded = MotionModel.from_pretrained(tmp_path)
    assert loaded.settings == model.settings and loaded.levels["flow"] == [2, 3, 4]
    assert torch.equal(loaded(**batch("joint")).loss, model(**batch("joint")).loss)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    FlowModel(dinov2()).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="holds FlowModel, not DepthModel"):
        DepthModel.from_pretrained(tmp_path / "flow")
    dinov2().save_pretrained(tmp_path / "backbone")
    with pytest.raises(OSError, match="/missing' is neither a folder here nor the id of a repository"):
        FlowModel.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="no model of motion or depth"):
        FlowModel.from_pretrained(tmp_path / "backbone")


@pytest.mark.parametrize("name", ["os", "AutoModel", "PretrainedConfig", "__name__", "nowhere"])
def test_a_folder_cannot_choose_what_is_imported(name: str, tmp_path: Path) -> None:
    FlowModel(dinov2()).save_pretrained(tmp_path)
    file = tmp_path / "backbone" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    with pytest.raises(ValueError, match="backbone=backbone"):
        FlowModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    FlowModel(dinov2()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another shape \['flow_head.matching.linear.bias'"):
        FlowModel.from_pretrained(tmp_path, channels=16)
    weights = load_file(tmp_path / "model.safetensors")
    weights["flow_head.more"] = weights.pop("flow_head.temperature")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['flow_head.temperature'\], unexpected \['flow_head.more'\]"):
        FlowModel.from_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not complete or damaged"):
        FlowModel.from_pretrained(tmp_path)


def test_a_model_with_an_adapter_is_not_saved_without_it(tmp_path: Path) -> None:
    base = FlowModel(dinov2())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=base.head_names))
    with pytest.raises(ValueError, match="carries an adapter"):
        base.save_pretrained(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert FlowModel.from_pretrained(tmp_path).head_names == ["flow_head"]


def test_a_backbone_of_ones_own_is_handed_over(tmp_path: Path) -> None:
    model = FlowModel(PatchColours()).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone=backbone"):
        FlowModel.from_pretrained(tmp_path)
    loaded = FlowModel.from_pretrained(tmp_path, backbone=model.backbone)
    inputs = batch("flow")
    assert torch.equal(loaded(**inputs).flow, model(**inputs).flow)


@pytest.mark.parametrize("run", [1, 2])
def test_a_lack_of_memory_is_not_taken_for_an_image_size(run: int) -> None:
    backbone, runs = dinov2(), []

    def full(module: nn.Module, args: Any) -> None:
        runs.append(module)
        if len(runs) == run:
            raise torch.OutOfMemoryError("no memory")

    blocks_of(backbone)[0].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        FlowModel(backbone)
