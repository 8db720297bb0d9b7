# SPDX-License-Identifier: Apache-2.0
"""The table of the contract: methods x architectures x variants, and what a test needs to run one cell.

A test asks for cases with `each_case` and never names a method or an architecture. A new architecture is an entry in
`ARCHITECTURES`, a new method an entry in `METHODS` (and architectures of its own, if it works on images).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dense_models
import pytest
import torch
import transformers
from experts import expert
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig

VOCAB, WIDTH, HEADS, LENGTH, TARGETS, IGNORED = 64, 32, 4, 8, 5, -100
LENGTHS = (LENGTH, LENGTH - 4, LENGTH - 1)
PROMPT_CHILD = "promptmoe"

INPUTS = ("input_ids", "attention_mask", "pixel_values", "input_features")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build a tiny model of it, and how it differs from others in use.

    Attributes:
        model: model class of transformers or `dense_models`.
        config: config class of transformers.
        settings: arguments of the config.
        task_type: PEFT's name for the task, which decides the inputs; "IMAGE" for images, of which PEFT has no name.
        left: how left padding is used: "ids" with position_ids, "free" without (relative positions, or positions that
            the model counts itself), None where the architecture cannot have it.
        heads: modules that train and are saved along with the adapter.
        pixels: rows and columns of the images.
        sound: bins and frames of what is given in place of images, by models of sounds of one length.
        timm: whether the attention layers are timm's.
        own: whether they compute attention themselves.
        only: the one kernel that the architecture has, if it does not have all.
        single: whether its softmax is in float32, where the masks of a float64 model make NaN of padding on the left.
        tolerance: of comparisons in float64, which a model leaves where it computes in float32.
        dense: whether an image has a label for every pixel.
        for_its_head: whether it is here for a head of several layers, and only for rows that depend on that.
    """

    model: str
    config: str
    settings: dict[str, Any]
    task_type: str
    left: str | None
    heads: tuple[str, ...] = ()
    pixels: tuple[int, int] = (32, 32)
    sound: tuple[int, int] | None = None
    timm: bool = False
    own: bool = False
    only: str | None = None
    single: bool = False
    tolerance: float = 1e-12

    @property
    def told(self) -> bool:
        """Whether the attention layers go through transformers' interface and are handed keyword arguments."""
        return not (self.timm or self.own)

    @property
    def routed(self) -> bool:
        """Whether tokens go through experts of the model's own, whose products round as the rest of a batch has it."""
        return "num_experts_per_tok" in self.settings

    dense: bool = False
    for_its_head: bool = False

    @property
    def auto_peft(self) -> str:
        if self.task_type == "IMAGE":
            return "AutoPeftModel"
        names = {
            "SEQ_CLS": "SequenceClassification",
            "TOKEN_CLS": "TokenClassification",
            "QUESTION_ANS": "QuestionAnswering",
            "CAUSAL_LM": "CausalLM",
            "SEQ_2_SEQ_LM": "Seq2SeqLM",
        }
        return f"AutoPeftModelFor{names[self.task_type]}"

    @property
    def auto(self) -> str:
        """The Auto class of transformers that makes the model."""
        if self.config == "Qwen2VLConfig":
            return "AutoModelForImageTextToText"
        return self.auto_peft.replace("AutoPeftModel", "AutoModel")

    @property
    def generates(self) -> bool:
        return self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_FEW_EXPERTS = {"num_experts_per_tok": 2}
# Caps on scores have tests of their own.
_NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 8}

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "patch_size": 8,
}
_VIT = _SHAPE | {"image_size": 32, "num_labels": 3}


