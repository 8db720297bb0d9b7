# SPDX-License-Identifier: Apache-2.0
"""What MEPT's prompts are before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.mept.layer import MEPTLayer

SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
P, E, S = 3, 4, 2


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return (BertModel(BertConfig(**SIZES)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**SIZES))).eval()


def started(kind: str, seed: int = 1, **settings: Any) -> list[MEPTLayer]:
    model = base(kind)
    torch.manual_seed(seed)
    shape = {"num_virtual_tokens": P, "num_experts": E, "num_shared_experts": S}
    return prompt_layers(get_peft_model(model, MEPTConfig(**shape | settings)))  # type: ignore[return-value]


def rows(layer: MEPTLayer) -> tuple[Tensor, Tensor | None]:
    """Rows (E, P, D) of the routed and (S, P, D) of the shared experts."""
    scale = layer.prompt_config["default"].prompt_scale
    shared = layer.mept_shared_prompts["default"].weight * scale if "default" in layer.mept_shared_prompts else None
    return layer.mept_prompts["default"].weight * scale, shared


def known_inputs(kind: str) -> Tensor:
    """(P, V, D) inputs of the first layer for every token of the vocabulary at the first P places."""
    model: Any = base(kind)
    ids = torch.arange(SIZES["vocab_size"])[:, None].expand(-1, P)
    with torch.no_grad():
        hidden = model.embeddings(input_ids=ids) if kind == "bert" else model.model.embed_tokens(ids)
    return hidden.transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "settings", "experts"),
    [
        pytest.param("bert", {"routing": "token"}, E + S, id="bert-token"),
        pytest.param("llama", {"routing": "token"}, E + S, id="llama-token"),
        pytest.param("bert", {"num_experts": 1, "num_shared_experts": 0}, 1, id="bert-static"),
        pytest.param("bert", {"routing": "sample"}, E, id="bert-sample"),
        pytest.param("bert", {"routing": "sample", "num_shared_experts": 0, "top_k": 2}, E, id="bert-sample-alone"),
    ],
)
def test_rows_start_as_inputs_on_vocabulary_tokens(kind: str, settings: dict[str, Any], experts: int) -> None:
    layers = started(kind, **settings)
    routed, shared = rows(layers[0])
    parts = [part for part in (routed, shared) if part is not None]
    from_vocabulary = torch.cat(parts)[:experts]
    inputs = known_inputs(kind)
    for expert in from_vocabulary:
        for place, row in enumerate(expert):
            assert (inputs[place] - row).abs().amax(-1).min() < 1e-5
    assert len({tuple(row.tolist()) for expert in from_vocabulary for row in expert}) == experts * P
    # The next layer's rows are what the first made of such tokens.
    later = torch.cat([part for part in rows(layers[1]) if part is not None])[:experts]
    assert not torch.allclose(later, from_vocabulary, atol=1e-3)


@pytest.mark.parametrize("prompt_init", ["random", "sample_vocab"])
def test_shared_experts_start_small_where_they_are_added(prompt_init: str) -> None:
    for layer in started("bert", routing="sample", prompt_init=prompt_init):
        routed, shared = rows(layer)
        assert shared is not None and layer.site.input_std == pytest.approx(1.0, abs=1e-4)
        assert routed.std().item() == pytest.approx(1.0, rel=0.15)
        assert shared.std().item() == pytest.approx(0.1, rel=0.15)


def test_seeds_make_the_start() -> None:
    one, same, other = (rows(started("bert", seed=seed)[0])[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
