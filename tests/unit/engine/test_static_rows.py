# SPDX-License-Identifier: Apache-2.0
"""Prompts that are projected once: the same outputs, and no longer than they may be kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from peft_promptmoe import MEPTConfig, PMoEConfig, VAPTConfig, cached_prompts
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.mept import layer as mept_layer
from peft_promptmoe.vapt import layer as vapt_layer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LAYERS = 2


def bert() -> Any:
    return BertModel(BertConfig(**SIZES, vocab_size=20))


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=20))


def vit() -> Any:
    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))


def timm_vit() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=LAYERS, num_heads=2, num_classes=0
    )


STATIC: dict[str, Any] = {"num_experts": 1, "num_shared_experts": 0}
DEEP: dict[str, Any] = {"num_static_layers": "all", "prompt_dropout": 0.5}
# Model, config, and how many of its layers make their rows anew in a second forward.
CASES: dict[str, tuple[Any, Any, int]] = {
    "bert-static": (bert, MEPTConfig(**STATIC), 0),
    "bert-token": (bert, MEPTConfig(routing="token"), 0),
    "bert-sample": (bert, MEPTConfig(routing="sample"), LAYERS),
    "llama-static": (llama, MEPTConfig(**STATIC), LAYERS),
    "vit-deep": (vit, VAPTConfig(**DEEP), 0),
    "vit-adaptive": (vit, VAPTConfig(kernel_size=1), LAYERS - 1),
    "timm-deep": (timm_vit, VAPTConfig(**DEEP), 0),
}


def inputs(make: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if make in (bert, llama):
        return torch.randint(20, (2, 5), generator=generator)
    return torch.randn(2, 3, 16 if make is vit else 32, 16 if make is vit else 32, generator=generator)


def output(model: nn.Module, given: Tensor) -> Tensor:
    found: Any = model(given)
    return found if isinstance(found, Tensor) else found[0]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Notes each time that a layer makes rows."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for cls in (mept_layer.MEPTLayer, vapt_layer.VAPTLayer):

            def rows(self: Any, *args: Any, plain: Any = cls.rows) -> Tensor:
                made.append(self.site.name)
                return plain(self, *args)

            patch.setattr(cls, "rows", rows)
        yield made


def prompted(name: str) -> Any:
    torch.manual_seed(0)
    make, config, _ = CASES[name]
    return get_peft_model(make(), config).eval()


@pytest.mark.parametrize("name", CASES)
def test_rows_are_made_once_and_outputs_stay(name: str) -> None:
    make, _, anew = CASES[name]
    model, batches = prompted(name), [inputs(make, seed) for seed in range(3)]
    with torch.no_grad():
        expected = [output(model, batch) for batch in batches]
        with counted() as made, cached_prompts(model):
            found = [output(model, batches[0])]
            assert len(made) == LAYERS
            found += [output(model, batch) for batch in batches[1:]]
            assert len(made) == LAYERS + 2 * anew
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["bert-static", "vit-deep"])
def test_nothing_is_kept_for_training_or_after_the_block(name: str) -> None:
    make, _, _ = CASES[name]
    model, given = prompted(name), inputs(make, 0)
    with counted() as made, cached_prompts(model):
        output(model, given)  # with a gradient
        output(model, given)
        model.train()
        with torch.no_grad():
            output(model, given)
        model.eval()
        assert len(made) == 3 * LAYERS
        with torch.no_grad():
            output(model, given)
    with torch.no_grad():
        before = output(model, given)
        for layer in prompt_layers(model):
            for parameter in layer.parameters():
                parameter.add_(1.0)
        assert not torch.equal(output(model, given), before)
        with cached_prompts(model), cached_prompts(model):
            assert not torch.equal(output(model, given), before)
    assert all(layer.kept is None for layer in prompt_layers(model))


def test_adapters_and_precisions_are_kept_apart() -> None:
    model = prompted("bert-static")
    torch.manual_seed(1)
    model.add_adapter("other", MEPTConfig(**STATIC))
    given = inputs(bert, 0)

    def everything() -> list[Tensor]:
        found = []
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            found.append(output(model, given))
            with torch.autocast("cpu", torch.bfloat16):
                found.append(output(model, given))
        return found

    with torch.no_grad():
        expected = everything()
        with cached_prompts(model):
            for found in (everything(), everything()):
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_has_no_such_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"), cached_prompts(bert()):
        pass
    with pytest.raises(ValueError, match="no prompts"), cached_prompts(get_peft_model(vit(), PMoEConfig())):
        pass
