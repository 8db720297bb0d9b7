# SPDX-License-Identifier: Apache-2.0
"""What is VAPT's own: counts, the zero start, the shared projector, dropouts, grids, frozen evaluation mode, heads."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig, VAPTConfig, VAPTModel
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.vapt.generator import resample

# peft asks transformers by an old name, and the generic rule says when it is at work.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

P, D, DEPTH, PATCH = 3, 32, 3, 8
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": PATCH,
}
QUIET = {"channel_dropout": 0.0, "projector_dropout": 0.0, "prompt_dropout": 0.0}


@torch.no_grad()
def large(build: Callable[[], nn.Module]) -> Any:
    """A model whose weights are large enough for prompts to matter, the same for every call."""
    torch.manual_seed(0)
    model, generator = build(), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.add_(0.1 * noise)
        else:
            weight.copy_(0.2 * noise)
    return model.eval()


def hugging_face(model: str, config: str, **settings: Any) -> Any:
    made = getattr(transformers, config)(**SIZES | {"num_labels": 3} | settings)
    return large(lambda: getattr(transformers, model)(made))


def vit(**settings: Any) -> Any:
    return hugging_face("ViTForImageClassification", "ViTConfig", **settings)


def dinov2(**settings: Any) -> Any:
    return hugging_face(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=2, **settings
    )


def timm_vit(architecture: str = "vit_tiny_patch16_224", **settings: Any) -> Any:
    made = {"img_size": 32, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": 4, "num_classes": 3}
    return large(lambda: timm.create_model(architecture, **made | settings))


def mae(**settings: Any) -> Any:
    return hugging_face("ViTMAEModel", "ViTMAEConfig", **settings)


def images(count: int = 2, rows: int = 32, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


def prompted(base: nn.Module, **settings: Any) -> PeftModel:
    """A model in evaluation mode whose adapter matters and has no dropout, but for what is asked."""
    torch.manual_seed(1)
    settings = {"num_virtual_tokens": P, "init_weights": False} | QUIET | settings
    return get_peft_model(base, VAPTConfig(**settings)).eval()


def read(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, **kwargs: Any) -> Tensor:
    return read(model(pixels, **kwargs))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def adapter_size(model: nn.Module) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if "vapt_" in name)


def named(model: nn.Module, part: str) -> list[nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if part in name]


@torch.no_grad()
def rows_of(model: nn.Module, training: bool = False, count: int = 4, adapter: str = "default") -> list[Tensor]:
    """What each layer makes of the same input."""
    dtype = next(model.parameters()).dtype
    predict(model, images().to(dtype))  # for the layers to know the grid
    model.train(training)
    made = []
    for layer in prompt_layers(model):
        assert layer.site.patches is not None
        tokens = 16 + layer.site.patches.prefix
        x = torch.randn(count, tokens, D, generator=torch.Generator().manual_seed(2)).to(dtype)
        made.append(layer.rows(adapter, x, None, None))
    model.eval()
    return made


# -- number of parameters ---------------------------------------------------------------------------------------------


def formula(
    width: int,
    blocks: int,
    grid: int,
    *,
    num_virtual_tokens: int,
    bottleneck_dim: int = 8,
    kernel_size: int = 2,
    padding: int = 0,
    num_static_layers: int | str = 1,
    share_projector: bool = True,
    channelwise_kernel: bool = False,
    learnable_scale: bool = False,
) -> int:
    """Section 4.3 of the specification, without the head."""
    static = blocks if num_static_layers == "all" else int(num_static_layers)
    adaptive = blocks - static
    reduced = (grid + 2 * padding - kernel_size + 1) ** 2
    kernel = kernel_size**2 * (width if channelwise_kernel else 1)
    projector = 2 * bottleneck_dim * width + (1 if learnable_scale else 0)
    projectors = min(adaptive, 1) if share_projector else adaptive
    return (
        static * num_virtual_tokens * width
        + adaptive * (num_virtual_tokens * (reduced + 1) + kernel + 2 * width)
        + projectors * projector
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_virtual_tokens": 1},
        {"num_virtual_tokens": 7, "kernel_size": 3},
        {"num_virtual_tokens": 5, "kernel_size": 3, "padding": 2, "bottleneck_dim": 3},
        {"num_virtual_tokens": 5, "num_static_layers": 2},
        {"num_virtual_tokens": 5, "num_static_layers": 0},
        {"num_virtual_tokens": 5, "num_static_layers": "all"},
        {"num_virtual_tokens": 5, "num_static_layers": DEPTH},
        {"num_virtual_tokens": 2, "share_projector": False, "bottleneck_dim": 4},
        {"num_virtual_tokens": 2, "channelwise_kernel": True},
        {"num_virtual_tokens": 2, "learnable_scale": True},
        {"num_virtual_tokens": 2, "learnable_scale": True, "share_projector": False, "num_static_layers": 0},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_parameter_count(settings: dict[str, Any]) -> None:
    model = get_peft_model(vit(), VAPTConfig(**settings))
    assert adapter_size(model) == formula(D, DEPTH, 4, **settings)
    assert sum(weight.numel() for weight in trained(model).values()) == adapter_size(model) + 3 * (D + 1)


def test_parameter_count_of_vit_b() -> None:
    """The table of the specification."""
    table = {1: 31_866, 5: 42_418, 10: 55_608, 50: 161_128, 100: 293_028}
    with torch.device("meta"):
        base = transformers.ViTModel(transformers.ViTConfig())
    for count, expected in table.items():
        model = get_peft_model(base, VAPTConfig(num_virtual_tokens=count, bottleneck_dim=8, kernel_size=2))
        assert adapter_size(model) == expected == formula(768, 12, 14, num_virtual_tokens=count)
        model.unload()
        model = get_peft_model(base, VAPTConfig(num_virtual_tokens=count, num_static_layers="all"))
        assert adapter_size(model) == count * 12 * 768
        model.unload()


# -- the zero start ---------------------------------------------------------------------------------------------------


def first_steps(model: nn.Module) -> list[dict[str, float]]:
    """Largest gradient of every trained tensor in the first two steps of plain gradient descent."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    model.train()
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images(4).double())
        nn.functional.cross_entropy(read(output), torch.tensor([0, 1, 2, 0])).backward()
        found.append({name: weight.grad.abs().max().item() for name, weight in trained(model).items()})  # type: ignore
        optimizer.step()
    return found


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_the_first_step_reaches_the_token_projector_and_the_second_everything(eps: float) -> None:
    model = prompted(vit(layer_norm_eps=eps), init_weights=True).double()
    assert all((rows == 0.0).all() for rows in rows_of(model)[1:])
    first, second = first_steps(model)
    silent = ("vapt_norms", "vapt_kernel", "vapt_down", "vapt_up")
    for name, size in first.items():
        if any(part in name for part in silent):
            assert size == 0.0, name
        elif name.endswith("vapt_token_prompts.default.bias"):
            # The same number on all channels of a zero prompt is what the block's own norm takes out.
            assert size < 1e-12, name
        else:
            assert size > 1e-4, name
    assert {part for part in silent for name in first if part in name} == set(silent)
    for name, size in second.items():
        assert size > 1e-6, name


