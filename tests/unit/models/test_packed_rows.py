# SPDX-License-Identifier: Apache-2.0
"""Rows of several samples: routers that read whole rows refuse them however they are told, and refuse no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from peft_promptmoe import MEPTConfig

pytestmark = pytest.mark.filterwarnings("ignore:routing='sample' on a causal model reads the whole input")
LLAMA, BERT, T5, GEMMA = (Case("mept", name, "sample", "sdpa") for name in ("llama", "bert", "t5", "gemma3"))
IDS = torch.arange(5, 15)[None]
EARLIER = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
TWO = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool()[None, None]
BOUNDS = torch.tensor([0, 5, 10], dtype=torch.int32)


def near(width: int) -> Tensor:
    return torch.ones(10, 10, dtype=torch.bool).triu(1 - width)[None, None]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


PACKED: dict[str, dict[str, Any]] = {
    "positions-start-again": {"position_ids": torch.tensor([[0, 1, 2, 3, 4] * 2])},
    "one-token-first": {"position_ids": torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8]])},
    "samples-of-one-token": {"position_ids": torch.zeros(1, 10, dtype=torch.long)},
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 5, "max_length_k": 5},
    "mask": {"attention_mask": TWO & EARLIER},
    "additive-mask": {"attention_mask": additive(TWO & EARLIER)},
    "padded-mask": {"attention_mask": TWO & EARLIER & (torch.arange(10) > 1)},
}
WHOLE: dict[str, dict[str, Any]] = {
    "causal": {"attention_mask": EARLIER},
    "window": {"attention_mask": additive(EARLIER & near(2))},
    "left-padded": {"attention_mask": EARLIER & (torch.arange(10) > 3)},
    "padded-positions": {
        "attention_mask": torch.tensor([[0, 0, 0] + [1] * 7]),
        "position_ids": torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5, 6]]),
    },
    "later-positions": {"position_ids": torch.arange(5, 15)[None]},
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_rows_are_refused(how: str) -> None:
    model = LLAMA.model()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"packed with several samples. Use routing='token'"):
            model(input_ids=IDS, **PACKED[how])
        with model.disable_adapter():
            model(input_ids=IDS, **PACKED[how])
        LLAMA.model(num_experts=1, top_k=1)(input_ids=IDS, **PACKED[how])


@pytest.mark.parametrize("how", WHOLE)
def test_rows_of_one_sample_are_not(how: str) -> None:
    with torch.no_grad():
        LLAMA.model()(input_ids=IDS, **WHOLE[how])


def test_packed_rows_are_refused_where_nothing_is_generated_either() -> None:
    base = LlamaModel(LlamaConfig(**LLAMA.architecture.settings)).eval()
    model = get_peft_model(base, MEPTConfig(task_type="FEATURE_EXTRACTION", routing="sample"))
    with pytest.raises(ValueError, match="packed with several samples"):
        model(input_ids=IDS, **PACKED["positions-start-again"])


def test_masks_by_kind_of_layer_are_packed_where_all_of_them_are() -> None:
    """Layers that attend within chunks open anew at each of them."""
    model = GEMMA.model()
    chunked = {"full_attention": EARLIER, "sliding_attention": EARLIER & TWO}
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=chunked)
        with pytest.raises(ValueError, match="packed with several samples"):
            model(input_ids=IDS, attention_mask={name: mask & TWO for name, mask in chunked.items()})


def test_encoders_are_told_by_masks_and_bounds_but_not_by_positions() -> None:
    """A pair of texts may count its positions twice and still be one sample."""
    model = BERT.model()
    with torch.no_grad():
        model(input_ids=IDS, **PACKED["positions-start-again"])
        model(input_ids=IDS, attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool))
        for given in ({"attention_mask": TWO}, PACKED["bounds"]):
            with pytest.raises(ValueError, match="packed with several samples"):
                model(input_ids=IDS, **given)


def test_what_a_decoder_is_given_counts_too() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="packed with several samples"):
        T5.model()(input_ids=IDS, decoder_input_ids=IDS, decoder_attention_mask=TWO & EARLIER)
