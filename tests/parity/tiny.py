# SPDX-License-Identifier: Apache-2.0
"""Tiny float64 models of each family and batches for them, for the parity tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from oracle import (
    IGNORED,
    BartOracle,
    Batch,
    BertOracle,
    Gemma3Oracle,
    GPT2Oracle,
    LlamaOracle,
    Oracle,
    T5Oracle,
)
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LENGTH, TARGET_LENGTH = 40, 32, 4, 7, 4
LENGTHS = (LENGTH, LENGTH - 3, LENGTH - 1)


@dataclass(frozen=True)
class Family:
    """How to make a model, what walks it, and what PEFT calls its task."""

    build: Callable[[str], nn.Module]
    oracle: type[Oracle]
    task_type: str
    takes_position_ids: bool
    decoder_sees_prompts: bool = True


def _build(architecture: str, config: str, **settings: Any) -> Callable[[str], nn.Module]:
    def build(attn_implementation: str) -> nn.Module:
        made = getattr(transformers, config)(attn_implementation=attn_implementation, **settings)
        return getattr(transformers, architecture)(made)

    return build


_bert = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_t5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    # Few and coarse buckets, so that a position that is off by one falls into another bucket at these lengths.
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_bart = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_gpt2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": HEADS,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_llama = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    # Whole vector registers of float32: the cos of a leftover element may differ from the vectorised one by an ulp.
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_gemma3 = _llama | {
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_t5_build = _build("T5ForConditionalGeneration", "T5Config", **_t5)

FAMILIES: dict[str, Family] = {
    "bert": Family(_build("BertForSequenceClassification", "BertConfig", **_bert), BertOracle, "SEQ_CLS", True),
    "t5_sees": Family(_t5_build, T5Oracle, "SEQ_2_SEQ_LM", False),
    "t5_drops": Family(_t5_build, T5Oracle, "SEQ_2_SEQ_LM", False, decoder_sees_prompts=False),
    "bart": Family(_build("BartForConditionalGeneration", "BartConfig", **_bart), BartOracle, "SEQ_2_SEQ_LM", False),
    "gpt2": Family(_build("GPT2LMHeadModel", "GPT2Config", **_gpt2), GPT2Oracle, "CAUSAL_LM", True),
    "llama": Family(_build("LlamaForCausalLM", "LlamaConfig", **_llama), LlamaOracle, "CAUSAL_LM", True),
    "qwen3": Family(_build("Qwen3ForCausalLM", "Qwen3Config", **_llama), LlamaOracle, "CAUSAL_LM", True),
    "gemma3": Family(_build("Gemma3ForCausalLM", "Gemma3TextConfig", **_gemma3), Gemma3Oracle, "CAUSAL_LM", True),
}


def make_model(family: Family, attn_implementation: str, seed: int = 0) -> nn.Module:
    """A random model in eval mode, with weights large enough for attention to be far from uniform."""
    model: Any = family.build(attn_implementation).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.ndim == 1:  # biases, and the gains of norms around what they start from
                weight.add_(0.2 * noise)
            elif name.endswith("relative_attention_bias.weight"):
                weight.copy_(noise)
            elif "emb" in name or "shared" in name or "wte" in name or "wpe" in name:
                weight.copy_(0.7 * noise)
            else:
                weight.copy_(1.3 * noise / WIDTH**0.5)
        if isinstance(model, transformers.T5ForConditionalGeneration):
            modules: list[Any] = list(model.modules())
            for module in modules:
                if hasattr(module, "q"):
                    module.q.weight.mul_(model.config.d_kv**-0.5)  # T5 folds the scale into the query
    return model


def make_batch(family: Family, padding: str, with_labels: bool = True, seed: int = 0) -> Batch:
    """Three samples. `padding`: none, right, left, or left_columns (left without position_ids)."""
    generator = torch.Generator().manual_seed(100 + seed)
    n_samples = len(LENGTHS)
    ids = torch.randint(3, VOCAB, (n_samples, LENGTH), generator=generator)
    mask: Tensor | None = None
    positions: Tensor | None = None
    if padding != "none":
        mask = torch.zeros_like(ids)
        for b, length in enumerate(LENGTHS):
            if padding == "right":
                mask[b, :length] = 1
            else:
                mask[b, LENGTH - length :] = 1
        ids = ids * mask
        if padding == "left" and family.takes_position_ids:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels: Tensor | None = None
    if family.task_type == "SEQ_CLS":
        labels = torch.tensor([0, 2, 1])
    elif family.task_type == "SEQ_2_SEQ_LM":
        labels = torch.randint(3, VOCAB, (n_samples, TARGET_LENGTH), generator=generator)
        labels[1, -1] = IGNORED
    else:
        labels = ids.clone()
        real = torch.ones_like(ids) if mask is None else mask
        for b in range(n_samples):
            columns = [t for t in range(LENGTH) if real[b, t]]
            labels[b, columns[: b + 1]] = IGNORED  # queries of one, two and three tokens
        if len([t for t in range(LENGTH) if real[0, t]]) > 4:
            labels[0, 4] = IGNORED  # a second turn, which is no query
        labels[real == 0] = IGNORED
    return Batch(ids, mask, positions, labels if with_labels or family.task_type != "CAUSAL_LM" else None)


def read_positions(family: Family, batch: Batch) -> Tensor | None:
    """Which logits mean something: a pad's query sees nothing or anything, depending on the kernel."""
    return batch.real.bool() if family.task_type == "CAUSAL_LM" else None


def task_loss(family: Family, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of transformers, kept in float64 (its causal-LM loss goes through float32)."""
    if family.task_type == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