def _timm(architecture: str, **model: Any) -> Architecture:
    made = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS} | model
    size = made["img_size"]
    return Architecture(
        "TimmWrapperForImageClassification",
        "TimmWrapperConfig",
        {"architecture": architecture, "model_args": made, "num_labels": 3},
        "IMAGE",
        None,
        ("timm_model.head",),
        pixels=size if isinstance(size, tuple) else (size, size),
        timm=True,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 3}, "SEQ_CLS", "ids", ("classifier",)
    ),
    "roberta": Architecture(
        "RobertaForQuestionAnswering", "RobertaConfig", _BERT, "QUESTION_ANS", "free", ("qa_outputs",)
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": HEADS,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "pad_token_id": 0,
            "num_labels": 3,
        },
        "SEQ_CLS",
        "ids",
        ("classifier", "pre_classifier"),
    ),
    "modernbert": Architecture(
        "ModernBertForTokenClassification",
        "ModernBertConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "num_labels": 3,
        },
        "TOKEN_CLS",
        "free",
        ("classifier",),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 20,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        "SEQ_2_SEQ_LM",
        "free",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "forced_eos_token_id": None,
        },
        "SEQ_2_SEQ_LM",
        None,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "CAUSAL_LM",
        "ids",
    ),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _LLAMA, "CAUSAL_LM", "free"),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", _LLAMA, "CAUSAL_LM", "free"),
    "mistral": Architecture(
        "MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 5}, "CAUSAL_LM", "free"
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _LLAMA
        | {
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
        },
        "CAUSAL_LM",
        "free",
        only="eager",  # sdpa has no cap
        tolerance=1e-5,
        single=True,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LLAMA
        | {
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "CAUSAL_LM",
        "free",
    ),
    "deberta_v3": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 4,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_hidden_size": WIDTH,
            "pooler_dropout": 0.0,
            "num_labels": 3,
        },
        "SEQ_CLS",
        None,
        ("classifier",),
        own=True,
        tolerance=1e-6,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "pad_token_id": 0},
        "CAUSAL_LM",
        "free",
        own=True,
        tolerance=1e-5,
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "CAUSAL_LM",
        "free",
        own=True,
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        _LLAMA | _FEW_EXPERTS | {"num_local_experts": 4, "sliding_window": 5, "layer_types": _TWO_KINDS},
        "CAUSAL_LM",
        "free",
        only="eager",
        tolerance=1e-5,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _LLAMA
        | _FEW_EXPERTS
        | {
            "num_key_value_heads": HEADS,
            "head_dim": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        "CAUSAL_LM",
        "free",
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _LLAMA
        | {
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        "CAUSAL_LM",
        "free",
        tolerance=1e-5,
    ),
    "qwen2_vl": Architecture(  # whose image tower has no prompts
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": _LLAMA
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4},
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 2,
        },
        "CAUSAL_LM",
        "free",
    ),
    "t5gemma": Architecture(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {
            "encoder": _LLAMA | _NO_CAPS | {"sliding_window": 5, "layer_types": _TWO_KINDS},
            "decoder": _LLAMA | _NO_CAPS | {"sliding_window": 5, "layer_types": _TWO_KINDS},
            "decoder_start_token_id": 1,
            "dropout_rate": 0.0,
            "classifier_dropout_rate": 0.0,
        },
        "SEQ_2_SEQ_LM",
        "free",
        only="eager",
        tolerance=1e-5,
    ),
    "whisper": Architecture(  # the encoder alone, under a head
        "WhisperForAudioClassification",
        "WhisperConfig",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "dropout": 0.0,
            "classifier_proj_size": 16,
            "num_labels": 3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "IMAGE",
        None,
        ("projector", "classifier"),
        sound=(8, 32),
    ),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _VIT, "IMAGE", None, ("classifier",)),
    "dinov2": Architecture(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        _VIT | {"num_register_tokens": 3, "image_size": 64},
        "IMAGE",
        None,
        ("classifier",),
        pixels=(32, 48),
    ),
    "deit": Architecture("DeiTForImageClassification", "DeiTConfig", _VIT, "IMAGE", None, ("classifier",)),
    "dinov2_backbone": Architecture(
        "BackboneForDenseLabels",
        "UperNetConfig",
        {
            "backbone_config": transformers.Dinov2Config(
                **_SHAPE, image_size=64, out_features=["stage1", "stage2"], reshape_hidden_states=True
            ),
            "num_labels": 3,
        },
        "IMAGE",
        None,
        ("classifier",),
        pixels=(32, 48),
        dense=True,
    ),
    "dpt_vit": Architecture(
        "DPTForSemanticSegmentation",
        "DPTConfig",
        _VIT
        | {
            "backbone_out_indices": [0, 1],
            "neck_hidden_sizes": [8, 8],
            "fusion_hidden_size": 8,
            "reassemble_factors": [1, 0.5],
            "is_hybrid": False,
            "semantic_classifier_dropout": 0.0,
        },
        "IMAGE",
        None,
        (),
        dense=True,
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": WIDTH // 2,
            "depths": [1, 1],
            "num_heads": [2, HEADS],
            "window_size": 3,
            "num_labels": 3,
        },
        "IMAGE",
        None,
        ("classifier",),
    ),
    "timm_vit": _timm("vit_tiny_patch16_224"),
    "timm_avg": _timm("vit_tiny_patch16_224", class_token=False, global_pool="avg", img_size=(32, 48)),
    "timm_registers": _timm("vit_tiny_patch16_224", reg_tokens=3),
}