def test_the_first_gradient_does_not_grow_as_the_epsilon_of_the_norm_shrinks() -> None:
    """A zero prompt's gradient behind a norm of epsilon 1e-12, which is transformers' for ViT, is that of 1e-6."""
    sizes = []
    for eps in (1e-6, 1e-12):
        model = prompted(vit(layer_norm_eps=eps), init_weights=True).double().train()
        nn.functional.cross_entropy(read(model(images().double())), torch.tensor([0, 1])).backward()
        sizes.append([weight.grad.norm().item() for weight in named(model, "vapt_token_prompts.default.weight")])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01) and min(sizes[0]) > 1e-3


def test_static_prompts_start_as_the_official_code_has_them() -> None:
    model = prompted(vit(), init_weights=True, num_virtual_tokens=500, num_static_layers=2)
    bound = math.sqrt(6 / (3 * PATCH * PATCH + D))
    for prompts in named(model, "vapt_prompts"):
        assert prompts.abs().max() <= bound and prompts.abs().max() > 0.99 * bound
        assert abs(prompts.mean().item()) < 0.02 * bound


def test_without_initial_weights_every_prompt_depends_on_its_image() -> None:
    for rows in rows_of(prompted(vit()))[1:]:
        assert (rows[0] - rows[1]).abs().amax(dim=-1).min() > 0.1


# -- the projector that layers share ----------------------------------------------------------------------------------


