# SPDX-License-Identifier: Apache-2.0
"""timm models by themselves, without transformers' wrapper: what they need beyond the contract."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_promptmoe import MEPTConfig, VAPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
NAMES = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224")
VAPT = VAPTConfig(num_virtual_tokens=3, init_weights=False, channel_dropout=0.0, projector_dropout=0.0)


def tiny(name: str = NAMES[0], **settings: Any) -> nn.Module:
    """A random model whose weights are large enough for prompts to matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **TINY | settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.1 * noise) if weight.ndim == 1 else weight.copy_(0.25 * noise)
    return model


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return torch.stack(out).mean(0) if isinstance(out, tuple) else out  # a distilled model in training has two heads


def configs() -> list[Any]:
    return [
        VAPT,
        MEPTConfig(num_virtual_tokens=3, routing="sample"),
        MEPTConfig(num_virtual_tokens=3, routing="token"),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["vapt", "mept-sample", "mept-token"])
def test_train_save_load_disable_unload(name: str, which: int, tmp_path: Path) -> None:
    base = tiny(name)
    with torch.no_grad():
        plain = logits(base, images())
    torch.manual_seed(2)
    model = get_peft_model(base, configs()[which])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    labels, losses = torch.tensor([0, 2]), []
    model.train()
    for _ in range(6):
        loss = F.cross_entropy(logits(model, images()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    model.eval()
    with torch.no_grad():
        trained = logits(model, images())
        with model.disable_adapter():
            assert torch.equal(logits(model, images()), plain)
        assert (trained - plain).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny(name), tmp_path).eval(), images()), trained)
    unloaded = model.unload()
    assert not [module for module in unloaded.modules() if "forward" in vars(module)]
    heads = {"head", "head_dist"}
    for key, tensor in tiny(name).state_dict().items():
        if key.split(".")[0] not in heads:
            assert torch.equal(unloaded.state_dict()[key], tensor), key


def test_the_snippet_of_the_card_makes_the_base_model_with_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(tiny(), VAPT).eval()
    model.save_pretrained(tmp_path)
    snippet = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)[0]
    asked: dict[str, Any] = {}

    def create_model(name: str, **settings: Any) -> nn.Module:
        asked.update(settings, name=name)
        return tiny()

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", create_model)
        # tiny() itself asks timm, so the stand-in hands it the real function.
        real = timm.models.create_model
        patch.setitem(globals(), "timm", type("timm", (), {"create_model": staticmethod(real)}))
        exec(snippet, names)
    weights = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # timm's own choice where none is named
    assert asked == {"name": weights, "pretrained": True, "num_classes": 3, "img_size": (32, 32)}
    with torch.no_grad():
        assert torch.equal(logits(names["model"].eval(), images()), logits(model, images()))


def test_attention_by_hand_is_refused() -> None:
    model = tiny()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with pytest.raises(ValueError, match="set_fused_attn"):
        get_peft_model(model, VAPT)
    assert not [name for name, _ in model.named_modules() if "promptmoe" in name]


def test_attention_switched_to_by_hand_later_is_noticed() -> None:
    model = get_peft_model(tiny(), VAPT)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with pytest.raises(RuntimeError, match="reached its attention kernel 0 times"):
        model(images())


def test_rows_join_both_attentions_of_a_differential_layer() -> None:
    """As tokens would that stand in front and whose outputs are dropped: the layer knows no positions."""
    model = tiny("vit_dlittle_patch16_reg1_gap_256").double()
    config = VAPTConfig(num_virtual_tokens=3, num_static_layers="all", init_weights=False)
    layer = prompt_layers(get_peft_model(model, config).eval())[0]
    attention, norm, rows = layer.site.attention, layer.site.norm, layer.vapt_prompts["default"]()
    x = torch.randn(2, 17, rows.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = attention(norm(x))
        layer._disable_adapters = True
        expected = attention(norm(torch.cat([rows.expand(2, -1, -1), x], dim=1)))[:, 3:]
        assert (attention(norm(x)) - expected).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_causal_attention_is_refused() -> None:
    model = get_peft_model(tiny(), VAPT)
    block: Any = model.get_base_model().blocks[0]
    with pytest.raises(ValueError, match="is_causal"):
        block.attn(block.norm1(torch.randn(1, 17, 32)), is_causal=True)


def test_a_forward_that_was_wrapped_before_and_after_stays_wrapped() -> None:
    """As accelerate does it: the layer's forward is an attribute that calls what was there before."""
    model = tiny()
    attention: Any = model.blocks[0].attn
    with torch.no_grad():
        plain = model(images())
    own, calls = attention.forward, []

    def before(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("before")
        return own(*args, **kwargs)

    attention.forward = before
    peft = get_peft_model(model, VAPT)
    joined = attention.forward

    def after(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("after")
        return joined(*args, **kwargs)

    attention.forward = after
    with torch.no_grad():
        assert (peft(images()) - plain).abs().max() > 1e-3
        assert calls == ["after", "before"]
        assert torch.equal(peft.unload()(images()), plain)
    assert attention.forward is after


def test_compiled_equals_eager() -> None:
    model, labels = get_peft_model(tiny(), VAPT), torch.tensor([0, 2])
    found = []
    torch._dynamo.reset()
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = F.cross_entropy(forward(images()), labels)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_router_centring_works_where_layers_are_handed_no_arguments() -> None:
    """The first batch's mean is that of the pooled inputs, sample by sample."""
    base = tiny(NAMES[0])
    model = get_peft_model(base, MEPTConfig(num_virtual_tokens=3, router_centering=True)).train()
    seen: list[Tensor] = []
    first = prompt_layers(base)[0]
    first.site.block.register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    model(images())
    normed = seen[0] / seen[0].pow(2).mean(dim=-1, keepdim=True).add(1e-6).sqrt()
    center = first.mept_router_center["default"]
    assert int(center.steps) == 1
    torch.testing.assert_close(center.weight, normed.mean(dim=1).mean(dim=0), rtol=0, atol=1e-4)
    model(images())
    assert int(center.steps) == 2
    model.eval()(images())
    assert int(center.steps) == 2
    base.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"run again by checkpointing.*router_centering=False"):
        logits(model.train(), images()).sum().backward()