# Heads of several layers, one for every task: what PEFT or we find, and else what a user names.
HEADS: dict[str, Architecture] = {
    "roberta_classes": Architecture(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT | {"num_labels": 3},
        "SEQ_CLS",
        "free",
        ("classifier",),
    ),
    "modernbert_head": Architecture(
        "ModernBertForTokenClassification",
        "ModernBertConfig",
        ARCHITECTURES["modernbert"].settings,
        "TOKEN_CLS",
        "free",
        ("classifier", "head"),
    ),
    "modernbert_answers": Architecture(
        "ModernBertForQuestionAnswering",
        "ModernBertConfig",
        ARCHITECTURES["modernbert"].settings | {"num_labels": 2},
        "QUESTION_ANS",
        "free",
        ("classifier", "head"),
    ),
    "roberta_causal": Architecture(
        "RobertaForCausalLM",
        "RobertaConfig",
        _BERT | {"is_decoder": True, "tie_word_embeddings": False},  # PEFT's copy of a head is tied to nothing
        "CAUSAL_LM",
        "free",
        ("lm_head",),
    ),
    "t5_block": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        ARCHITECTURES["t5"].settings,
        "SEQ_2_SEQ_LM",
        "free",
        ("decoder.block.1.layer.2",),
    ),
    "dpt": Architecture(
        "DPTForSemanticSegmentation",
        "DPTConfig",
        _VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "reassemble_factors": [4, 2, 1, 0.5],
            "semantic_classifier_dropout": 0.0,
        },
        "IMAGE",
        None,
        ("neck", "head.head", "auxiliary_head.head"),
        dense=True,
    ),
}
HEADS = {name: dataclasses.replace(architecture, for_its_head=True) for name, architecture in HEADS.items()}
ARCHITECTURES |= HEADS


@dataclass(frozen=True)
class Variant:
    """One way to configure a method.

    Attributes:
        settings: arguments of the config.
        causal: whether no output of a causal language model may depend on later tokens, whatever the labels.
        kernels: attention kernels to run it under.
        unread: blocks behind which the model reads no patches, so that what is added there is lost.
    """

    settings: dict[str, Any]
    causal: bool = False
    kernels: tuple[str, ...] = ("sdpa",)
    unread: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Method:
    """One method: its config, what it runs on and how, and what it refuses.

    Attributes:
        config: config class.
        prefix: prefix of its trained tensors.
        settings: arguments of the config that all tests share.
        variants: by architecture and name of the variant.
        refusals: configs that an architecture refuses: architecture, arguments, pattern of the error.
        widths: values of the argument that sets how many experts are active, for batch invariance.
        active: name of that argument.
        router: part of the name of router tensors; None for methods without router.
        noisy: settings that make training forwards random and must not matter in evaluation.
        balance: name of the argument that weighs the balance loss; None for methods without one.
        single: settings of one expert, which has nothing to balance.
        other: settings of a second adapter, of another size than the first.
        joins_attention: whether prompts are rows within attention, and not tokens of whole blocks.
        auxiliary: names of the arguments that weigh losses of the method's own, other than a balance loss.
        state: part of the names of tensors that are kept with the adapter and never trained.
    """

    config: type[PeftConfig]
    prefix: str
    settings: dict[str, Any]
    variants: dict[str, dict[str, Variant]]
    refusals: tuple[tuple[str, dict[str, Any], str], ...] = ()
    active: str | None = None
    widths: tuple[int, ...] = ()
    router: str | None = None
    noisy: dict[str, Any] = field(default_factory=dict)
    balance: str | None = None
    single: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    joins_attention: bool = True
    auxiliary: tuple[str, ...] = ()
    state: str | None = None


_BOTH = ("sdpa", "eager")


