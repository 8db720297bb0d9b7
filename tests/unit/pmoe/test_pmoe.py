# SPDX-License-Identifier: Apache-2.0
"""pMoE beyond parity: counts, start, what is frozen and where it lives, fusion, reports, refusals."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from peft_promptmoe import MEPTConfig, PMoEConfig, parameter_report, patch_maps, routing_report
from peft_promptmoe.pmoe.dispatch import dispatch_tokens
from peft_promptmoe.pmoe.shared import PMoEShared, aligned_block

CLASSES, PROMPTS = 3, 4
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def base(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES, **SHAPE | settings)).eval()


def vit(seed: int = 1, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**SHAPE | settings), add_pooling_layer=False)


def dinov2(seed: int = 2, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return Dinov2Model(Dinov2Config(**SHAPE | {"hidden_size": 24, "num_hidden_layers": 3} | settings))


def small_timm(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )


def pmoe(*experts: nn.Module, model: nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(4)
    config = PMoEConfig(experts=list(experts), num_virtual_tokens=PROMPTS, **settings)
    return get_peft_model(base() if model is None else model, config)


def shared_of(model: nn.Module) -> PMoEShared:
    return next(module for module in model.modules() if isinstance(module, PMoEShared))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(9))


# -- counts -----------------------------------------------------------------------------------------------------------

WIDTHS, DEPTHS = (32, 32, 24), (2, 2, 3)  # of `base`, `vit`, `dinov2`


def formula(dispatcher: str, rank: int) -> int:
    """Spec, section 3.5: prompts K*L*n*d, dispatchers of kind A K*L*(d*n + n); and our dispatchers B and C."""
    count = 0
    for width, depth in zip(WIDTHS, DEPTHS, strict=True):
        count += depth * PROMPTS * width
        count += (
            depth
            * {
                "token": width * PROMPTS + PROMPTS,
                "expert": width * rank + rank + len(WIDTHS) * rank + len(WIDTHS),
                "attention": 4 * rank * width,
                "mean": 0,
                "none": 0,
            }[dispatcher]
        )
    bridges = 4 * 32 * 24 if dispatcher != "none" else 0  # both ways between `dinov2` and each of the others
    return count + bridges + CLASSES * sum(WIDTHS)  # and CLASSES biases, which the base model's head has anyway


@pytest.mark.parametrize("dispatcher", ["token", "expert", "attention", "mean", "none"])
def test_the_parameters_trained_are_those_of_the_formula(dispatcher: str) -> None:
    model = pmoe(vit(), dinov2(), dispatcher=dispatcher, dispatcher_dim=5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == formula(dispatcher, rank=5) + CLASSES


def test_the_parameter_report_counts_every_backbone_and_its_bytes() -> None:
    experts = [vit().to(torch.bfloat16), dinov2()]
    held = [sum(p.numel() for p in expert.parameters()) for expert in experts]
    own = sum(p.numel() for p in base().parameters())
    report = parameter_report(pmoe(*experts))
    by_name = {row[0]: row[1:] for row in report.rows}
    assert by_name["base model"] == (own, 4 * own, 0)
    assert by_name["ViTModel"] == (held[0], 2 * held[0], 0)
    assert by_name["Dinov2Model"] == (held[1], 4 * held[1], 0)
    trained = formula("token", rank=16) + CLASSES
    assert by_name["adapters and heads"] == (trained, 4 * trained, trained)
    assert report.total == (own + sum(held) + trained, 4 * own + 2 * held[0] + 4 * held[1] + 4 * trained, trained)
    assert f"{report.total[0]:,}" in str(report)


@pytest.mark.parametrize(("dispatcher", "limit"), [("token", 1.01), ("expert", 1.01), ("attention", 1.01)])
def test_dispatching_costs_next_to_nothing(dispatcher: str, limit: float) -> None:
    """P9 allows 1.03 x the frozen forwards with as many extra tokens, which is what dispatcher "none" computes."""
    shape = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536}
    shape |= {"image_size": 224, "patch_size": 16}

    def flops(name: str) -> int:
        model = pmoe(vit(**shape), model=base(**shape), dispatcher=name).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixel_values=torch.zeros(1, 3, 224, 224))
        return int(counter.get_total_flops())

    assert 1.0 < flops(dispatcher) / flops("none") < limit


# -- start ------------------------------------------------------------------------------------------------------------


def test_training_starts_near_own_prompts_and_not_at_the_mean_of_the_patches(pixels: Tensor) -> None:
    model = pmoe(vit(), dinov2()).eval()
    model(pixel_values=pixels)
    report = routing_report(model)
    for (expert, block), shares in zip(report.blocks, report.shares, strict=True):
        assert 0.8 < shares[expert] < 0.95, f"expert {expert}, block {block}: {shares}"
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


def test_slots_start_apart() -> None:
    torch.manual_seed(0)
    tokens, weight = torch.randn(2, 30, 16), 0.02 * torch.randn(4, 16)
    bias = torch.full((4,), 5.0)
    made, _ = dispatch_tokens(tokens, 8, weight, bias)
    flat, _ = dispatch_tokens(tokens, 8, weight, torch.zeros(4))
    assert made.std(dim=1).mean() > 5 * flat.std(dim=1).mean()


def test_experts_say_nothing_before_training_and_learn_from_the_first_step_on(pixels: Tensor) -> None:
    """The heads of further experts start at zero: one step later everything has a gradient."""
    labels = torch.tensor([0, 1, 2, 0, 1])
    model = pmoe(vit(), dinov2())
    alone = pmoe(dispatcher="token").eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(pixel_values=pixels, labels=labels).loss.backward()
    head = shared_of(model).pmoe_fusion["default"].weight
    assert head.abs().sum() == 0 and head.grad.abs().sum() > 0
    optimizer.step()
    optimizer.zero_grad()
    model(pixel_values=pixels, labels=labels).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not dead
    assert alone(pixel_values=pixels).logits.shape == (5, CLASSES)


# -- where experts live -----------------------------------------------------------------------------------------------


def test_experts_are_no_part_of_what_is_saved_trained_or_counted(pixels: Tensor) -> None:
    expert = vit()
    held = {id(p) for p in expert.parameters()}
    model = pmoe(expert)
    assert not held & {id(p) for p in model.parameters()}
    own = [name for name in model.state_dict() if "promptmoe" not in name and "modules_to_save" not in name]
    assert len(own) == len(base().state_dict())
    assert all("pmoe_" in name or "classifier" in name for name in get_peft_model_state_dict(model))
    assert not any(p.requires_grad for p in expert.parameters())
    model.train()
    assert not any(module.training for module in expert.modules())
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in expert.parameters())


def test_experts_are_cast_and_moved_with_the_model(pixels: Tensor) -> None:
    expert = vit()
    model = pmoe(expert).eval()
    expected = model(pixel_values=pixels).logits
    model.double()
    assert {p.dtype for p in expert.parameters()} == {torch.float64}
    torch.testing.assert_close(model(pixel_values=pixels.double()).logits.float(), expected, atol=1e-5, rtol=1e-5)
    model.to("meta")
    assert all(p.is_meta for p in expert.parameters())


def test_an_expert_in_half_precision_works_with_prompts_in_full(pixels: Tensor) -> None:
    torch.manual_seed(0)
    full = pmoe(vit(), init_weights=False).eval()
    half = pmoe(vit().to(torch.bfloat16), init_weights=False).eval()
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    one, two = full(pixel_values=pixels).logits, half(pixel_values=pixels).logits
    assert two.dtype == torch.float32 and 0 < (one - two).abs().max() < 0.1


def test_adapters_share_experts(pixels: Tensor) -> None:
    model = pmoe(vit(), init_weights=False).eval()
    expected = model(pixel_values=pixels).logits
    again = vit()  # another copy of the same weights
    model.add_adapter("other", PMoEConfig(experts=[dinov2(), again], num_virtual_tokens=2, init_weights=False))
    shared = shared_of(model)
    assert len(shared.experts) == 2 and all(expert.module is not again for expert in shared.experts.values())
    assert not again._forward_pre_hooks and again.training
    model.set_adapter("other")
    assert (model(pixel_values=pixels).logits - expected).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    model.delete_adapter("other")
    assert torch.equal(model(pixel_values=pixels).logits, expected)


def test_unloading_frees_an_experts_blocks(pixels: Tensor) -> None:
    expert = vit()
    expected = expert.eval()(pixel_values=pixels).last_hidden_state
    model = pmoe(expert, init_weights=False)
    assert (expert(pixel_values=pixels).last_hidden_state - expected).abs().max() > 1e-3
    model.unload()
    assert torch.equal(expert(pixel_values=pixels).last_hidden_state, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in expert.modules())


def test_copies_have_experts_of_their_own(pixels: Tensor) -> None:
    model = pmoe(vit(), init_weights=False).eval()
    expected = model(pixel_values=pixels).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(pixel_values=pixels).logits, expected)
    with torch.no_grad():
        for layer in shared_of(copied).layers.modules():
            if hasattr(layer, "pmoe_prompts"):
                layer.pmoe_prompts["default"].weight.zero_()
    assert (copied(pixel_values=pixels).logits - expected).abs().max() > 1e-4
    assert torch.equal(model(pixel_values=pixels).logits, expected)


def test_threads_do_not_see_each_others_images(pixels: Tensor) -> None:
    model = pmoe(vit(), init_weights=False).eval()
    images = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [model(pixel_values=image).logits for image in images]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = [model(pixel_values=images[number]).logits for _ in range(15)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in found.items():
        assert all(torch.equal(one, expected[number]) for one in logits)


def test_checkpointing_reaches_the_experts(pixels: Tensor) -> None:
    """Experts are in evaluation mode, in which transformers do not checkpoint by themselves."""

    def kept(checkpointing: dict[str, Any] | None) -> tuple[int, dict[str, Tensor]]:
        model = pmoe(vit(num_hidden_layers=6), init_weights=False).train()
        if checkpointing is not None:
            model.base_model.model.activation_checkpointing_enable(checkpointing)
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0, 1])).loss
        loss.backward()
        return sum(seen.values()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    more, plain = kept(None)
    for kind in (False, True):
        less, checkpointed = kept({"use_reentrant": kind})
        assert less < 0.5 * more
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_what_a_block_carries_must_reach_the_next(pixels: Tensor) -> None:
    """Re-entrant checkpoints around whole blocks (timm) hand on new tensors when they run again."""
    torch.manual_seed(0)
    model = pmoe(
        vit(), model=timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=CLASSES, depth=2)
    )
    model.base_model.model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model.train()(pixels.requires_grad_()).square().sum().backward()
        timm.layers.set_reentrant_ckpt(False)
        model.train()(pixels).square().sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(False)


# -- fusion and maps --------------------------------------------------------------------------------------------------


def test_concatenation_is_one_linear_head_on_all_features(pixels: Tensor) -> None:
    """With prompts switched off in effect (dispatcher "none", zero prompts), features are the frozen backbones'."""
    expert = vit()
    model = pmoe(expert, dispatcher="none", init_weights=False).eval()
    features: list[Tensor] = []
    head: Any = model.base_model.model.classifier
    head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    logits = model(pixel_values=pixels).logits
    features.append(expert(pixel_values=pixels).last_hidden_state[:, 0])
    inner = head.modules_to_save["default"]
    weight = torch.cat([inner.weight, shared_of(model).pmoe_fusion["default"].weight], dim=1)
    torch.testing.assert_close(logits, torch.cat(features, dim=1) @ weight.T + inner.bias)


