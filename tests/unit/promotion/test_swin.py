# SPDX-License-Identifier: Apache-2.0
"""Units behind blocks in stages, whose patches are merged from stage to stage: Swin of transformers and timm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from tiny_promotion import SMALL, banks, images, large, sgd, step, trained, units
from torch import Tensor, nn
from transformers import (
    HieraConfig,
    HieraModel,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from peft_promptmoe import FlowModel, ProMotionConfig, assignment_report
from peft_promptmoe.engine.called_module import holders
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.models.surroundings import block_of

SIZES: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3}
FREE = {"always_partition": True, "dynamic_img_size": True, "img_size": 32, "num_classes": 3}
ODD = (26, 34)  # pixels: 13 x 17 patches, then 7 x 9, both padded to whole windows inside the blocks


def config(**more: Any) -> SwinConfig:
    return SwinConfig(image_size=32, num_labels=3, **SIZES | more)


def backbone(*stages: int) -> Any:
    return large(SwinBackbone(config(out_indices=list(stages))))


def timm_swin(name: str) -> nn.Module:
    torch.manual_seed(0)
    return large(timm.create_model(name, **FREE, **SIZES))


MODELS: dict[str, Callable[[], Any]] = {
    "swin": lambda: large(SwinForImageClassification(config())),
    "swinv2": lambda: large(Swinv2ForImageClassification(Swinv2Config(image_size=32, num_labels=3, **SIZES))),
    "timm": lambda: timm_swin("swin_tiny_patch4_window7_224"),
    "timm-v2": lambda: timm_swin("swinv2_tiny_window8_256"),
}
BOTH = ["swin", "timm"]


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, ProMotionConfig(**SMALL | {"init_weights": False} | settings))


def pixels(count: int = 2, shape: tuple[int, int] = ODD) -> Tensor:
    return images(count, shape=shape)["pixel_values"]


def places(model: nn.Module) -> list[tuple[int, str]]:
    """Numbers of the blocks with units, and their stages and numbers within them."""
    return [(unit.site.index, ".".join(filter(str.isdigit, unit.site.name.split(".")))) for unit in units(model)]


# -- which blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [None, ["attention", "attn"], r".*\.(attention|attn)"], ids=["unset", "names", "regex"]
)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_counted_over_all_stages(name: str, targets: Any) -> None:
    model = adapted(MODELS[name](), target_modules=targets, layers_to_transform=[1, 2])
    assert places(model) == [(1, "0.1"), (2, "1.0")]


def test_a_pattern_counts_in_its_own_list() -> None:
    pattern = {"target_modules": ["attention"], "layers_to_transform": [1]}
    assert places(adapted(MODELS["swin"](), layers_pattern="layers", **pattern)) == [(2, "1.0"), (3, "1.1")]
    assert places(adapted(MODELS["swin"](), layers_pattern="blocks", **pattern)) == [(1, "0.1"), (3, "1.1")]


def test_stages_without_blocks_count_nothing() -> None:
    model, stages = nn.Module(), nn.ModuleList([nn.Conv2d(3, 8, 2), nn.Module(), nn.Module()])
    for stage in (stages[1], stages[2]):
        stage.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Identity()}) for _ in range(2)])
    model.layers = stages
    assert [block_of(model, f"layers.{stage}.blocks.1.attn")[1] for stage in (1, 2)] == [1, 3]


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names layer 4, not among .*: 0 to 3"):
        adapted(MODELS["swin"](), layers_to_transform=[3, 4])


@pytest.mark.parametrize(
    ("base", "blocks"),
    [
        (lambda: backbone(1), [0, 1]),
        (lambda: backbone(1, 2), [0, 1, 2, 3]),
        (lambda: FlowModel(backbone(1, 2), levels=[0]), [0, 1]),
        (lambda: FlowModel(MODELS["timm"](), levels=[0]), [0, 1]),
        (lambda: FlowModel(MODELS["timm"](), levels=[1]), [0, 1, 2, 3]),
    ],
    ids=["first stage", "both", "flow", "flow on timm", "flow on timm, both"],
)
def test_no_unit_stands_behind_the_last_stage_that_is_read(base: Any, blocks: list[int]) -> None:
    assert [index for index, _ in places(adapted(base(), modules_to_save=[]))] == blocks


def test_a_dense_model_around_a_backbone_gets_units() -> None:
    sizes = {"hidden_size": 8, "auxiliary_in_channels": 16, "pool_scales": [1]}
    inner = config(out_features=["stage1", "stage2"])
    base = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=inner, num_labels=3, **sizes))
    assert [index for index, _ in places(adapted(base))] == [0, 1, 2, 3]


# -- what they do -----------------------------------------------------------------------------------------------------


def test_maps_and_hidden_states_have_exactly_what_the_unit_adds() -> None:
    """At the end of a stage, before its patches are merged, with images that are no whole patches and windows."""
    base = backbone(1, 2)
    plain = copy.deepcopy(base)
    model = adapted(base, layers_to_transform=[1], modules_to_save=[]).eval()
    caught: list[Tensor] = []
    plain.swin.encoder.layers[0].blocks[1].register_forward_hook(lambda block, args, output: caught.append(output[0]))
    with torch.no_grad():
        before = plain(pixels(shape=(25, 33)), output_hidden_states=True)
        after = model(pixels(shape=(25, 33)), output_hidden_states=True)
        expected = units(model)[0].behind(caught[0], (13, 17)).transpose(1, 2).unflatten(2, (13, 17))
    assert torch.equal(after.hidden_states[1], expected)
    assert torch.equal(after.hidden_states[0], before.hidden_states[0])
    normed = plain.hidden_states_norms["stage1"](expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(after.feature_maps[0], normed, rtol=1e-6, atol=1e-6)
    for found, own in zip(after.feature_maps, before.feature_maps, strict=True):
        assert (found - own).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_changes_no_bit(name: str) -> None:
    base = MODELS[name]()
    with torch.no_grad():
        expected = outcome(copy.deepcopy(base), pixels())
        model = adapted(base, init_weights=True)
        assert torch.equal(outcome(model.eval(), pixels()), expected)
        assert torch.equal(outcome(model.train(), pixels()), expected)


def outcome(model: nn.Module, values: Tensor) -> Tensor:
    output = model(values)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", BOTH)
def test_images_do_not_see_each_other(name: str) -> None:
    model, values = adapted(MODELS[name](), proposal="pool", num_prototypes=4).eval(), pixels(3)
    with torch.no_grad():
        together = outcome(model, values)
        for number in range(3):
            torch.testing.assert_close(together[number], outcome(model, values[number : number + 1])[0])


@pytest.mark.parametrize("name", BOTH)
def test_every_shape_of_images_has_its_own_grids(name: str) -> None:
    """Also of as many patches: blocks in stages are told their grid."""
    model = adapted(MODELS[name](), proposal="pool", num_prototypes=4).eval()
    for rows, columns in ((16, 32), (32, 16)):
        with torch.no_grad():
            model(pixels(shape=(rows, columns)))
        first, second = (rows // 2, columns // 2), (rows // 4, columns // 4)
        assert assignment_report(model).grids == [first, first, second, second]


def test_a_report_shows_every_stage(tmp_path: Any) -> None:
    model = adapted(MODELS["swin"]()).eval()
    with torch.no_grad():
        model(pixels())
    report = assignment_report(model)
    assert report.layers == [0, 1, 2, 3]
    assert "over 2 images of 63 to 221 patches" in str(report)
    report.plot(tmp_path / "groups.png", images=(0, 1))
    assert (tmp_path / "groups.png").stat().st_size > 1000


# -- training and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_training_on_flow_moves_every_unit(name: str) -> None:
    base = FlowModel(backbone(1, 2) if name == "swin" else MODELS["timm"](), levels=[0, 1], channels=8)
    model = adapted(base, init_weights=True)
    values = images(4, shape=(32, 48))["pixel_values"]
    batch = {"pixel_values": values[:2], "next_pixel_values": values[2:], "flow_labels": torch.ones(2, 2, 32, 48)}
    before = {key: value.detach().clone() for key, value in trained(model).items()}
    optimizer = sgd(model)
    for _ in range(3):
        step(model, batch, optimizer)
    assert len(units(model)) == 4
    still = [key for key, value in trained(model).items() if torch.equal(value, before[key])]
    assert before and not still


@pytest.mark.parametrize("name", BOTH)
def test_a_saved_adapter_gives_the_same(name: str, tmp_path: Any) -> None:
    model = adapted(MODELS[name](), layers_to_transform=[1, 3])
    step(model, images()) if name == "swin" else model.train()(pixels())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    assert places(again) == places(model) == [(1, "0.1"), (3, "1.1")]
    with torch.no_grad():
        assert torch.equal(outcome(again, pixels()), outcome(model, pixels()))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_stages_change_nothing(reentrant: bool) -> None:
    """transformers checkpoints a stage and, inside it, each of its blocks. No input of the model needs a gradient."""
    found, batch = [], images()
    for checkpointed in (False, True):
        model = adapted(MODELS["swin"]())
        if checkpointed:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        step(model, batch)
        step(model, batch)
        found.append({key: value.grad for key, value in trained(model, "").items()})
        found[-1] |= {str(number): bank.weight for number, bank in enumerate(banks(model.eval()))}
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)


def test_no_stage_that_runs_again_starts_a_forward_pass() -> None:
    """Some versions of transformers run a checkpointed stage's hooks again, too, in the backward pass."""
    model = adapted(MODELS["swin"]())
    names = {type(module).__name__ for module in holders(model.base_model.model, prompt_layers(model))}
    assert names == {"SwinForImageClassification", "SwinModel", "SwinEncoder"}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_too_many_prototypes_for_a_stage_are_refused(name: str) -> None:
    model = adapted(MODELS[name](), num_prototypes=17).eval()
    with pytest.raises(ValueError, match=r"=17 .* 64 patches \(8 x 8\) behind block 2, in stage 2 .* \(at most 16\)"):
        model(pixels(shape=(32, 32)))
    assert outcome(adapted(MODELS[name](), num_prototypes=17, layers_to_transform=[0, 1]).eval(), pixels()).shape == (
        2,
        3,
    )
    assert outcome(model, pixels(shape=(32, 48))).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "most", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            12,
            r"=13 .* 49 patches \(7 x 7\) behind block 3, .* \(at most 12\)",
        ),
        ("vit_tiny_patch16_224", 49, r"=50 .* 196 patches \(14 x 14\), so"),
    ],
    ids=["swin", "vit"],
)
def test_too_many_are_refused_at_once_where_all_images_have_one_size(name: str, most: int, message: str) -> None:
    sizes = {"depths": (1, 1, 1, 1), "embed_dim": 12} if name.startswith("swin") else {"depth": 1}
    with pytest.raises(ValueError, match=message):
        adapted(timm.create_model(name, **sizes), num_prototypes=most + 1)
    adapted(timm.create_model(name, **sizes), num_prototypes=most)


def test_other_models_with_windows_are_refused() -> None:
    sizes: dict[str, Any] = {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    base = HieraModel(HieraConfig(**sizes, num_query_pool=1))
    with pytest.raises(ValueError, match=r"several resolutions \(Hiera, PVT\).* or Swin\."):
        adapted(base)


def test_the_patch_embedding_may_be_trained_as_no_grid_is_read_from_it() -> None:
    model = adapted(MODELS["swin"](), modules_to_save=["projection", "classifier"])
    step(model, images())
    assert all(value.grad is not None for value in trained(model, "projection").values())