def assert_tied(model: nn.Module, layers: int = DEPTH - 1, adapter: str = "default") -> None:
    """The model has one projector, and it is the one that all its adaptive layers use."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if f"vapt_up.{adapter}" in name]
    assert len(names) == 1, names
    before = rows_of(model, adapter=adapter)
    up = model.get_parameter(names[0])
    kept = up.detach().clone()
    with torch.no_grad():
        up.add_(1.0)
    after = rows_of(model, adapter=adapter)
    changed = [bool((one - two).abs().max() > 0.1) for one, two in zip(before, after, strict=True)]
    assert changed == [False] * (DEPTH - layers) + [True] * layers
    with torch.no_grad():
        up.copy_(kept)


def test_the_shared_projector_is_stored_once(tmp_path: Path) -> None:
    model = prompted(vit())
    assert_tied(model)
    model.save_pretrained(tmp_path)
    for names in (get_peft_model_state_dict(model), load_file(tmp_path / "adapter_model.safetensors")):
        assert [name for name in names if "vapt_up" in name] == [
            "base_model.model.promptmoe.shared.VAPT.vapt_up.weight"
        ]
    alone = prompted(vit(), share_projector=False)
    assert len(named(alone, "vapt_up")) == DEPTH - 1
    assert not hasattr(getattr(alone.get_base_model().promptmoe, "shared", None), "VAPT")


def test_the_shared_projector_stays_shared_in_a_deep_copy() -> None:
    """And the copy, made before any forward, learns the grid by itself."""
    model = prompted(vit())
    copied = copy.deepcopy(model)
    expected = predict(copied, images())
    assert [layer.grids.grids for layer in prompt_layers(copied)[1:]] == [{16: (4, 4)}] * (DEPTH - 1)
    assert [layer.grids.grids for layer in prompt_layers(model)[1:]] == [{}] * (DEPTH - 1)
    assert_tied(copied)
    with torch.no_grad():
        for weight in named(copied, "vapt_up"):
            weight.normal_()
    assert (predict(copied, images()) - expected).abs().max() > 1e-3
    assert torch.equal(predict(model, images()), expected)
    assert_tied(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_shared_projector_stays_shared_when_loaded(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = prompted(vit(), learnable_scale=True)
    expected = predict(model, images())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(predict(loaded, images()), expected)
    assert_tied(loaded)


def test_the_shared_projector_is_shared_when_injected() -> None:
    base = vit()
    torch.manual_seed(1)
    model = inject_adapter_in_model(VAPTConfig(num_virtual_tokens=P, init_weights=False), base)
    assert_tied(model)
    assert torch.equal(predict(model, images()), predict(prompted(vit()), images()))


def test_two_adapters_have_two_shared_projectors() -> None:
    model = prompted(vit())
    model.add_adapter("other", VAPTConfig(num_virtual_tokens=2, bottleneck_dim=4, init_weights=False))
    assert [tuple(weight.shape) for weight in named(model, "vapt_up")] == [(D, 8), (D, 4)]
    other = rows_of(model, adapter="other")
    assert_tied(model)  # of "default"
    model.set_adapter("other")
    assert_tied(model, adapter="other")
    model.delete_adapter("default")
    assert [tuple(weight.shape) for weight in named(model, "vapt_up")] == [(D, 4)]
    assert all(torch.equal(one, two) for one, two in zip(rows_of(model, adapter="other"), other, strict=True))


# -- dropouts ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_channel_dropout_takes_whole_channels_of_a_sample_before_the_bias() -> None:
    """Dropping a channel of the convolution's map is dropping it in all prompts, and the bias comes later."""
    model = prompted(vit(), channel_dropout=0.25, use_projector=False).double()
    plain, noisy = rows_of(model, count=64), rows_of(model, training=True, count=64)
    assert torch.equal(plain[0], noisy[0])  # static
    for number, (one, two) in enumerate(zip(plain[1:], noisy[1:], strict=True)):
        bias = named(model, "vapt_token_prompts.default.bias")[number][:, None]
        factor = (two - bias) / (one - bias)
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=0, atol=1e-9)
        kept = factor[:, 0] > 0.5
        torch.testing.assert_close(factor[:, 0], kept.double() * (4 / 3), rtol=0, atol=1e-9)
        assert 0.7 < kept.double().mean() < 0.8
        assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(noisy[1], noisy[2])


def test_channel_dropout_belongs_to_the_convolution() -> None:
    model = prompted(vit(), channel_dropout=0.5, use_conv=False)
    assert all(torch.equal(one, two) for one, two in zip(rows_of(model), rows_of(model, training=True), strict=True))


def test_prompt_dropout_takes_values_of_static_prompts_only() -> None:
    model = prompted(vit(), prompt_dropout=0.25, num_static_layers=2, num_virtual_tokens=50)
    plain, noisy = rows_of(model), rows_of(model, training=True)
    assert torch.equal(plain[2], noisy[2])
    for one, two in zip(plain[:2], noisy[:2], strict=True):
        kept = two != 0
        torch.testing.assert_close(two, torch.where(kept, one / 0.75, 0.0))
        assert abs(kept.float().mean() - 0.75) < 0.02
        assert not torch.equal(kept[0], kept[1])


def test_projector_dropout_takes_hidden_units() -> None:
    settings = {"bottleneck_dim": 1, "activation": "sigmoid", "num_virtual_tokens": 50}
    model = prompted(vit(), projector_dropout=0.25, **settings)
    bare = prompted(vit(), projector_dropout=0.25, **settings)
    with torch.no_grad():
        named(bare, "vapt_up")[0].zero_()
    linear, plain, noisy = rows_of(bare), rows_of(model), rows_of(model, training=True)
    assert torch.equal(plain[0], noisy[0])
    for z, one, two in zip(linear[1:], plain[1:], noisy[1:], strict=True):
        update = (one - z).abs().amax(dim=-1)
        factor = (two - z).abs().amax(dim=-1) / update  # by sample and prompt, for the one hidden unit
        kept = factor > 0.5
        torch.testing.assert_close(factor, kept * (4 / 3), rtol=1e-3, atol=1e-4)
        assert 0.65 < kept.float().mean() < 0.85


# -- the frozen part in evaluation mode -------------------------------------------------------------------------------


