# SPDX-License-Identifier: Apache-2.0
"""torchao: prompts on a model of int8 weights are those on the same model with its weights dequantised."""

from __future__ import annotations

import pytest
import torch
from small import VOCABULARY, adapted, adapters, fill, gradients, largest_difference, llama, vit
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

CLIENT = "torchao"
CASES = [("CAUSAL_LM", kind) for kind in adapters("CAUSAL_LM") if kind != "lora"]
CASES += [(None, kind) for kind in adapters(None) if kind != "lora"]


def all_but_the_head(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path != "classifier"


@pytest.mark.parametrize(
    ("task", "kind"), CASES, ids=[f"{'vit' if task is None else 'llama'}-{kind}" for task, kind in CASES]
)
def test_int8_weights_are_the_dequantised_model(task: str | None, kind: str) -> None:
    """Weights in int8: logits and gradients equal those of the dequantised model to 1e-4."""
    found = {}
    for name in ("quantised", "plain"):
        base = vit() if task is None else llama()
        quantize_(base, Int8WeightOnlyConfig(), all_but_the_head)
        held = [module for module in base.modules() if isinstance(getattr(module, "weight", None), TorchAOBaseTensor)]
        assert len(held) >= 12
        if name == "plain":
            for module in held:
                module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
        model = adapted(base, adapters(task)[kind]).train()
        fill(model)
        generator = torch.Generator().manual_seed(2)
        if task is None:
            output = model(pixel_values=torch.randn(3, 3, 32, 32, generator=generator))
            loss = output.logits.square().mean()
        else:
            ids = torch.randint(8, VOCABULARY, (3, 9), generator=generator)
            labels = ids.clone()
            labels[:, :4] = -100
            output = model(input_ids=ids, labels=labels)
            loss = output.loss
        loss.backward()
        found[name] = (output.logits.detach(), gradients(model))
    torch.testing.assert_close(found["quantised"][0], found["plain"][0], rtol=1e-4, atol=1e-4)
    assert largest_difference(found["quantised"][1], found["plain"][1]) < 1e-3
