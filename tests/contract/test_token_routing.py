# SPDX-License-Identifier: Apache-2.0
"""Token routing equals attention over every expert's columns, in architectures that only the generic rule reaches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dense_columns import use_dense_columns
from generic_models import ARCHITECTURES, EXACT, WORKS, make_inputs, make_model, with_outcome
from peft import get_peft_model
from torch import Tensor

from peft_promptmoe import MEPTConfig


def attach(name: str, model: Any, active: int) -> Any:
    """The model with four experts, in which every trained tensor matters."""
    settings = ARCHITECTURES[name].mept | {"routing": "token", "decoder_sees_prompts": False}
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the architecture is not of the table
        config = MEPTConfig(num_virtual_tokens=3, num_experts=4, top_k=active, prompt_scale=1.0, **settings)
        prompted = get_peft_model(model, config).eval()
        return prompted if ARCHITECTURES[name].single else prompted.double()


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What a user reads, and gradients of the trained tensors."""
    output = model(**inputs)
    logits = output.get("logits")
    found: Tensor = output.last_hidden_state if logits is None else logits
    mask = inputs.get("attention_mask")
    if mask is not None and found.ndim == 3 and found.shape[1] == mask.shape[1]:
        found = found[mask.bool()]
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return found, list(torch.autograd.grad((found * weight).sum(), trained))


@pytest.mark.parametrize("name", with_outcome(EXACT, WORKS))
def test_token_routing_equals_all_columns_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    prompted = attach(name, model, active=2)
    # Eager kernels take their softmax in float32, whose rounding then differs.
    arch = ARCHITECTURES[name]
    tolerance = max(arch.tolerance, 1e-11)
    tolerance = 1e-5 if model.config._attn_implementation == "eager" else tolerance
    for padded in (False, True) if model.main_input_name == "input_ids" and arch.pads else (False,):
        inputs = make_inputs(model, padded)
        found, gradients = run(prompted, inputs)
        with monkeypatch.context() as patch:
            use_dense_columns(patch)
            expected, wanted = run(prompted, inputs)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        for gradient, reference in zip(gradients, wanted, strict=True):
            within = tolerance * (1 + reference.abs().max().item())
            torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=within)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
