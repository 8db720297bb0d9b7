# SPDX-License-Identifier: Apache-2.0
"""Models that answer for every pixel: prompts leave their patch tokens in number and order, and their heads train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Dinov2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from peft_promptmoe import VAPTConfig

# peft asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIDE, PATCH, CLASSES = 64, 8, 4
GRID = SIDE // PATCH
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SCALES = [1, 2, 3, 6]


def beit() -> Any:
    config = BeitConfig(
        **SIZES,
        intermediate_size=64,
        out_indices=[1, 2, 3, 4],
        pool_scales=SCALES,
        num_labels=CLASSES,
        auxiliary_channels=16,
        use_relative_position_bias=True,
    )
    return BeitForSemanticSegmentation(config)


def upernet_on_dinov2() -> Any:
    backbone = Dinov2Config(**SIZES, mlp_ratio=2, out_indices=[1, 2, 3, 4], reshape_hidden_states=True)
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=32,
        pool_scales=SCALES,
        auxiliary_in_channels=32,
        auxiliary_channels=16,
        num_labels=CLASSES,
    )
    return UperNetForSemanticSegmentation(config)


MODELS: dict[str, Callable[[], Any]] = {"beit": beit, "upernet-dinov2": upernet_on_dinov2}
# The last block, whose output ends in the patch tokens.
LAST_BLOCK = {"beit": "beit.layers.3", "upernet-dinov2": "backbone.encoder.layer.3"}
# BEiT's heads read what goes into blocks, so that nothing trains in the last one, whose output no head sees.
UNREAD = {"beit": "beit.layers.3."}

each_model = pytest.mark.parametrize("name", sorted(MODELS))


def make(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch() -> dict[str, Tensor]:
    """Pictures of squares: the class of a pixel is the brightness of its square."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (4, 4, 4), generator=generator)
    labels = labels.repeat_interleave(SIDE // 4, dim=1).repeat_interleave(SIDE // 4, dim=2)
    noise = 0.3 * torch.randn(4, 3, SIDE, SIDE, generator=generator)
    return {"pixel_values": labels[:, None] - 1.5 + noise, "labels": labels}


def last_tokens(model: nn.Module, block: str, inputs: dict[str, Tensor]) -> Tensor:
    """(B, N, D) patch tokens behind the last block."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(block).register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[0][:, -GRID * GRID :]


def train(model: PeftModel, inputs: dict[str, Tensor], steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@each_model
def test_patch_tokens_keep_their_number_and_order(name: str) -> None:
    base, inputs = make(name), batch()
    plain = last_tokens(base, LAST_BLOCK[name], inputs)
    shape = base(**inputs).logits.shape
    model = get_peft_model(base, VAPTConfig()).eval()
    train(model, inputs, steps=3)  # until then all adaptive prompts are zero
    prompted = last_tokens(base, LAST_BLOCK[name], inputs)
    assert model(**inputs).logits.shape == shape
    assert prompted.shape == plain.shape == (4, GRID * GRID, SIZES["hidden_size"])
    assert not torch.allclose(prompted, plain, atol=1e-5)
    # What a patch has become is still nearest to what the same patch is without prompts.
    nearest = torch.cdist(prompted, plain).argmin(dim=-1)
    assert torch.equal(nearest, torch.arange(GRID * GRID).expand(4, -1))


@each_model
def test_a_few_steps_train_prompts_and_heads_and_nothing_else(name: str) -> None:
    model, inputs = get_peft_model(make(name), VAPTConfig()), batch()
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    losses = train(model, inputs)
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.7 * losses[0]
    changed = {path for path, parameter in model.named_parameters() if not torch.equal(parameter, before[path])}
    heads = {path for path in before if ".modules_to_save." in path}
    prompts = {path for path in before if ".vapt_" in path}
    unread = {path for path in prompts if UNREAD.get(name, "nowhere") in path}
    assert {path for path, parameter in model.named_parameters() if parameter.requires_grad} == heads | prompts
    assert changed == (heads | prompts) - unread
    neck = {"fpn"} if name == "beit" else set()  # which nobody has trained before
    found = {path.split(".modules_to_save")[0].rpartition(".")[2] for path in heads}
    assert found == {"decode_head", "auxiliary_head"} | neck


@each_model
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path: Path) -> None:
    """The running statistics of the heads' batch norms come along."""
    model, inputs = get_peft_model(make(name), VAPTConfig()), batch()
    train(model, inputs, steps=4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name), tmp_path).eval()
    with torch.no_grad():
        expected, found = model(**inputs).logits, loaded(**inputs).logits
        plain = make(name)(**inputs).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(plain, expected, atol=1e-2)
    with torch.no_grad(), loaded.disable_adapter():
        assert torch.equal(loaded(**inputs).logits, plain)
