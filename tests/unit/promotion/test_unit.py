# SPDX-License-Identifier: Apache-2.0
"""The unit behind a frozen block: what it leaves alone, what it depends on and what it learns from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from tiny_promotion import (
    PATCH,
    SIDE,
    SMALL,
    WIDTH,
    adapted,
    backbone,
    classifier,
    images,
    large,
    sgd,
    step,
    trained,
    units,
)
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from peft_promptmoe import FlowModel, ProMotionConfig
from peft_promptmoe.routing.auxiliary_loss import add_losses

NO_LOSSES = {"denoise_weight": 0.0, "margin_weight": 0.0, "compact_weight": 0.0}
OTHER_THAN_UP = ("norm", "down", "denoiser", "project")


def every_block(base: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(base, ProMotionConfig(**SMALL | {"layers_to_transform": [0, 1, 2]} | settings))


# -- a fresh unit changes nothing -------------------------------------------------------------------------------------


def timm_vit() -> nn.Module:
    return large(
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
    )


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("make", [classifier, backbone, timm_vit], ids=["classifier", "backbone", "timm"])
def test_a_fresh_adapter_changes_no_bit(make: Any, training: bool) -> None:
    base, pixels = make(), images()["pixel_values"]
    settings = {"output_hidden_states": True} if make is not timm_vit else {}
    with torch.no_grad():
        plain = copy.deepcopy(base)(pixels, **settings)
        found = every_block(base).train(training)(pixels, **settings)
    for left, right in zip(tensors_of(found), tensors_of(plain), strict=True):
        assert torch.equal(left, right)


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output if isinstance(output, (tuple, list)) else output.to_tuple()
    return [tensor for value in values for tensor in tensors_of(value)]


@pytest.mark.parametrize("asked_before", [False, True], ids=["fresh", "after-a-forward"])
def test_maps_of_a_backbone_have_what_the_unit_adds(asked_before: bool) -> None:
    """Of the very block that the unit stands behind, and so have hidden states."""
    base, pixels = backbone(), images()["pixel_values"]
    with torch.no_grad():
        plain = copy.deepcopy(base)(pixels, output_hidden_states=True)
        if asked_before:
            base(pixels)
        model = every_block(base, layers_to_transform=[1], init_weights=False).eval()
        found = model(pixels, output_hidden_states=True)
    assert torch.equal(found.feature_maps[0], plain.feature_maps[0])
    for before, after in (
        (plain.feature_maps[1], found.feature_maps[1]),
        (plain.hidden_states[2], found.hidden_states[2]),
    ):
        assert (after - before).abs().max() > 1e-2


# -- gradients --------------------------------------------------------------------------------------------------------


def gradient_sizes(model: nn.Module, kind: str) -> list[float]:
    found = trained(model, f"promotion_{kind}")
    assert found
    return [float(p.grad.abs().max()) if p.grad is not None else -1.0 for p in found.values()]


def test_the_first_step_moves_what_is_zero_and_the_losses_move_the_rest() -> None:
    """The task's gradient stops at the zero expansion; the adapter's own losses reach all but the hidden layer before
    a zero one. From the second step on everything has a gradient, from the third on of the task alone.
    """
    model, batch = adapted(**NO_LOSSES), images()
    step(model, batch)
    assert min(gradient_sizes(model, "up")) > 0.0
    for kind in OTHER_THAN_UP:
        assert max(gradient_sizes(model, kind)) == 0.0
    model, optimizer = adapted(), None
    step(model, batch)
    for kind in OTHER_THAN_UP:
        for (name, parameter), size in zip(
            trained(model, f"promotion_{kind}").items(), gradient_sizes(model, kind), strict=True
        ):
            assert (size == 0.0) == ("hidden" in name), name
            assert parameter.grad is not None
    optimizer = sgd(model)
    optimizer.step()
    optimizer.zero_grad()
    step(model, batch)
    assert min(gradient_sizes(model, "")) > 0.0
    optimizer.step()
    optimizer.zero_grad()
    for unit in units(model):
        for name in NO_LOSSES:
            setattr(unit.prompt_config["default"], name, 0.0)
    step(model, batch)
    assert min(gradient_sizes(model, "")) > 0.0


# -- what an output depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["bank", "pool"])
def test_an_image_does_not_depend_on_its_mates(proposal: str) -> None:
    """Bit by bit behind the block; what base models make of an image is rounded differently by size of batch."""
    model = adapted(init_weights=False, proposal=proposal, num_prototypes=4).eval()
    pixels = images(5)["pixel_values"]
    model(pixels)
    tokens = torch.randn(5, 1 + (SIDE // PATCH) ** 2, WIDTH, generator=torch.Generator().manual_seed(3))
    together = unit_output(model, tokens)
    for number in range(5):
        one = tokens[number : number + 1]
        assert torch.equal(together[number], unit_output(model, one)[0])
        assert torch.equal(together[number], unit_output(model, one.expand(2, -1, -1))[1])
    assert torch.equal(together, unit_output(model, tokens.flip(0)).flip(0))
    mates = torch.cat([tokens[:1], 9.0 * tokens[1:] + 1.0])
    assert torch.equal(together[0], unit_output(model, mates)[0])
    model, pixels = model.double(), pixels.double()
    with torch.no_grad():
        logits = model(pixels).logits
        alone = torch.cat([model(pixels[number : number + 1]).logits for number in range(5)])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)


def test_an_image_in_training_does_not_depend_on_its_mates() -> None:
    model = adapted(init_weights=False, denoise_weight=0.0).train()
    pixels = images(5)["pixel_values"]
    with torch.no_grad():
        together = model(pixels).logits
        for bank in [module for module in model.modules() if hasattr(module, "pending")]:
            bank.forget()
        alone = model(pixels[2:3]).logits
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)


def test_the_flow_of_a_pair_does_not_depend_on_other_pairs() -> None:
    model = adapted(FlowModel(backbone(), levels=[0, 1, 2]), init_weights=False).eval().double()
    frames = images(6)["pixel_values"].double()
    with torch.no_grad():
        together = model(pixel_values=frames[:3], next_pixel_values=frames[3:]).flow
        alone = model(pixel_values=frames[1:2], next_pixel_values=frames[4:5]).flow
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)  # the head adds up in single precision


def unit_output(model: nn.Module, tokens: Tensor) -> Tensor:
    unit = units(model)[0]
    with torch.no_grad():
        found = unit.behind(tokens, (4, (tokens.shape[1] - 1) // 4))
    assert found is not None
    return found


def test_patches_in_another_order_give_the_same_in_that_order() -> None:
    model = adapted(init_weights=False).double().eval()
    tokens = torch.randn(2, 1 + 20, 32, dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(20)])
    torch.testing.assert_close(unit_output(model, tokens[:, order]), unit_output(model, tokens)[:, order])


def test_prefix_tokens_pass_bit_by_bit() -> None:
    model = adapted(init_weights=False).eval()
    tokens = torch.randn(2, 1 + 20, 32)
    tokens[:, 0] = -0.0
    found = unit_output(model, tokens)
    assert torch.equal(found[:, 0].view(torch.int32), tokens[:, 0].view(torch.int32))
    assert (found[:, 1:] - tokens[:, 1:]).abs().min(dim=-1).values.max() > 0.0


@pytest.mark.parametrize("settings", [{}, {"proposal": "pool", "num_prototypes": 4}], ids=["bank", "pool"])
def test_channels_stay_where_they_are(settings: dict[str, Any]) -> None:
    """Expanded by a matrix that marks one channel, a unit adds to this channel alone."""
    model = adapted(init_weights=False, **settings).eval()
    unit: Any = units(model)[0]
    with torch.no_grad():
        unit.promotion_up["default"].weight.zero_()
        unit.promotion_up["default"].bias.zero_()
        unit.promotion_up["default"].bias[5] = 3.0
    tokens = torch.randn(2, 1 + 20, 32)
    added = unit_output(model, tokens)[:, 1:] - tokens[:, 1:]
    torch.testing.assert_close(added[..., 5], torch.full_like(added[..., 5], 0.25 * 3.0))
    assert added[..., [c for c in range(32) if c != 5]].abs().max() == 0.0


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 48), (80, 24)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_images_of_any_shape_pass(shape: tuple[int, int], count: int) -> None:
    """Also of as many patches in another shape, one after the other: units see a set."""
    model = adapted(init_weights=False, num_prototypes=count).eval()
    with torch.no_grad():
        for each in (shape, shape[::-1]):
            assert torch.isfinite(model(images(shape=each)["pixel_values"]).logits).all()


def test_pooled_prototypes_need_to_know_the_shape() -> None:
    model = adapted(init_weights=False, num_prototypes=4, proposal="pool").eval()
    with torch.no_grad():
        model(images(shape=(48, 32))["pixel_values"])
        with pytest.raises(ValueError, match="same number in another shape"):
            model(images(shape=(32, 48))["pixel_values"])


@pytest.mark.parametrize("patches", [1, 3, 11])
def test_fewer_patches_than_four_for_each_prototype_are_refused(patches: int) -> None:
    model = adapted(init_weights=False).eval()
    with pytest.raises(ValueError, match=f"num_prototypes=3 is more than a quarter of an image's {patches} patches"):
        unit_output(model, torch.randn(1, 1 + patches, 32))


# -- randomness -------------------------------------------------------------------------------------------------------


def test_evaluation_draws_no_random_number() -> None:
    model = adapted(init_weights=False).eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        first = model(**images()).logits
        assert torch.equal(model(**images()).logits, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_decides_a_training_step() -> None:
    one, two = adapted(), adapted()
    losses = [step(model, images(), sgd(model)) for model in (one, two)]
    assert torch.equal(*losses)
    for name, parameter in trained(one).items():
        assert torch.equal(parameter, trained(two)[name]), name


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models_keep_units_in_single_precision(dtype: torch.dtype) -> None:
    base = classifier().to(dtype)
    model = every_block(base)
    batch = images()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    seen = []
    for unit in units(model):
        unit.site.block.register_forward_hook(lambda *_: seen.append(tensors_of(_[-1])[0].dtype))
    loss = step(model, batch)
    assert torch.isfinite(loss) and set(seen) == {dtype}
    for name, parameter in model.named_parameters():
        if "promotion_" in name:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    model.half()
    assert {bank.weight.dtype for unit in units(model) for bank in unit.promotion_bank.values()} == {torch.float32}


def test_autocast_is_finite_and_keeps_the_type_of_the_block() -> None:
    model = every_block(classifier(), init_weights=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(model, images())
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in trained(model).values())


# -- what it learns ---------------------------------------------------------------------------------------------------


def test_the_margin_grows_with_its_weight_and_not_without() -> None:
    """By how much the nearest prototype's cosine exceeds the second one's, on patches of planted groups."""

    def margin_after(weight: float) -> tuple[float, float]:
        torch.manual_seed(3)
        base = large(
            ViTModel(
                ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=4)
            )
        )
        settings = {"margin_weight": weight, "compact_weight": 0.0, "denoise_weight": 0.0, "num_prototypes": 4}
        model = get_peft_model(base, ProMotionConfig(bottleneck_dim=8, layers_to_transform=[0], **settings)).train()
        (unit,) = units(model)
        optimizer = torch.optim.Adam(trained(model).values(), lr=3e-3)
        groups, generator = torch.randn(6, 32), torch.Generator().manual_seed(5)
        seen = []
        for _ in range(60):
            tokens = groups[torch.randint(6, (4, 64), generator=generator)]
            tokens = tokens + 0.5 * torch.randn(4, 64, 32, generator=generator)
            unit.before_training([unit])
            call = unit.calls.begin()
            out = unit.behind(torch.cat([torch.zeros(4, 1, 32), tokens], dim=1))
            unit.calls.end(call)
            unit.after_training([unit])
            add_losses(0.0 * out.sum(), unit.calls, call).backward()
            optimizer.step()
            optimizer.zero_grad()
            best = unit.last_assignment["default"].similarity.topk(2).values
            seen.append(float((best[..., 0] - best[..., 1]).mean()))
        return sum(seen[:5]) / 5, sum(seen[-5:]) / 5

    before, after = margin_after(1.0)
    _, without = margin_after(0.0)
    print(f"margin {before:.3f} -> {after:.3f}, without its weight {without:.3f}")
    assert after > before + 0.05 and after > without + 0.05
    assert abs(without - before) < 0.05


def test_centring_keeps_prototypes_apart_where_patches_share_a_direction() -> None:
    def between(center: bool) -> float:
        model = adapted(center=center, layers_to_transform=[0]).train()
        unit: Any = units(model)[0]
        tokens = torch.randn(4, 1 + 64, 32) + 8.0 * torch.randn(1, 1, 32)
        with torch.no_grad():
            call = unit.calls.begin()
            unit.behind(tokens)
            unit.calls.end(call)
        prototypes = unit.last_assignment["default"].prototypes
        pairs = (prototypes @ prototypes.transpose(1, 2))[:, ~torch.eye(3, dtype=torch.bool)]
        return float(pairs.mean())

    torch.manual_seed(0)
    assert between(center=False) > 0.9
    assert between(center=True) < 0.2


def test_two_adapters_add_what_each_would() -> None:
    model = adapted(init_weights=False, layers_to_transform=[0]).eval()
    model.add_adapter(
        "other", ProMotionConfig(**SMALL, init_weights=False, layers_to_transform=[0], modules_to_save=[])
    )
    tokens = torch.randn(2, 1 + 20, 32)
    parts = []
    for name in ("default", "other"):
        units(model)[0].set_adapter([name])
        parts.append(unit_output(model, tokens) - tokens)
    units(model)[0].set_adapter(["default", "other"])
    torch.testing.assert_close(unit_output(model, tokens) - tokens, parts[0] + parts[1], rtol=1e-5, atol=1e-5)


def test_merging_says_what_units_are() -> None:
    with pytest.raises(ValueError, match="its units add to the outputs of blocks, and no weight is changed"):
        adapted().merge_and_unload()


def test_pixels_that_are_no_numbers_pass_through_and_poison_nothing() -> None:
    model, batch = adapted(init_weights=False), images()
    model.train()(**batch)
    broken = images(seed=1)
    broken["pixel_values"][0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        assert not torch.isfinite(model(**broken).logits[0]).all()
    model.eval()
    for unit in units(model):
        for bank in unit.promotion_bank.values():
            assert torch.isfinite(bank.weight).all()
            torch.testing.assert_close(bank.weight.norm(dim=-1), torch.ones(3))
    assert torch.isfinite(model(**batch).logits).all()
