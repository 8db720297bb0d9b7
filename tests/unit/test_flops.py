# SPDX-License-Identifier: Apache-2.0
"""What prompts cost, in exact floating-point operations counted on the meta device."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from peft_promptmoe import MEPTConfig

BATCH, LENGTH = 8, 128
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# `past_key_values` before transformers 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
TOKEN: dict[str, Any] = {"routing": "token", "num_experts": 4, "num_shared_experts": 1}


def make(shape: str, **settings: Any) -> nn.Module:
    """A model of this shape on the meta device, prompted if there are settings."""
    with torch.device("meta"):
        base: Any = BertModel(BertConfig()) if shape == "bert" else LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
        base.eval()
        return get_peft_model(base, MEPTConfig(**settings)).eval() if settings else base


def forward_flops(model: nn.Module, training: bool = False, **inputs: Any) -> int:
    # Counters of several torch versions do not know the fused kernel for CPUs.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


@lru_cache
def flops(shape: str, training: bool = False, **settings: Any) -> int:
    """Of one forward pass over 8 samples of 128 tokens; in training the gates are folded into queries and keys."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    more: dict[str, Any] = {}
    if shape == "llama":
        # A mask that is ready and no cache: making one and asking the other need values, which meta tensors lack.
        mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool, device="meta").tril()
        more = {"attention_mask": mask, "use_cache": False, "labels": ids}
    return forward_flops(make(shape, **settings).train(training), training, input_ids=ids, **more)


@pytest.mark.parametrize(
    ("shape", "settings", "limit"),
    [
        pytest.param("bert", {"routing": "sample", "num_virtual_tokens": 20}, 1.035, id="bert-sample-20"),
        pytest.param("bert", {"routing": "sample", "num_virtual_tokens": 100}, 1.16, id="bert-sample-100"),
        pytest.param("bert", TOKEN | {"num_virtual_tokens": 20}, 1.05, id="bert-token-20"),
        pytest.param("llama", {"routing": "sample", "num_virtual_tokens": 20}, 1.02, id="llama-sample-20"),
        pytest.param("llama", {"routing": "sample", "num_virtual_tokens": 100}, 1.04, id="llama-sample-100"),
        pytest.param("llama", TOKEN | {"num_virtual_tokens": 20}, 1.02, id="llama-token-20"),
    ],
)
def test_forward(shape: str, settings: dict[str, Any], limit: float) -> None:
    ratio = flops(shape, **settings) / flops(shape)
    print(f"{shape} {settings} x{ratio:.4f}")
    assert 1.0 < ratio <= limit


@pytest.mark.parametrize(("shape", "limit"), [("bert", 1.05), ("llama", 1.02)])
def test_forward_with_gates_that_train(shape: str, limit: float) -> None:
    ratio = flops(shape, training=True, **TOKEN, num_virtual_tokens=20) / flops(shape)
    print(f"{shape} token routing in training x{ratio:.4f}")
    assert 1.0 < ratio <= limit


@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_sample_routing_does_not_grow_with_experts(shape: str) -> None:
    few, many = (flops(shape, routing="sample", num_virtual_tokens=20, num_experts=e) for e in (4, 64))
    print(f"{shape} 4 -> 64 experts x{many / few:.5f}")
    assert few <= many < 1.01 * few


@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_token_routing_grows_linearly_with_experts(shape: str) -> None:
    """Every token meets every expert's columns in a pass over many tokens: the price is known and documented."""
    base = flops(shape)
    extra = {e: flops(shape, **TOKEN | {"num_virtual_tokens": 20, "num_experts": e}) - base for e in (4, 8, 12)}
    assert extra[8] - extra[4] == extra[12] - extra[8] > 0


@pytest.mark.parametrize("active", [1, 2])
def test_decoding_a_token_costs_its_experts_only(active: int) -> None:
    width, layers, slots = 64, 2, 20
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(3, 50, (BATCH, 6))

    def decode(**settings: Any) -> int:
        base: Any = LlamaForCausalLM(config).eval()
        model = get_peft_model(base, MEPTConfig(**settings)).eval() if settings else base
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
        return forward_flops(model, input_ids=ids[:, :1], **{CACHE: cache})

    settings = {"routing": "token", "num_virtual_tokens": slots, "top_k": active}
    few, many = decode(**settings, num_experts=32), decode(**settings, num_experts=64)
    router = 2 * BATCH * width * layers  # of one expert
    columns = 2 * 2 * BATCH * width * (active + 1) * slots * layers  # queries and values of the chosen and the shared
    assert many - few == 32 * router
    assert few - decode() == 32 * router + columns