def _mept_variants() -> dict[str, dict[str, Variant]]:
    """Both routings everywhere; the decoder of an encoder-decoder sees prompts of sample routing only."""
    table: dict[str, dict[str, Variant]] = {}
    for name, architecture in ARCHITECTURES.items():
        if architecture.task_type == "IMAGE" and name not in ("vit", "timm_vit", "whisper"):
            continue
        if architecture.for_its_head:
            head = {"modules_to_save": list(architecture.heads)}
            table[name] = {"sample": Variant({"routing": "sample"} | head)}
            continue
        alone = {"decoder_sees_prompts": False} if architecture.task_type == "SEQ_2_SEQ_LM" else {}
        if architecture.sound is not None:  # whose heads nobody knows of
            alone = {"modules_to_save": list(architecture.heads)}
        eager = name in ("bert", "t5", "gpt2", "gemma3")
        if architecture.own and architecture.task_type == "CAUSAL_LM":
            table[name] = {"token": Variant({"routing": "token"}, causal=True)}
            continue
        table[name] = {
            "sample": Variant(
                {"routing": "sample"} | (alone if architecture.sound else {}),
                kernels=_BOTH if name in ("bert", "t5", "bart") else ("sdpa",),
            ),
            "token": Variant({"routing": "token"} | alone, causal=True, kernels=_BOTH if eager else ("sdpa",)),
        }
    return table


def _vapt_variants() -> dict[str, dict[str, Variant]]:
    table: dict[str, dict[str, Variant]] = {}
    for name, architecture in ARCHITECTURES.items():
        if architecture.task_type != "IMAGE" or architecture.sound is not None:
            continue
        size = {"image_size": list(architecture.pixels)} if name == "dinov2" else {}
        if architecture.for_its_head:  # found without being named
            table[name] = {"adaptive": Variant({})}
            continue
        if architecture.dense or name == "swin":
            continue
        table[name] = {"adaptive": Variant(size, kernels=_BOTH if name in ("vit", "dinov2") else ("sdpa",))}
    table["vit"]["deep"] = Variant({"num_static_layers": "all"})
    return table


def _pmoe_variants() -> dict[str, dict[str, Variant]]:
    def of(*names: str, **settings: Any) -> Variant:
        return Variant({"experts": [expert(name) for name in names], **settings})

    return {
        "vit": {"dinov2": of("dinov2"), "three": of("dinov2", "timm", dispatcher="attention")},
        "timm_vit": {"vit": of("vit", dispatcher="expert"), "timm": of("timm")},
    }


def _promotion_variants() -> dict[str, dict[str, Variant]]:
    """Dense models and backbones, and classifiers, of which ViT's reads the class token only."""
    both: dict[str, Any] = {"layers_to_transform": [0, 1]}
    table = {name: {"units": Variant(both)} for name in ("dinov2_backbone", "swin", "timm_avg")}
    # Its heads have dropout of their own, and a layer that nothing reads; here they stay frozen.
    table["dpt_vit"] = {"units": Variant(both | {"modules_to_save": []})}
    table["vit"] = {"units": Variant({"layers_to_transform": [0]}, kernels=_BOTH, unread=frozenset({1}))}
    return table


_NO_TOKENS_FOR_DECODER = {"routing": "token", "decoder_sees_prompts": True}

