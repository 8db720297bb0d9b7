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
from peft_promptmoe.engine.blocks import block_size

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


@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("active", [1, 2])
def test_of_more_experts_token_routing_pays_rows_and_router_only(active: int, training: bool) -> None:
    """And what fills blocks up. A token's products with slots are those of its own experts, however many there are."""
    slots, layers, width, tokens = 10, 12, 768, BATCH * LENGTH

    def step(experts: int) -> int:
        settings = TOKEN | {"num_virtual_tokens": slots, "num_experts": experts, "top_k": active}
        model = make("bert", **settings).train(training)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
        plain = sdpa_kernel(SDPBackend.MATH)
        with plain, torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            output = model(input_ids=ids).last_hidden_state
            if training:
                output.sum().backward()
        return int(counter.get_total_flops())

    def rows(experts: int) -> int:
        size = block_size(active * tokens, experts)
        return (active * tokens // size + experts) * size

    # The row of every expert is projected to keys and values, and there is a way back for its gradient.
    projected = (2 if training else 1) * 2 * slots * width * 2 * width * layers
    # Backward, a router has a gradient of weights, and of inputs but in the first layer, whose inputs do not train.
    router = 2 * tokens * width * (3 * layers - 1 if training else layers)
    # Queries and values meet slots; backward twice again, and gradients of queries, keys, values and weights.
    products = (2 + 2 + 5 if training else 2) * 2 * slots * width * layers
    few, many = 4, 64
    assert step(many) - step(few) == (many - few) * (projected + router) + (rows(many) - rows(few)) * products


@pytest.mark.parametrize(("experts", "limit"), [(64, 1.02), (256, 1.08)])
def test_long_texts_hardly_see_the_number_of_experts(experts: int, limit: float) -> None:
    """Of 8 texts of 1,024 tokens; over four experts."""
    counts = []
    for number in (4, experts):
        with torch.device("meta"):
            base: Any = BertModel(BertConfig(max_position_embeddings=1024))
            model = get_peft_model(base, MEPTConfig(**TOKEN | {"num_virtual_tokens": 10, "num_experts": number}))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            ids = torch.zeros(BATCH, 1024, dtype=torch.long, device="meta")
            model.train()(input_ids=ids).last_hidden_state.sum().backward()
        counts.append(counter.get_total_flops())
    print(f"4 -> {experts} experts x{counts[1] / counts[0]:.4f}")
    assert 1.0 < counts[1] / counts[0] <= limit


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