def noisy_vit() -> Any:
    return vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)


NOISY: dict[str, Callable[[], Any]] = {
    "vit": noisy_vit,
    "beit": lambda: hugging_face(
        "BeitForImageClassification", "BeitConfig", drop_path_rate=0.5, hidden_dropout_prob=0.5
    ),
    "timm": lambda: timm_vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, patch_drop_rate=0.5),
}


def is_noise(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) or type(module).__name__.endswith(("DropPath", "PatchDropout"))


@pytest.mark.parametrize("name", NOISY)
def test_the_frozen_part_stays_in_evaluation_mode(name: str) -> None:
    model = prompted(NOISY[name]())
    expected = predict(model, images())
    model.train()
    noise = {path: module.training for path, module in model.named_modules() if is_noise(module)}
    assert noise and not any(noise.values()), noise
    assert torch.equal(predict(model, images()), expected)
    for layer in prompt_layers(model):
        assert all(module.training for module in layer.modules())
    heads = [module for path, module in model.named_modules() if path.endswith("modules_to_save.default")]
    assert heads and all(head.training for head in heads)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_the_frozen_part_trains_along_when_asked(name: str) -> None:
    model = prompted(NOISY[name](), backbone_eval=False)
    expected = predict(model, images())
    model.train()
    assert all(module.training for module in model.modules())
    assert not torch.equal(predict(model, images()), predict(model, images()))
    assert torch.equal(predict(model.eval(), images()), expected)


def test_the_frozen_part_of_a_timm_model_trains_along_when_asked() -> None:
    model = prompted(timm_vit(drop_path_rate=0.5, proj_drop_rate=0.5), backbone_eval=False).train()
    assert all(module.training for module in model.modules())
    assert not torch.equal(predict(model, images()), predict(model, images()))


def test_heads_train_whole() -> None:
    """The batch norms of a segmentation head's trained copy keep their statistics, those of the original do not."""
    model = prompted(upernet()).train()
    norms = {path: module.training for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(norms.values()) == {True, False}
    assert all(training == (".modules_to_save.default." in path) for path, training in norms.items())


def test_the_frozen_part_is_in_evaluation_mode_from_the_start() -> None:
    """A model that nobody has told to train is in training mode if timm made it."""
    base = timm_vit(proj_drop_rate=0.5, drop_path_rate=0.3).train()
    model = get_peft_model(base, VAPTConfig(num_virtual_tokens=P, init_weights=False, **QUIET))
    assert model.training and not base.blocks[0].training
    assert torch.equal(read(model(images())), read(model(images())))


def test_evaluation_mode_follows_the_working_adapter() -> None:
    base = timm_vit(proj_drop_rate=0.5)
    settings = {"num_virtual_tokens": P, "init_weights": False} | QUIET
    model = get_peft_model(base, VAPTConfig(**settings))
    model.add_adapter("noisy", VAPTConfig(**settings, backbone_eval=False))
    model.train()
    for name, frozen in (("default", True), ("noisy", False), ("default", True)):
        model.set_adapter(name)
        model(images())
        assert base.blocks[0].attn.proj_drop.training is not frozen, name


def test_a_model_in_training_trains_on_after_unloading() -> None:
    base = timm_vit(proj_drop_rate=0.5)
    get_peft_model(base, VAPTConfig()).train().unload()
    assert all(module.training for module in base.modules())


def test_unloading_leaves_nothing_with_another_methods_layers() -> None:
    base = vit(hidden_dropout_prob=0.5)
    get_peft_model(base, MEPTConfig(layers_to_transform=[0], num_virtual_tokens=2, modules_to_save=[]))
    config = VAPTConfig(layers_to_transform=[1, 2], num_static_layers=0, modules_to_save=[], init_weights=False)
    other = VAPTModel(base, config, "second")
    with torch.no_grad():
        base(images())
    base.train()
    assert not base.vit.layers[0].dropout.training
    other.unload()
    base.train()
    assert all(module.training for module in base.modules())
    assert [type(layer).__name__ for layer in base.promptmoe._layers] == ["MEPTLayer"]
    assert not [reader for book in base.promptmoe._grid_books for reader in book.readers]


@pytest.mark.parametrize("how", ["disabled", "inactive"])
def test_evaluation_mode_is_for_working_adapters(how: str) -> None:
    """Without a working adapter the model is trained as if there were none."""
    model = prompted(noisy_vit())
    if how == "disabled":
        with model.disable_adapter():
            model.train()
            assert all(module.training for module in model.modules() if is_noise(module))
    else:
        model.add_adapter("other", VAPTConfig(num_virtual_tokens=P, backbone_eval=False))
        model.set_adapter("other")
        model.train()
        assert all(module.training for module in model.modules() if is_noise(module))


def gradients(model: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    read(model(images())).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in trained(model).items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpoints_in_spite_of_evaluation_mode(reentrant: bool) -> None:
    model = prompted(noisy_vit())
    expected = gradients(model)
    calls = []
    for layer in prompt_layers(model):
        layer.site.attention.register_forward_hook(lambda *_: calls.append(1))
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # The first block's input needs a gradient, or nothing would be computed again.
        model.get_base_model().enable_input_require_grads()
    found = gradients(model)
    assert len(calls) == 2 * DEPTH
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


# -- other grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [(3, 5), (6, 4), (11, 13), (2, 2), (1, 1)])
def test_resampling_keeps_sums_and_flat_maps(to: tuple[int, int]) -> None:
    own = (4, 5)
    tokens = torch.randn(P, 20, dtype=torch.float64, requires_grad=True)
    found = resample(tokens, own, to)
    assert found.shape == (P, to[0] * to[1])
    torch.testing.assert_close(found.sum(dim=1), tokens.sum(dim=1), rtol=0, atol=1e-12)
    flat = resample(torch.full((P, 20), 0.3, dtype=torch.float64), own, to)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3 * 20 / (to[0] * to[1])), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), tokens)
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=0, atol=1e-12)


