# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching packs many texts into one row: each gets the answer that it gets alone."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from peft_promptmoe import MEPTConfig

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 95, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **SPECIAL)),
    "yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, **HEADS, **SPECIAL, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
        )
    ),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, **SPECIAL, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=256, **SPECIAL)
    ),
}
WANTED = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 95, "pad_token_id": 0}


def make(name: str, kernel: str = "sdpa", **settings: Any) -> Any:
    torch.manual_seed(0)
    base = MODELS[name]()
    for parameter in base.parameters():  # answers that are not all alike
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    base.set_attn_implementation(kernel)
    torch.manual_seed(7)
    config = MEPTConfig(num_virtual_tokens=3, prompt_init="random", init_weights=False, prompt_scale=1.0, **settings)
    return get_peft_model(base, config).eval()


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(11, 95, (length,), generator=generator).tolist() for length in (5, 9, 3, 14)]


def alone(model: Any, text: list[int]) -> list[int]:
    ids = torch.tensor([text])
    found: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **WANTED)[0].tolist()
    return found[len(text) :]


def packed(model: Any, batch: list[list[int]]) -> list[list[int]]:
    config = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=64, block_size=16, use_cuda_graph=False, auto_switch_to_flash=False
    )
    found = model.generate_batch(
        inputs=batch,
        generation_config=GenerationConfig(**WANTED),
        continuous_batching_config=config,
        progress_bar=False,
    )
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))]


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "sdpa", {"routing": "token"}) for name in MODELS),
    ("llama", "eager", {"routing": "token"}),
    ("llama", "sdpa", {"num_experts": 1}),
    ("llama", "sdpa", {"prompt_positions": "unrotated"}),
]


@pytest.mark.parametrize(("name", "kernel", "routing"), CASES)
def test_packed_texts_get_the_answers_they_get_alone(name: str, kernel: str, routing: dict[str, Any]) -> None:
    model = make(name, kernel, **routing)
    expected = [alone(model, text) for text in texts()]
    with model.disable_adapter():
        assert [alone(model, text) for text in texts()] != expected
    assert packed(model, texts()) == expected


def test_sample_routing_is_refused_before_the_thread_starts() -> None:
    model = make("llama", routing="sample")
    with pytest.raises(ValueError, match=r"packs many texts into one row.*routing='token'"):
        packed(model, texts())
    with pytest.raises(ValueError, match="packs many texts into one row"):
        model.get_base_model().generate_batch(inputs=texts(), generation_config=GenerationConfig(**WANTED))
    with model.disable_adapter():
        assert len(packed(model, texts())) == len(texts())
    base = model.unload()
    assert len(packed(base, texts())) == len(texts())


def test_the_guard_is_pickled_with_its_model_and_goes_with_the_adapter() -> None:
    model = make("llama", routing="sample")
    again = pickle.loads(pickle.dumps(model))
    with pytest.raises(ValueError, match="packs many texts into one row"):
        packed(again, texts())
    base = again.unload()
    assert "init_continuous_batching" not in vars(base)
