# SPDX-License-Identifier: Apache-2.0
"""The model shapes whose cost is counted and timed: architectures with random weights, at any depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES, ANSWER = 100, 32  # labels of an image; tokens that T5 decodes
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """One architecture at one size.

    Attributes:
        make: the model with this many blocks (of T5 in encoder and decoder each), and the same in small: of the same
            code, narrow, for what does not depend on size.
        depth: blocks of the real model.
        length: tokens of a text; rows and columns of an image.
        task: PEFT's name for the task, which it has not for images.
        attention: what "LoRA r8" adapts, here always the query, key, value and output projections.
        head: the module that trains beside every method, if the model has one.
        small_length: `length` of the small model.
        ends: blocks after which every further one costs the same. The first block's input needs no gradient; in
            Llama the second is the first to keep rotations for queries, and T5's decoder sees the last one's prompts.
        padded: whether texts come with a mask, in the form in which transformers hands it to attention.
    """

    make: Callable[[int, bool], nn.Module]
    depth: int
    length: int
    task: str | None
    attention: list[str] | str
    head: str | None
    small_length: int = 12
    ends: int = 1
    padded: bool = False

    def inputs(self, batch: int, small: bool = False, length: int | None = None) -> Batch:
        """Inputs and labels on the default device; texts without padding, of which transformers makes no mask."""
        length = length or (self.small_length if small else self.length)
        if self.task is None:
            labels = torch.zeros(batch, dtype=torch.long)
            return {"pixel_values": torch.randn(batch, 3, length, length), "labels": labels}
        ids = torch.randint(3, 30, (batch, length))
        if self.task == "SEQ_CLS":
            labels = torch.zeros(batch, dtype=torch.long)
        elif self.task == "SEQ_2_SEQ_LM":
            labels = ids[:, :ANSWER].contiguous()
        else:  # a question, which has no loss, and an answer
            labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril() if self.padded else None
        return {"input_ids": ids, "labels": labels, **({} if mask is None else {"attention_mask": mask})}


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def bert(depth: int, small: bool = False, longest: int = 512) -> nn.Module:
    settings: dict[str, Any] = {**SMALL, "vocab_size": 100} if small else {"max_position_embeddings": longest}
    config = BertConfig(num_hidden_layers=depth, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)
    return BertForSequenceClassification(config)


def t5(depth: int, small: bool = False) -> nn.Module:
    size: dict[str, Any] = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12}
    if small:
        size = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 100}
    config = T5Config(num_layers=depth, num_decoder_layers=depth, dropout_rate=0.0, decoder_start_token_id=0, **size)
    return T5ForConditionalGeneration(config)


def _llama(depth: int, small: bool, size: dict[str, Any], **settings: Any) -> nn.Module:
    size = {**SMALL, "num_key_value_heads": 1, "vocab_size": 100} if small else size
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, tie_word_embeddings=True, **size, **settings))


def llama(depth: int, small: bool = False) -> nn.Module:
    """As Llama 3.2 1B."""
    size = {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return _llama(depth, small, size)


def smollm2(depth: int, small: bool = False) -> nn.Module:
    """As SmolLM2-135M; it never ends an answer by itself, so that all methods decode equally many tokens."""
    size = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return _llama(depth, small, size, pad_token_id=0, eos_token_id=None)


def vit(depth: int, small: bool = False) -> nn.Module:
    settings = {**SMALL, "image_size": 32} if small else {}
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES, num_hidden_layers=depth, **settings))


def timm_vit(depth: int, small: bool = False) -> nn.Module:
    architecture = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    args = {"depth": depth, **({"img_size": 32} if small else {})}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=args)
    )


LLAMA_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHAPES = {
    "bert-base": Shape(
        bert, 12, 128, "SEQ_CLS", ["query", "key", "value", "attention.output.dense"], head="classifier"
    ),
    "t5-base": Shape(t5, 12, 128, "SEQ_2_SEQ_LM", ["q", "k", "v", "o"], head=None, ends=2),
    "llama-1b": Shape(llama, 16, 128, "CAUSAL_LM", LLAMA_ATTENTION, head=None, ends=2),
    "smollm2": Shape(smollm2, 30, 128, "CAUSAL_LM", LLAMA_ATTENTION, head=None, ends=2),
    "vit-b16-hf": Shape(vit, 12, 224, None, LLAMA_ATTENTION, head="classifier", small_length=32),
    "vit-b16-timm": Shape(timm_vit, 12, 224, None, r".*\.attn\.(qkv|proj)", head="head", small_length=32),
}
LENGTHS = (512, 2048, 8192)
# The same models on longer texts, of which few methods are counted.
LONG = {
    "bert-base-1024": replace(SHAPES["bert-base"], make=partial(bert, longest=1024), length=1024),
    **{f"llama-1b-{length}": replace(SHAPES["llama-1b"], length=length) for length in LENGTHS},
    **{f"llama-1b-{length}-mask": replace(SHAPES["llama-1b"], length=length, padded=True) for length in LENGTHS},
}


def quiet() -> None:
    """Random weights and made-up configs are what is wanted here: no word about them."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