def test_each_backbone_gets_the_pixels_in_its_own_normalisation_and_size() -> None:
    raw = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(9))
    expert = small_timm()
    expert.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 32, 32)}
    model = pmoe(expert, model=base(image_size=48), image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).eval()
    seen: list[Tensor] = []
    expert.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def normed(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    model(pixel_values=normed(raw, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    smaller = F.interpolate(raw, size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(seen[0], normed(smaller, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), atol=1e-5, rtol=1e-5)


def test_a_classifier_called_by_itself_is_refused(pixels: Tensor) -> None:
    model = pmoe(vit())
    with pytest.raises(RuntimeError, match="outside a forward pass of the model"):
        model.base_model.model.classifier(torch.zeros(1, 32))
    with model.disable_adapter():
        model.base_model.model.classifier(torch.zeros(1, 32))


def test_patch_maps_of_several_grids_lie_on_the_base_models(pixels: Tensor) -> None:
    bare = vit(5)
    model = pmoe(dinov2(), small_timm(), model=bare, init_weights=False).train()
    maps = patch_maps(model, pixels)
    assert maps.shape == (5, 32 + 24 + 16, 4, 4)
    maps.square().mean().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead
    with model.disable_adapter(), pytest.raises(ValueError, match="one active pMoE adapter"):
        patch_maps(model, pixels)
    with pytest.raises(ValueError, match="no pMoE adapter"):
        patch_maps(base(), pixels)


def test_patch_maps_read_the_prompted_blocks(pixels: Tensor) -> None:
    model = pmoe(dinov2(), model=vit(5), init_weights=False).eval()
    tokens = model(pixel_values=pixels).last_hidden_state[:, 1:]
    maps = patch_maps(model, pixels)
    assert torch.equal(maps[:, :32], tokens.transpose(1, 2).unflatten(2, (4, 4)))


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_names_who_decides(pixels: Tensor, tmp_path: Any) -> None:
    model = pmoe(vit(), dinov2(), init_weights=False).eval()
    with pytest.raises(ValueError, match="Run the model once"):
        routing_report(model)
    logits = model(pixel_values=pixels).logits
    report = routing_report(model)
    assert report.experts == ["base model", "ViTModel", "Dinov2Model"]
    torch.testing.assert_close(report.decision.sum(), logits.max(dim=1).values.mean())
    assert report.decided.sum() == 1
    frame = report.to_dataframe()
    assert len(frame) == (2 + 2 + 3) * 5
    assert frame.groupby(["expert", "block"])["share"].sum().sub(1).abs().max() < 1e-5
    figure = report.plot(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 1000
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == report.experts and [len(axes.patches) for axes in figure.axes] == [5 * n for n in (2, 2, 3)]
    over = f"over {len(pixels)} images"
    assert "carried" in str(report) and over in str(report) and over in figure.get_suptitle()
    assert report._repr_html_().count("<tr>") == 1 + 7 + 1 + 3 and over in report._repr_html_()
    assert parameter_report(model)._repr_html_().count("<tr>") == 1 + 5


def test_carried_prompts_appear_from_the_second_block_on(pixels: Tensor) -> None:
    model = pmoe(vit(), init_weights=False).eval()
    model(pixel_values=pixels)
    report = routing_report(model)
    carried = {place: float(shares[-2]) for place, shares in zip(report.blocks, report.shares, strict=True)}
    assert carried[0, 0] == carried[1, 0] == 0.0 and carried[0, 1] > 0 and carried[1, 1] > 0
    model = pmoe(vit(), init_weights=False, carry_prompts=False).eval()
    model(pixel_values=pixels)
    assert routing_report(model).shares[:, -2].abs().max() == 0


# -- depth ------------------------------------------------------------------------------------------------------------


def test_blocks_are_aligned_by_relative_depth() -> None:
    assert [aligned_block(b, 12, 12) for b in range(12)] == list(range(12))
    assert [aligned_block(b, 12, 6) for b in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [aligned_block(b, 6, 12) for b in range(6)] == [1, 3, 5, 7, 9, 11]
    assert [aligned_block(b, 2, 3) for b in range(2)] == [0, 2]


def test_prompts_of_named_blocks_only(pixels: Tensor) -> None:
    model = pmoe(vit(), layers_to_transform=[1], init_weights=False).eval()
    model(pixel_values=pixels)
    assert routing_report(model).blocks == [(0, 1), (1, 1)]
    with pytest.raises(ValueError, match="layers_to_transform counts blocks"):
        pmoe(dinov2(), layers_to_transform=[1])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dispatcher": "expert"}, ValueError, "needs at least two experts"),
        ({"dispatcher": "topk"}, ValueError, "dispatcher must be one of"),
        ({"fusion": "sum"}, ValueError, "fusion must be one of"),
        ({"experts": "facebook/dino-vitb16"}, TypeError, "must be a list"),
        ({"experts": [3]}, TypeError, "names or modules"),
        ({"experts": ["a"] * 65}, ValueError, "from 0 to 64"),
        ({"dispatcher_dim": 0}, ValueError, "dispatcher_dim"),
        ({"image_mean": [0.5]}, ValueError, "belong together"),
        ({"image_mean": [0.5], "image_std": [0.0]}, ValueError, "image_std must be greater"),
        ({"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}, ValueError, "same number of channels"),
        ({"carry_prompts": 1}, TypeError, "carry_prompts must be True or False"),
        ({"expert_records": {}}, TypeError, "expert_records must be a list"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PMoEConfig(**settings)


def test_leave_to_download_never_comes_from_a_file(tmp_path: Any) -> None:
    config = PMoEConfig(download_experts=True)
    assert config.download_experts and not config.stored
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert '"download_experts": false' in file.read_text()
    file.write_text(file.read_text().replace('"download_experts": false', '"download_experts": true'))
    loaded = PMoEConfig.from_pretrained(tmp_path)
    assert loaded.stored and not loaded.download_experts
    file.write_text(file.read_text().replace('"peft_type": "PMOE"', '"peft_type": null'))
    assert PMoEConfig.from_peft_type(download_experts=True).stored


def test_models_that_cannot_take_part() -> None:
    teacher = DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=CLASSES, **SHAPE))
    with pytest.raises(ValueError, match="several classifiers"):
        pmoe(vit(), model=teacher)
    with pytest.raises(ValueError, match="task_type"):
        get_peft_model(base(), PMoEConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="reads 32 values"):
        pmoe(dinov2(), fusion="mean")
    with pytest.raises(ValueError, match="layers_to_transform"):
        pmoe(vit(), target_modules=["layers.0.attention"])


def test_a_refusal_leaves_model_and_experts_as_they_were() -> None:
    model, expert = base(), vit().train()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="layers_to_transform counts blocks"):
        pmoe(expert, dinov2(), model=model, layers_to_transform=[0])
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *expert.modules()])
    assert expert.training and all(parameter.requires_grad for parameter in expert.parameters())


def test_several_active_adapters_are_refused(pixels: Tensor) -> None:
    model = pmoe(vit())
    model.add_adapter("other", PMoEConfig(experts=[vit()], num_virtual_tokens=2, modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active adapter at a time"):
        model(pixel_values=pixels)


def test_other_methods_keep_off_its_layers() -> None:
    model = pmoe(vit()).base_model.model
    with pytest.raises(ValueError, match="another method"):
        get_peft_model(model, MEPTConfig())


# -- experts that meet again ------------------------------------------------------------------------------------------


def test_an_expert_serves_one_model_at_a_time(pixels: Tensor) -> None:
    expert = vit()
    first = pmoe(expert, init_weights=False).eval()
    before = first(pixel_values=pixels).logits
    with pytest.raises(ValueError, match=r"'ViTModel' is an expert of another model.*unload\(\) that model first"):
        pmoe(expert)
    assert torch.equal(first(pixel_values=pixels).logits, before)
    first.unload()
    assert pmoe(expert)(pixel_values=pixels).logits.isfinite().all()


def test_an_expert_is_no_base_model_of_another() -> None:
    expert = base()
    pmoe(expert)
    with pytest.raises(ValueError, match="ViTForImageClassification is an expert of another model"):
        pmoe(model=expert)


def with_pixels(mean: float, std: float) -> nn.Module:
    """The one expert, whose pixels are wanted in another way."""
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "mean": [mean] * 3, "std": [std] * 3}
    return model


def test_adapters_that_share_an_expert_have_its_pixels_their_own_way(pixels: Tensor) -> None:
    normal: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "init_weights": False}
    alone = pmoe(with_pixels(0.5, 0.1), **normal).eval()
    expected = alone(pixel_values=pixels).logits
    both = pmoe(with_pixels(0.0, 1.0), **normal).eval()
    torch.manual_seed(4)
    both.add_adapter("b", PMoEConfig(experts=[with_pixels(0.5, 0.1)], num_virtual_tokens=PROMPTS, **normal))
    assert len(shared_of(both).experts) == 1
    assert both.peft_config["b"].expert_records[0]["mean"] == [0.5] * 3
    assert both.peft_config["default"].expert_records[0]["mean"] == [0.0] * 3
    both.set_adapter("b")
    own = dict(both.named_parameters())
    with torch.no_grad():
        for name, value in alone.named_parameters():
            if ".default" in name:
                own[name.replace(".default", ".b")].copy_(value)
    torch.testing.assert_close(both.eval()(pixel_values=pixels).logits, expected, rtol=0, atol=0)


def quantised(model: nn.Module) -> nn.Module:
    """As if: integers where a quantiser would put them, in a layer that is cast back when it is used."""
    for layer in model.layers:
        weight = layer.mlp.fc1.weight
        layer.mlp.fc1.weight = nn.Parameter((weight * 1000).to(torch.int8), requires_grad=False)
        layer.mlp.fc1.forward = lambda x, own=layer.mlp.fc1: nn.functional.linear(
            x, own.weight.float() / 1000, own.bias
        )
    return model


def test_quantised_experts_are_told_apart(pixels: Tensor) -> None:
    one, two = quantised(vit(1)), quantised(vit(2))
    model = pmoe(one, two)
    assert len(shared_of(model).experts) == 2
    third = quantised(vit(5))
    model.add_adapter("b", PMoEConfig(experts=[third], num_virtual_tokens=2))
    shared = shared_of(model)
    assert shared.experts[shared.members["b"][0]].module is third
    model.set_adapter("b")
    assert model(pixel_values=pixels).logits.isfinite().all()


def test_reports_of_a_deleted_adapter_are_gone(pixels: Tensor) -> None:
    model = pmoe(vit()).eval()
    model(pixel_values=pixels)
    model.add_adapter("b", PMoEConfig(num_virtual_tokens=2))
    model.set_adapter("b")
    model.delete_adapter("default")
    model.add_adapter("default", PMoEConfig(experts=[dinov2(), small_timm()], num_virtual_tokens=3))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="Run the model once"):
        routing_report(model)
    model(pixel_values=pixels)
    assert len(routing_report(model).decided) == 3
    model.train()(pixel_values=pixels)
    assert routing_report(model).decided is None


def test_a_handed_over_expert_keeps_the_name_of_its_record(tmp_path: Any) -> None:
    folder = tmp_path / "expert"
    vit().save_pretrained(folder)
    pmoe(str(folder)).save_pretrained(tmp_path / "one")
    config = PMoEConfig.from_pretrained(tmp_path / "one")
    config.experts = [vit()]
    loaded = PeftModel.from_pretrained(base(), tmp_path / "one", config=config)
    loaded.save_pretrained(tmp_path / "two")
    assert PMoEConfig.from_pretrained(tmp_path / "two").experts == [str(folder)]
    again = PeftModel.from_pretrained(base(), tmp_path / "two")
    assert len(shared_of(again).experts) == 1


# -- where experts go, and what they join -----------------------------------------------------------------------------


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("return_dict", [False, True])
def test_hidden_states_have_no_prompts(pixels: Tensor, asked_before: bool, return_dict: bool) -> None:
    """transformers captures them by hooks on the blocks, which it installs when they are first asked for."""
    plain = base()
    if asked_before:
        plain(pixels, output_hidden_states=True)
    model = pmoe(vit(), model=plain, init_weights=False).eval()
    output = model(pixels, output_hidden_states=True, return_dict=return_dict)
    states = output.hidden_states if return_dict else output[-1]
    assert [state.shape[1] for state in states] == [17, 17, 17]
    with model.disable_adapter():
        assert torch.equal(states[0], plain(pixels, output_hidden_states=True).hidden_states[0])
    bare = pmoe(vit(2), model=vit(), init_weights=False).eval()
    assert [state.shape[1] for state in bare(pixels, output_hidden_states=True).hidden_states] == [17, 17, 17]


@pytest.mark.parametrize("asked_before", [False, True])
def test_attention_maps_have_no_prompts(pixels: Tensor, asked_before: bool) -> None:
    """They are those of the tokens that are there behind the block, as where prompts are rows of attention."""
    plain: Any = base(num_hidden_layers=2)
    plain.set_attn_implementation("eager")
    if asked_before:
        plain(pixels, output_attentions=True)
    model = pmoe(dinov2(), model=plain, init_weights=False).eval()
    whole: list[Tensor] = []
    attention = model.get_base_model().get_submodule("vit.layers.1.attention")
    handle = attention.register_forward_hook(lambda module, args, output: whole.append(output[1]), prepend=True)
    maps = model(pixels, output_attentions=True).attentions
    handle.remove()
    assert [tuple(weights.shape[1:]) for weights in maps] == [(4, 17, 17)] * 2
    kept = [0, *range(1 + PROMPTS, 17 + PROMPTS)]  # prompts stand behind the class token
    assert whole[0].shape[-1] == 17 + PROMPTS
    assert torch.equal(maps[1], whole[0][:, :, kept][..., kept])
    with model.disable_adapter():
        torch.testing.assert_close(
            model(pixels, output_attentions=True).attentions[0].sum(dim=-1), torch.ones(len(pixels), 4, 17)
        )


class Logits(nn.Module):
    """A model that puts out a tensor, as tracing asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_traced_model_gives_the_same(pixels: Tensor) -> None:
    model = pmoe(dinov2(), small_timm(), init_weights=False).eval()
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), pixels, check_trace=False)
        torch.testing.assert_close(traced(pixels.flip(0) * 0.5), model(pixels.flip(0) * 0.5).logits)


def backbone() -> nn.Module:
    return Dinov2Backbone(Dinov2Config(**SHAPE, out_features=["stage1", "stage2"]))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = base()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.inner(pixel_values).logits


def deep_head() -> nn.Module:
    model: Any = base()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, CLASSES))
    return model


def test_backbones_are_refused() -> None:
    for make in (lambda: pmoe(model=backbone()), lambda: pmoe(backbone())):
        with pytest.raises(ValueError, match=r"Dinov2Backbone.* is, or contains, a backbone of transformers"):
            make()


@pytest.mark.parametrize("make", [Wrapped, deep_head])
def test_experts_need_a_classifier_to_join(make: Any) -> None:
    with pytest.raises(ValueError, match="needs a linear classifier"):
        pmoe(vit(), model=make())


def test_experts_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="reads images of 1 channels, but the base model reads 3"):
        pmoe(vit(num_channels=1))


def test_experts_by_name_join_the_base_model_where_it_is(tmp_path: Any) -> None:
    """A device that is here everywhere, and holds nothing: the base model's alone must not stay there."""
    vit().save_pretrained(tmp_path)
    moved: list[torch.device] = []
    original = nn.Module.to

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.extend(arg for arg in args if isinstance(arg, torch.device))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", spy)
        pmoe(str(tmp_path))
    assert torch.device("cpu") in moved


@pytest.mark.parametrize("dispatcher", ["token", "expert", "attention", "mean", "none"])
def test_experts_in_bfloat16_beside_prompts_that_follow_their_block(pixels: Tensor, dispatcher: str) -> None:
    """PEFT casts adapters to float32; without it each block's prompts are of its own type."""
    torch.manual_seed(0)
    config = PMoEConfig(experts=[dinov2().bfloat16()], num_virtual_tokens=PROMPTS, dispatcher=dispatcher)
    model = inject_adapter_in_model(config, base())
    assert model(pixels).logits.isfinite().all()
