# SPDX-License-Identifier: Apache-2.0
"""Frozen linear layers are never told that they are in evaluation while gradients have yet to come through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from peft_promptmoe import FlowModel

CASES = [Case("mept", "llama", "token", "sdpa"), Case("mept", "bert", "sample", "sdpa")]
CASES += [Case("vapt", "vit", "adaptive", "sdpa")]


class Repacked(nn.Linear):
    """As bitsandbytes' 4-bit layer on a CPU: called once in evaluation, it gives no gradient ever after."""

    repacked = False

    def forward(self, x: Tensor) -> Tensor:
        self.repacked = self.repacked or not (self.training or x.requires_grad)
        found = super().forward(x)
        return found.detach() if self.repacked else found


def quantised(model: nn.Module) -> Any:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Repacked
    return model.eval()  # as from_pretrained gives it


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def never_repacked(model: nn.Module) -> bool:
    return all(not module.repacked for module in model.modules() if isinstance(module, Repacked))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_come_through_layers_that_evaluation_repacks(case: Case) -> None:
    found, held = {}, {"backbone_eval": True} if case.method_name == "vapt" else {}
    for kind in ("plain", "repacked"):
        base = case.base() if kind == "plain" else quantised(case.base())
        torch.manual_seed(3)
        model = get_peft_model(base, case.config(init_weights=True, **held)).train()
        torch.manual_seed(4)
        model(**case.batch()).logits.square().mean().backward()
        found[kind] = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert never_repacked(base)
    torch.testing.assert_close(found["repacked"], found["plain"], rtol=0, atol=0)


def test_backbones_of_motion_models_are_not_repacked() -> None:
    backbone = quantised(Dinov2Model(Dinov2Config(patch_size=4, **SIZES)))
    model = FlowModel(backbone, freeze_backbone=True).train()
    flow = torch.zeros(2, 2, 16, 16)
    model(pixel_values=PIXELS, next_pixel_values=PIXELS, flow_labels=flow).loss.backward()
    assert never_repacked(backbone)