METHODS: dict[str, Method] = {
    "mept": Method(
        config=MEPTConfig,
        prefix="mept_",
        settings={"num_virtual_tokens": 3, "num_experts": 4, "top_k": 2},
        variants=_mept_variants(),
        refusals=(
            ("t5", _NO_TOKENS_FOR_DECODER, "decoder_sees_prompts=True .* routing='token'"),
            ("bart", _NO_TOKENS_FOR_DECODER, "decoder_sees_prompts=True .* routing='token'"),
        ),
        active="top_k",
        widths=(1, 2, 3, 4),
        router="mept_router",
        noisy={"router_noise": 0.5, "router_dropout": 0.5},
        balance="balance_loss_weight",
        single={"num_experts": 1, "top_k": 1},
        other={"num_virtual_tokens": 2, "num_experts": 3, "top_k": 1},
    ),
    "vapt": Method(
        config=VAPTConfig,
        prefix="vapt_",
        # Adaptive prompts start at zero, where most tensors get no gradient and nothing shows; see tests/unit.
        settings={"num_virtual_tokens": 3, "init_weights": False, "channel_dropout": 0.0, "projector_dropout": 0.0},
        variants=_vapt_variants(),
        refusals=(
            ("vit", {"kernel_size": 5}, "kernel_size=5 .* is larger than the grid of 4 x 4"),
            ("timm_vit", {"num_static_layers": 3}, "num_static_layers=3 is more than the 2 blocks"),
        ),
        noisy={"channel_dropout": 0.5, "projector_dropout": 0.5, "prompt_dropout": 0.5},
        other={"num_virtual_tokens": 2, "bottleneck_dim": 4, "learnable_scale": True},
    ),
    "pmoe": Method(
        config=PMoEConfig,
        prefix="pmoe_",
        # Heads of further experts start at zero, where their prompts get no gradient yet; see tests/unit.
        settings={"num_virtual_tokens": 3, "init_weights": False},
        variants=_pmoe_variants(),
        refusals=(
            (
                "vit",
                {"exclude_modules": ["layers.1.attention"]},
                "exclude_modules=.* leaves out some of the base model",
            ),
            ("timm_vit", {"fusion": "mean"}, "fusion='mean' needs features of one width"),
        ),
        other={"num_virtual_tokens": 2, "dispatcher": "none"},
        joins_attention=False,
    ),
    "promotion": Method(
        config=ProMotionConfig,
        prefix="promotion_",
        # The denoiser's lessons are random, and units start at zero; see tests/unit.
        settings={"num_prototypes": 3, "bottleneck_dim": 8, "init_weights": False, "denoise_weight": 0.0},
        variants=_promotion_variants(),
        refusals=(
            ("vit", {"modules_to_save": ["projection"]}, "would copy the patch embedding"),
            (
                "timm_avg",
                {"exclude_modules": ["blocks.1.attn"]},
                "names layer 1, but exclude_modules=.* leaves this out",
            ),
        ),
        noisy={"noisy_features": True, "denoise_weight": 1.0},
        other={"num_prototypes": 2, "denoiser": "tokens"},
        joins_attention=False,
        auxiliary=("denoise_weight", "margin_weight", "compact_weight"),
        state="promotion_bank",
    ),
}


