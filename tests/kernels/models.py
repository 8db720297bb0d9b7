# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose attention has what kernels differ in: groups of heads, windows, caps, sinks, no causality."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WINDOW = 12
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**TEXT, **NO_DROPOUT, "num_labels": 3}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**TEXT, **NO_DROPOUT, "image_size": 32, "patch_size": 8}),
}
# The kernel that others are compared with: sdpa knows no caps and no sinks, eager takes its softmax in float32.
REFERENCE = {name: "eager" if name in ("gemma2", "gpt_oss") else "sdpa" for name in MODELS}
TOLERANCE = {"eager": 2e-5, "sdpa": 1e-10}
ROUTING: dict[str, dict[str, Any]] = {
    "static": {"num_experts": 1, "num_shared_experts": 0},
    "sample": {"num_experts": 3, "routing": "sample"},
    "token": {"num_experts": 3, "routing": "token", "top_k": 2},
}
TOKENS = 9
PADDING = {
    "none": [[1] * 9, [1] * 9, [1] * 9],
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]],
}


def base_model(name: str, implementation: str, **settings: Any) -> nn.Module:
    """A model in float64 with weights large enough for prompts to matter."""
    architecture, config, given = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**given, **settings}, attn_implementation=implementation)
    made._experts_implementation = "eager"  # the grouped one knows no float64
    model = getattr(transformers, architecture)(made).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    return model


def same(found: Tensor, expected: Tensor, name: str = "llama") -> None:
    """Equal to what the model's reference kernel can tell."""
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[REFERENCE[name]])


def prompted(base: nn.Module, routing: str, slots: int = 3, **settings: Any) -> PeftModel:
    task = "CAUSAL_LM" if "CausalLM" in type(base).__name__ else None
    torch.manual_seed(1)
    config = MEPTConfig(
        task_type=task, num_virtual_tokens=slots, init_weights=False, prompt_scale=1.0, **ROUTING[routing], **settings
    )
    return get_peft_model(base, config).double().eval()


def text(padding: str, causal: bool) -> dict[str, Tensor]:
    """Token ids, their mask, and labels, of which those of a causal model begin behind four tokens."""
    torch.manual_seed(2)
    mask = torch.tensor(PADDING[padding])
    ids = torch.randint(3, 40, mask.shape).masked_fill(mask == 0, 0)
    if not causal:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (torch.arange(TOKENS) < 4), -100),
    }


def logits_of_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits where the text is; padding has no meaning in any kernel."""
    found: Tensor = model(**batch).logits
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
