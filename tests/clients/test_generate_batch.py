# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching: each text gets the tokens that it gets alone, beside LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import VOCABULARY, adapted, adapters, fill, llama
from transformers import ContinuousBatchingConfig, GenerationConfig

CLIENT = "transformers"
WANTED = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(8, VOCABULARY, (length,), generator=generator).tolist() for length in (5, 9, 3, 14, 21)]


def packed(model: Any) -> list[list[int]]:
    config = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=32, block_size=16, use_cuda_graph=False, auto_switch_to_flash=False
    )
    found = model.generate_batch(
        inputs=texts(),
        generation_config=GenerationConfig(**WANTED),
        continuous_batching_config=config,
        progress_bar=False,
    )
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))]


@pytest.mark.parametrize("kind", ["lora", "static", "token"])
def test_answers_are_those_of_generate(kind: str) -> None:
    """`generate_batch` with five texts that arrive in several steps: each gets the tokens that `generate` gives it
    alone.
    """
    model = adapted(llama(), adapters("CAUSAL_LM")[kind]).eval()
    fill(model)
    alone = []
    for text in texts():
        ids = torch.tensor([text])
        alone.append(
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **WANTED)[0, len(text) :].tolist()
        )
    assert packed(model) == alone
    with model.disable_adapter():
        assert packed(model) != alone


def test_sample_routing_is_refused_before_it_starts() -> None:
    """`generate_batch` with sample routing, which reads whole texts, is refused before a thread starts."""
    model = adapted(llama(), adapters("CAUSAL_LM")["sample"]).eval()
    with pytest.raises(ValueError, match="routing='token'"):
        packed(model)