@dataclass(frozen=True)
class Case:
    """One column of the contract: a method in one variant on one architecture under one attention kernel."""

    method_name: str
    architecture_name: str
    variant_name: str
    kernel: str

    def __str__(self) -> str:
        """Names the case in test ids and files."""
        parts = [self.method_name, self.architecture_name, self.variant_name]
        return "-".join(parts if self.kernel == "sdpa" else [*parts, self.kernel])

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.architecture_name]

    @property
    def variant(self) -> Variant:
        return self.method.variants[self.architecture_name][self.variant_name]

    @property
    def task_type(self) -> str:
        return self.architecture.task_type

    @property
    def reads_text(self) -> bool:
        return self.task_type != "IMAGE"

    @property
    def is_causal_lm(self) -> bool:
        return self.task_type == "CAUSAL_LM"

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.architecture.model, None) or getattr(dense_models, self.architecture.model)

    @property
    def kernel_setting(self) -> dict[str, str]:
        """How transformers is told which kernel to use, where it has a say."""
        return {"attn_implementation": self.architecture.only or self.kernel} if self.architecture.told else {}

    # -- models -------------------------------------------------------------------------------------------------------

    def base(self, seed: int = 0, **settings: Any) -> nn.Module:
        """A random base model in eval mode whose weights are large enough for every prompt to matter."""
        made = getattr(transformers, self.architecture.config)(
            **self.architecture.settings | settings, **self.kernel_setting
        )
        if self.architecture.routed:
            made._experts_implementation = "eager"  # the grouped kernel has no float64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(made).eval()
        for module in model.modules():  # DPT's auxiliary head has dropout whatever its config says
            if isinstance(module, nn.Dropout) and self.architecture.dense:
                module.p = 0.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim == 1:  # biases, and gains of norms around what they start from
                    weight.add_(0.1 * noise)
                elif name.endswith("relative_attention_bias.weight"):
                    weight.copy_(noise)
                elif name.endswith(".q.weight"):  # T5 folds the scale of the scores into the query
                    weight.copy_(0.1 * noise)
                else:
                    weight.copy_(0.25 * noise)
        return model

    def config(self, **settings: Any) -> PeftConfig:
        task_type = self.task_type if self.reads_text else None
        return self.method.config(task_type=task_type, **self.method.settings | self.variant.settings | settings)

    def model(self, base: nn.Module | None = None, adapter: str = "default", **settings: Any) -> PeftModel:
        """The base model with a fresh adapter, in eval mode."""
        base = base if base is not None else self.base()
        torch.manual_seed(1)
        return get_peft_model(base, self.config(**settings), adapter).eval()

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self, lengths: tuple[int, ...] = LENGTHS, side: str = "right", seed: int = 0, pad_to: int = 0) -> Batch:
        """A batch with labels; samples shorter than the longest (or `pad_to`) are padded on `side`.

        Images are of one size, and of `lengths` only the number counts. A sample's content does
        not depend on the others nor on the padding.
        """
        samples = [self._sample(length, seed + 10 * i) for i, length in enumerate(lengths)]
        return self.collate(samples, side, pad_to)

    def _sample(self, length: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        if not self.reads_text:
            if self.architecture.sound is not None:
                features = torch.randn(self.architecture.sound, generator=generator)
                return {"input_features": features, "labels": torch.randint(3, (), generator=generator)}
            pixels = torch.randn(3, *self.architecture.pixels, generator=generator)
            places = self.architecture.pixels if self.architecture.dense else ()
            return {"pixel_values": pixels, "labels": torch.randint(3, places, generator=generator)}
        ids = torch.randint(5, VOCAB, (LENGTH,), generator=generator)[:length]
        if self.task_type == "SEQ_CLS":
            return {"input_ids": ids, "labels": ids[0] % 3}
        if self.task_type == "TOKEN_CLS":
            return {"input_ids": ids, "labels": ids % 3}
        if self.task_type == "QUESTION_ANS":
            return {"input_ids": ids, "start_positions": ids[0] % length, "end_positions": ids[1] % length}
        if self.task_type == "SEQ_2_SEQ_LM":
            return {"input_ids": ids, "labels": torch.randint(5, VOCAB, (TARGETS,), generator=generator)}
        labels = ids.clone()
        labels[: max(1, length // 3)] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def collate(self, samples: list[Batch], side: str = "right", pad_to: int = 0) -> Batch:
        if not self.reads_text:
            return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        longest = max(pad_to, *(len(sample["input_ids"]) for sample in samples))
        padded = any(len(sample["input_ids"]) < longest for sample in samples)

        def fill(name: str, value: int) -> Tensor:
            rows = []
            for sample in samples:
                fill = torch.full((longest - len(sample[name]),), value)
                rows.append(torch.cat([sample[name], fill] if side == "right" else [fill, sample[name]]))
            return torch.stack(rows)

        batch = {"input_ids": fill("input_ids", self.pad_id)}
        if padded:
            ones = [{"mask": torch.ones_like(sample["input_ids"])} for sample in samples]
            samples = [sample | one for sample, one in zip(samples, ones, strict=True)]
            batch["attention_mask"] = fill("mask", 0)
            if side == "left" and self.architecture.left == "ids":
                batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for name in samples[0].keys() - {"input_ids", "mask"}:
            if name == "labels" and self.task_type in ("TOKEN_CLS", "CAUSAL_LM"):
                batch[name] = fill(name, IGNORED)
            elif name.endswith("_positions"):
                starts = [longest - len(sample["input_ids"]) if side == "left" else 0 for sample in samples]
                batch[name] = torch.stack(
                    [sample[name] + start for sample, start in zip(samples, starts, strict=True)]
                )
            else:
                batch[name] = torch.stack([sample[name] for sample in samples])
        return batch

    @property
    def pad_id(self) -> int:
        return 1 if self.architecture_name == "bart" else 0

    def prompt_only(self, batch: Batch) -> Batch:
        """The batch without its targets, for `generate`."""
        return {name: value for name, value in batch.items() if name in INPUTS}


# ---------------------------------------------------------------------------------------------------------------------
# What tests do with a model and a batch
# ---------------------------------------------------------------------------------------------------------------------


def fit(model: nn.Module, batch: Batch) -> Batch:
    """The batch with images and sounds in the type of the model's weights."""
    dtype = next(p.dtype for name, p in model.named_parameters() if PROMPT_CHILD not in name)
    given = ("pixel_values", "input_features")
    return {name: value.to(dtype) if name in given else value for name, value in batch.items()}


def logits(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    """(B, ...) logits, start and end logits of question answering side by side."""
    output = model(**fit(model, batch), **kwargs)
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"]


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    return logits(model, batch, **kwargs)


def real_logits(case: Case, model: nn.Module, batch: Batch) -> list[Tensor]:
    """Logits of each sample at its real tokens (of a classifier or decoder: all of them)."""
    found = predict(model, batch)
    mask = batch.get("attention_mask")
    if mask is None or case.task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM", "IMAGE"):
        return list(found)
    return [row[real] for row, real in zip(found, mask.bool(), strict=True)]


def train(model: nn.Module, batch: Batch, steps: int = 3, rate: float = 0.05) -> list[float]:
    """Losses of plain gradient descent; the model ends in eval mode."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses, batch = [], fit(model, batch)
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def gradients(
    model: nn.Module, batch: Batch, scale: float = 1.0, forward: Callable[..., Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step, the gradients divided by `scale`, which the loss was multiplied by."""
    model.train()
    model.zero_grad()
    loss = (model if forward is None else forward)(**fit(model, batch)).loss
    (loss * scale).backward()
    model.eval()
    return loss.detach(), {
        name: parameter.grad.clone() / scale
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def adapter_parameters(case: Case, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What trains of an adapter."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if case.method.prefix in name and f".{adapter}." in name and (case.method.state or " ") not in name
    }


def prompted(model: nn.Module) -> dict[str, nn.Module]:
    """Prompt layers by path."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "site")}


def prompted_base(model: nn.Module) -> dict[str, nn.Module]:
    """Prompt layers that are children of the base model's attention layers, by path."""
    return {name: layer for name, layer in prompted(model).items() if name.endswith(f".{PROMPT_CHILD}")}


def set_head(model: nn.Module, adapter: str = "default") -> bool:
    """Change the trained head of an adapter by a lot; False if it has none."""
    changed = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"modules_to_save.{adapter}." in name:
                parameter.add_(1.0)
                changed = True
    return changed


def assert_equal(left: Tensor, right: Tensor, what: str) -> None:
    """Bit by bit."""
    assert left.dtype == right.dtype and left.shape == right.shape, f"{what}: {left.dtype} {left.shape}"
    if not torch.equal(left, right):
        raise AssertionError(f"{what} differ by up to {(left - right).abs().max():.3g} and should be equal bit by bit")


def assert_same(case: Case, left: Tensor, right: Tensor, what: str) -> None:
    """Bit by bit, or to rounding where the model itself rounds differently from batch to batch."""
    if not case.architecture.routed:
        return assert_equal(left, right, what)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5, msg=lambda message: f"{what}: {message}")


def assert_different(left: Tensor, right: Tensor, what: str, at_least: float = 1e-3) -> None:
    """By enough that a test that compares them means something."""
    assert (left - right).abs().max() > at_least, f"{what} should differ"


# ---------------------------------------------------------------------------------------------------------------------
# Parametrisation
# ---------------------------------------------------------------------------------------------------------------------

EVERY_CASE: list[Case] = [
    Case(method, architecture, variant, kernel)
    for method, entry in METHODS.items()
    for architecture, variants in entry.variants.items()
    for variant, settings in variants.items()
    for kernel in settings.kernels
]
CASES = [case for case in EVERY_CASE if not case.architecture.for_its_head]


def each_case(
    keep: Callable[[Case], bool] = lambda case: True,
    kernels: tuple[str, ...] = ("sdpa",),
    slow: Callable[[Case], bool] = lambda case: False,
    heads: bool = False,
) -> pytest.MarkDecorator:
    """Run a test for every case that `keep` keeps; a behaviour that a case cannot have is no cell of the matrix.

    Args:
        keep: what the behaviour needs of a case.
        kernels: kernels to run it under. Only what depends on the kernel needs more than sdpa.
        slow: cases that add time rather than coverage, and wait for the full run.
        heads: whether the behaviour depends on how a head is built, so that models with heads of several layers count.
    """
    cases = [case for case in (EVERY_CASE if heads else CASES) if case.kernel in kernels and keep(case)]
    assert cases, "no case is left"
    marked = [pytest.param(case, marks=[pytest.mark.slow] if slow(case) else []) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=[str(case) for case in cases])


def one_per_architecture(case: Case) -> bool:
    """Keep each architecture's default variant, for behaviours that do not depend on the variant."""
    default = "token" if case.is_causal_lm else "sample"
    return (
        case.variant_name in (default, "adaptive", "dinov2", "timm")
        or len(case.method.variants[case.architecture_name]) == 1
    )


def one_per_column(case: Case) -> bool:
    """As `one_per_architecture`, but all that stands beside pMoE's base model, too."""
    return case.method_name == "pmoe" or one_per_architecture(case)


def trains_alone(case: Case) -> bool:
    return not case.architecture.heads


ALL_KERNELS = ("sdpa", "eager")
