# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights under the Hub ids that the pages name, in the form of the Hub's local cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

REVISION = "1" * 40
WORDS = [f"word{number}" for number in range(60)]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"


def tokenizer(chat: bool) -> transformers.PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "user", "assistant", *WORDS]
    ids = {word: number for number, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 128}
    if chat:
        special |= {"bos_token": "<s>", "eos_token": "</s>"}
    else:
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    if chat:
        made.chat_template = TEMPLATE
    return made


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"intermediate_size": 48, "vocab_size": len(WORDS) + 8, "max_position_embeddings": 128}


def bert(folder: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)
    tokenizer(chat=False).save_pretrained(folder)


def llama(folder: Path) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = TEXT | {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes quantises 64 values together
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)


def vit(folder: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=48)).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)


def dinov2(folder: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": 6, "patch_size": 14, "image_size": 518}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    transformers.BitImageProcessor().save_pretrained(folder)


def timm_vit(folder: Path) -> None:
    """As large as it is: timm takes weights of the whole architecture only."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    cfg = {"input_size": [3, 224, 224], "num_classes": 1000, "first_conv": "patch_embed.proj", "classifier": "head"}
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(settings))


# What the examples' model of timm is shrunk to, here and where it is made.
TIMM_SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def timm_dinov2(folder: Path) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, **TIMM_SIZES)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    cfg = {"input_size": [3, 518, 518], "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    settings = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(settings))


REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "google-bert/bert-base-uncased": bert,
    "sentence-transformers/all-MiniLM-L6-v2": bert,
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama,
    "google/vit-base-patch16-224-in21k": vit,
    "facebook/dinov2-small": dinov2,
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k": timm_vit,
    "WinKawaks/vit-tiny-patch16-224": vit,
    "timm/vit_small_patch14_dinov2.lvd142m": timm_dinov2,
}


def fill(cache: Path) -> None:
    """Write all of them into `cache`, for `HF_HUB_CACHE`."""
    torch.manual_seed(0)
    for name, make in REPOSITORIES.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        make(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
