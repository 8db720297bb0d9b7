# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights and a tokenizer of words, without a hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig, VAPTConfig

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "user", "assistant"]
WORDS = [f"w{number}" for number in range(56)]
VOCABULARY, WIDTH = len(SPECIAL) + len(WORDS), 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 256}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer(pairs: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token for each word of `WORDS`; with `pairs`, texts stand between [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 128}
    if pairs:
        ends = [("[CLS]", 4), ("[SEP]", 5)]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special |= {"bos_token": "<s>", "eos_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = None if pairs else TEMPLATE
    return made


def scaled(model: nn.Module) -> Any:
    """Weights so large that attention is not flat, and a wrong row or position shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    return scaled(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **ids, **settings)))


def bert(**settings: Any) -> Any:
    torch.manual_seed(0)
    return scaled(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **settings)))


def vit(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8, **settings)
    return scaled(transformers.ViTForImageClassification(config))


def adapters(task: str | None, **fields: Any) -> dict[str, PeftConfig]:
    """LoRA, and every kind of prompts that there is for models of a task; none of them starts at zero."""
    if task is None:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        vpt = VAPTConfig(num_virtual_tokens=4, num_static_layers="all", init_weights=False)
        vapt = VAPTConfig(num_virtual_tokens=4, init_weights=False)
        mept = MEPTConfig(num_virtual_tokens=4, num_experts=3, init_weights=False, **fields)
        return {"lora": lora, "mept": mept, "vpt-deep": vpt, "vapt": vapt}
    found: dict[str, PeftConfig] = {"lora": LoraConfig(task_type=task, r=4, init_lora_weights=False)}
    for name, routing, experts in (("static", "auto", 1), ("sample", "sample", 3), ("token", "token", 3)):
        settings = {"routing": routing, "num_experts": experts, "num_virtual_tokens": 4, "init_weights": False}
        found[name] = MEPTConfig(task_type=task, **settings, **fields)
    return found


def adapted(base: Any, config: PeftConfig, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def fill(model: Any) -> None:
    """Weights of the adapter that follow from their names alone, so that two models get the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(0.2 * drawn)


def gradients(model: Any) -> dict[str, Tensor]:
    """Of all that is trained, in float32."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert found and all(value.grad is not None for value in found.values())
    return {name: value.grad.float().clone() for name, value in found.items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all tensors, the largest difference as a share of the tensor's largest value."""
    assert one.keys() == other.keys()
    return max(
        float((value - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-6))
        for name, value in one.items()
    )


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