def test_resampling_to_the_same_grid_is_the_identity() -> None:
    tokens = torch.randn(P, 20, dtype=torch.float64)
    torch.testing.assert_close(resample(tokens, (4, 5), (4, 5)), tokens, rtol=0, atol=1e-12)


def test_resampling_keeps_what_is_where() -> None:
    """A weight in one corner is in that corner of every other grid."""
    own, to = (4, 5), (8, 10)
    tokens = torch.zeros(4, 20)
    for prompt, (row, column) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4)]):
        tokens[prompt, row * 5 + column] = 1.0
    peaks = [divmod(int(index), 10) for index in resample(tokens, own, to).argmax(dim=1)]
    assert peaks == [(0, 0), (0, 9), (7, 0), (7, 9)]


def any_size(kind: str) -> Any:
    return dinov2() if kind == "dinov2" else timm_vit(dynamic_img_size=True)


@pytest.mark.parametrize("settings", [{}, {"kernel_size": 3, "padding": 2}, {"use_conv": False}])
@pytest.mark.parametrize("kind", ["dinov2", "timm"])
def test_an_adapter_takes_images_of_another_size(kind: str, settings: dict[str, Any]) -> None:
    """As the adapter made for that size would that has its weights resampled."""
    pixels = images(2, 48, 64)
    model = prompted(any_size(kind), image_size=32, **settings)
    wanted = prompted(any_size(kind), image_size=[48, 64], **settings)
    config = wanted.peft_config["default"]
    own, to = config.reduced((4, 4)), config.reduced((6, 8))
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in wanted.named_parameters():
            resized = name.endswith("vapt_token_prompts.default.weight")
            weight.copy_(resample(mine[name], own, to) if resized else mine[name])
    found, expected = predict(model, pixels), predict(wanted, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert (predict(model, pixels) - found).abs().max() > 1e-3


class Logits(nn.Module):
    """A model that puts out a tensor, as tracing asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return read(self.model(pixels))


@pytest.mark.parametrize("size", [(32, 32), (48, 64)], ids=["own", "resampled"])
@pytest.mark.parametrize("kind", ["dinov2", "timm"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_traced_model_gives_the_same_and_the_original_goes_on(kind: str, size: tuple[int, int]) -> None:
    """Sizes are tensors while a model is traced, which are no keys to what was noted of the grid."""
    model, pixels, others = prompted(any_size(kind), image_size=32), images(2, *size), images(2, *size).flip(0) * 0.5
    before = predict(model, others)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), pixels, check_trace=False)
        torch.testing.assert_close(traced(others), before)
    torch.testing.assert_close(predict(model, others), before)
    torch.testing.assert_close(predict(model, images(2, 40, 40)), predict(copy.deepcopy(model), images(2, 40, 40)))


@pytest.mark.parametrize("kind", ["dinov2", "timm"])
def test_another_size_can_be_refused(kind: str) -> None:
    model = prompted(any_size(kind), image_size=32, resample_grid=False)
    expected = predict(model, images())
    with pytest.raises(ValueError, match=r"made for a grid of 4 x 4 patches .* have 6 x 8.* resample_grid=True"):
        predict(model, images(2, 48, 64))
    assert torch.equal(predict(model, images()), expected)


def test_a_grid_smaller_than_the_kernel_is_refused() -> None:
    model = prompted(dinov2(), image_size=32, kernel_size=3)
    with pytest.raises(ValueError, match="kernel_size=3 with padding=0 is larger than the grid of 2 x 4 patches"):
        predict(model, images(2, 16, 32))


def test_an_adapter_loads_into_a_model_of_another_image_size(tmp_path: Path) -> None:
    prompted(vit()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(image_size=48), tmp_path)
    assert loaded.peft_config["default"].image_size == [32, 32]
    found = predict(loaded, images(2, 48, 48))
    assert torch.isfinite(found).all()
    with loaded.disable_adapter():
        assert (predict(loaded, images(2, 48, 48)) - found).abs().max() > 1e-3


WIDE = {
    "vit": lambda: vit(image_size=(32, 48)),
    "timm": lambda: timm_vit(img_size=(32, 48)),
    "timm_wrapper": lambda: wrapped(img_size=(32, 48)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_grid_that_is_not_square_comes_from_the_model(kind: str) -> None:
    model = prompted(WIDE[kind](), resample_grid=False)
    assert model.peft_config["default"].image_size == [32, 48]
    assert {tuple(weight.shape) for weight in named(model, "token_prompts.default.weight")} == {(P, 3 * 5)}
    assert torch.isfinite(predict(model, images(2, 32, 48))).all()


def test_images_of_as_many_patches_in_another_shape_are_refused() -> None:
    model = prompted(dinov2(), image_size=[32, 48])
    expected = predict(model, images(2, 32, 48))
    with pytest.raises(ValueError, match=r"seen images of 4 x 6 patches and now gets 6 x 4.*one shape"):
        predict(model, images(2, 48, 32))
    assert torch.equal(predict(model, images(2, 32, 48)), expected)


@pytest.mark.parametrize("how", ["disabled", "static"])
def test_nobody_minds_the_grid_where_nobody_reads_it(how: str) -> None:
    model = prompted(dinov2(), **{"num_static_layers": "all"} if how == "static" else {})
    predict(model, images(rows=32, columns=48))
    if how == "static":
        assert torch.isfinite(predict(model, images(rows=48, columns=32))).all()
        return
    with model.disable_adapter():
        assert torch.equal(predict(model, images(rows=48)), predict(dinov2(), images(rows=48)))


def test_static_prompts_do_not_mind_masking() -> None:
    model = prompted(mae(), num_static_layers="all")
    assert torch.isfinite(predict(model, images())).all()


def test_padded_images_have_the_grid_they_are_padded_to() -> None:
    model = prompted(timm_vit(dynamic_img_size=True, dynamic_img_pad=True), image_size=30, resample_grid=False)
    assert torch.isfinite(predict(model, images(rows=30, columns=30))).all()


def test_dropped_patches_are_refused() -> None:
    base = timm_vit(patch_drop_rate=0.5)
    model = prompted(base)
    predict(model, images())
    model.train()
    base.patch_drop.train()  # by somebody's own hand
    with pytest.raises(ValueError, match=r"this layer got 8 patches.*patch dropout"):
        predict(model, images())


def test_masked_autoencoders_keep_their_patches_in_order() -> None:
    """With their shuffling the prompts would be made from patches in no order."""
    model = prompted(mae(mask_ratio=0.0))

    @torch.no_grad()
    def both() -> tuple[Any, Any]:
        return model(images()), model(images())

    one, two = both()
    assert torch.equal(one.ids_restore, torch.arange(16).expand(2, -1))
    assert torch.equal(one.last_hidden_state, two.last_hidden_state)
    with model.disable_adapter():
        one, two = both()
    assert not torch.equal(one.ids_restore, two.ids_restore)
    with pytest.raises(ValueError, match="pass no noise"):
        model(images(), noise=torch.rand(2, 16))


def test_masking_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masks and shuffles patches.*mask_ratio=0"):
        prompted(mae(mask_ratio=0.75))
    model = prompted(mae(mask_ratio=0.0))
    model.config.mask_ratio = 0.75
    with pytest.raises(ValueError, match=r"masks and shuffles patches.*mask_ratio=0"):
        model(images())
    with model.disable_adapter():
        model(images())


# -- what cannot be ---------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused adapter could have left behind."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [
            (name, key, len(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.endswith("_hooks") and isinstance(value, dict) and value
        ],
        "configs": [type(getattr(module, "config", None)) for module in model.modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def bert() -> Any:
    return hugging_face("BertForSequenceClassification", "BertConfig", vocab_size=20)


def swin() -> Any:
    settings = {"img_size": 32, "window_size": 4, "embed_dim": D, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **settings)


def pyramid(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(num_labels=3, **settings)
    return getattr(transformers, f"{name}ForImageClassification")(config)


STAGES: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "hidden_sizes": [16, 16, 32, 32],
}
NO_GRID: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "timm_swin": swin,
    "swin": lambda: pyramid("Swin", image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "hiera": lambda: pyramid("Hiera", image_size=[32, 32], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
    "pvt": lambda: pyramid("Pvt", image_size=32, **STAGES),
    "pvt_v2": lambda: pyramid("PvtV2", image_size=32, **STAGES),
    "timm_resnet": lambda: timm.create_model("resnet10t", num_classes=3),
    "segformer": lambda: transformers.SegformerForImageClassification(transformers.SegformerConfig(num_labels=3)),
    # patches of a convolutional network's features
    "timm_hybrid": lambda: timm_vit("vit_tiny_r_s16_p8_224", img_size=64),
    # windows within the blocks
    "timm_sam": lambda: timm.create_model(
        "samvit_base_patch16", img_size=64, embed_dim=D, depth=2, num_heads=4, num_classes=3
    ),
    # tokens behind the patches
    "yolos": lambda: transformers.YolosForObjectDetection(
        transformers.YolosConfig(**SIZES | {"image_size": [32, 32]}, num_detection_tokens=5)
    ),
}


def refused(base: nn.Module, pattern: str, **settings: Any) -> None:
    before = state(base)
    with pytest.raises(ValueError, match=pattern):
        get_peft_model(base, VAPTConfig(**settings))
    assert state(base) == before


@pytest.mark.parametrize("name", NO_GRID)
def test_models_without_one_patch_grid_are_refused(name: str) -> None:
    refused(NO_GRID[name](), "no attention layers over one patch grid")


@pytest.mark.parametrize(("name", "target"), [("bert", "self"), ("swin", "attention")], ids=["text", "windows"])
def test_layers_without_one_patch_grid_are_refused_by_name(name: str, target: str) -> None:
    refused(NO_GRID[name](), "", target_modules=[target])


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"kernel_size": 5}, "kernel_size=5 with padding=0 is larger than the grid of 4 x 4 patches"),
        ({"kernel_size": 8, "padding": 1}, "kernel_size=8 with padding=1 is larger"),
        ({"image_size": [32, 8]}, "is larger than the grid of 4 x 1 patches"),
        ({"padding": 16384}, "values per layer; at most"),
        ({"num_virtual_tokens": 16384, "image_size": 16384}, "values per layer; at most"),
        ({"image_size": 16384, "kernel_size": 2048, "channelwise_kernel": True}, "needs too much memory"),
        ({"padding": 1010, "num_virtual_tokens": 3, "channelwise_kernel": True}, "values per layer|too much memory"),
        ({"modules_to_save": ["embeddings"]}, "'vit.embeddings' and also a part of it"),
        ({"modules_to_save": ["projection"]}, "would copy the patch embedding"),
        ({"modules_to_save": ["vit"]}, "copies all attention layers"),
        ({"num_static_layers": 4}, "num_static_layers=4 is more than the 3 blocks"),
        ({"num_static_layers": 3, "layers_to_transform": [0, 1]}, "num_static_layers=3 is more than the 2 blocks"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' .* Leave task_type unset"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type='FEATURE_EXTRACTION' .* Leave task_type unset"),
        ({"target_modules": ["q_proj"]}, "not their projections"),
        ({"layers_to_transform": [7]}, "layers_to_transform"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], pattern: str) -> None:
    refused(vit(), pattern, **settings)


def test_a_kernel_larger_than_the_grid_is_nobodys_business_where_all_prompts_are_static() -> None:
    model = prompted(vit(), kernel_size=9, num_static_layers="all")
    assert torch.isfinite(predict(model, images())).all()


def test_the_image_size_has_to_be_said_where_the_model_takes_any() -> None:
    base = timm_vit(dynamic_img_size=True)
    base.patch_embed.img_size = None
    refused(base, "takes images of any size. Set image_size")
    assert get_peft_model(base, VAPTConfig(image_size=32)).peft_config["default"].image_size == [32, 32]


def test_a_projector_that_fills_the_memory_is_refused() -> None:
    with torch.device("meta"):
        base = transformers.ViTModel(transformers.ViTConfig())
    with pytest.raises(ValueError, match="bottleneck_dim=65536 is too large for width 768"):
        get_peft_model(base, VAPTConfig(bottleneck_dim=65536))


class Towers(nn.Module):
    """Two towers side by side."""

    def __init__(self, *towers: nn.Module) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({f"tower_{'ab'[i]}": tower for i, tower in enumerate(towers)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tower(x) for tower in self.towers.values()], dim=-1)


def test_towers_of_two_widths_share_no_projector() -> None:
    towers = Towers(timm_vit(), timm_vit(embed_dim=16))
    refused(towers, "layers of different widths")
    assert torch.isfinite(predict(prompted(towers, share_projector=False), images())).all()


def test_towers_of_two_image_sizes_need_one_said() -> None:
    refused(Towers(timm_vit(), timm_vit(img_size=64)), "images of different sizes")


def test_patch_dropout_is_refused_where_it_would_be_on() -> None:
    refused(timm_vit(patch_drop_rate=0.5), "patch_drop_rate=0", backbone_eval=False)
    model = get_peft_model(timm_vit(patch_drop_rate=0.5), VAPTConfig()).train()
    assert torch.isfinite(read(model(images()))).all()


def test_a_scale_needs_a_projector() -> None:
    with pytest.raises(ValueError, match=r"learnable_scale=True .* use_projector=False"):
        VAPTConfig(learnable_scale=True, use_projector=False)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_another_width_is_refused(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    prompted(vit()).save_pretrained(tmp_path)
    base = vit(hidden_size=48)
    before, expected = state(base), predict(base, images())
    with pytest.raises(ValueError, match=r"shape \(3, 32\) in the adapter file and \(3, 48\) in the model"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert state(base) == before
    assert torch.equal(predict(base, images()), expected)


# -- heads ------------------------------------------------------------------------------------------------------------


def wrapped(**settings: Any) -> Any:
    made = {"img_size": 32, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": 4} | settings
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=made, num_labels=3)
    return large(lambda: transformers.TimmWrapperForImageClassification(config))


def upernet() -> Any:
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = transformers.BeitConfig(**SIZES | {"num_hidden_layers": 4}, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=D,
        auxiliary_channels=8,
        num_labels=3,
    )
    return large(lambda: transformers.UperNetForSemanticSegmentation(config))


HEADS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "vit": (vit, ["classifier"]),
    "deit": (
        lambda: hugging_face("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        ["cls_classifier", "distillation_classifier"],
    ),
    "timm": (timm_vit, ["head"]),
    "timm_distilled": (lambda: timm_vit("deit_tiny_distilled_patch16_224"), ["head", "head_dist"]),
    "timm_wrapper": (wrapped, ["timm_model.head"]),
    "upernet": (upernet, ["decode_head", "auxiliary_head"]),
    "siglip_encoder": (lambda: hugging_face("SiglipVisionModel", "SiglipVisionConfig"), []),  # its head pools
}


def test_a_depth_model_trains_neck_and_head() -> None:
    settings = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8]}
    model = prompted(hugging_face("DPTForDepthEstimation", "DPTConfig", fusion_hidden_size=8, **settings))
    assert set(model.peft_config["default"].modules_to_save) == {"neck", "head.head"}


def test_the_neck_of_a_segmentation_model_trains() -> None:
    settings = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
    model = prompted(hugging_face("BeitForSemanticSegmentation", "BeitConfig", **settings))
    assert set(model.peft_config["default"].modules_to_save) == {"decode_head", "auxiliary_head", "fpn"}
    assert any("fpn.modules_to_save" in name for name in trained(model))


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_trained_and_saved(name: str, tmp_path: Path) -> None:
    build, heads = HEADS[name]
    model = prompted(build())
    assert (model.peft_config["default"].modules_to_save or []) == heads
    if not heads:
        return
    weights = {path: weight for path, weight in trained(model).items() if "vapt_" not in path}
    owners = {path.split(".modules_to_save.default.")[0].removeprefix("base_model.model.") for path in weights}
    assert owners == set(heads)
    optimizer = torch.optim.SGD(weights.values(), lr=0.01)
    before = {path: weight.detach().clone() for path, weight in weights.items()}
    for output in list(model.train()(images()).values()) if name == "deit" else [read(model.train()(images()))]:
        output.square().sum().backward(retain_graph=True)
    optimizer.step()
    if name != "upernet":  # whose auxiliary head is in its loss only
        assert not [path for path, weight in weights.items() if torch.equal(weight, before[path])]
    expected = predict(model.eval(), images())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(predict(loaded, images()), expected)
    assert not torch.equal(predict(prompted(build()), images()), expected)


@pytest.mark.parametrize("name", ["vit", "timm", "timm_wrapper"])
def test_an_empty_list_keeps_the_head_frozen(name: str, tmp_path: Path) -> None:
    build, _ = HEADS[name]
    model = prompted(build(), modules_to_save=[])
    assert all("vapt_" in path for path in trained(model))
    model.save_pretrained(tmp_path)
    assert all("vapt_" in path for path in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(predict(loaded, images()), predict(model, images()))


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dinov2", "timm"])
def test_four_threads_on_one_model_give_the_results_of_one(kind: str) -> None:
    """Also where their images are of several sizes and the first of each size comes from a thread."""
    sizes = [(32, 32)] if kind == "vit" else [(32, 32), (32, 48), (48, 48), (16, 32)]
    batches = [images(1 + number % 3, *sizes[number % len(sizes)], seed=number) for number in range(8)]
    base: Callable[[], Any] = vit if kind == "vit" else lambda: any_size(kind)
    alone, model = prompted(base(), image_size=32), prompted(base(), image_size=32)
    expected = [predict(alone, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: predict(model, batches[number % 8]), range(48)))
    for number, logits in enumerate(found):
        assert torch.equal(logits, expected[number % 8])


@pytest.mark.parametrize("matrix", ["vapt_down", "vapt_up"])
def test_the_projector_scale_does_not_change_the_start(matrix):
    starts = []
    for scale in (1.0, 25.0):
        torch.manual_seed(0)
        starts.append([scale * weight.detach() for weight in named(prompted(vit(), projector_scale=scale), matrix)])
    assert len(starts[0]) == 1  # what is compared is there
    for plain, scaled in zip(*starts, strict=True):
        torch.testing.assert_close(scaled, plain)


@pytest.mark.filterwarnings("ignore")  # of the tracer and of the export, which torch is about to drop
def test_the_tracing_export_to_onnx_is_refused() -> None:
    model = prompted(vit()).eval()
    with pytest.raises(ValueError, match="dynamo=True"):
        torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False)
    torch.jit.trace(model, (images(),), strict=False, check_trace=False)
