# SPDX-License-Identifier: Apache-2.0
"""Tiny models of architectures outside the tested table, and what the generic rule is expected to make of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

# Rows through the whole block, dropped behind it, give the same output: the generic rule found norm and positions.
EXACT = "exact"
# Works, but a block-level run is no reference: the block adds a table that is tied to the number of patches.
WORKS = "works"
# ValueError from get_peft_model, the model untouched.
NOT_ON_INTERFACE = "no attention layer that peft_promptmoe can reach"
KEEPS_KEYWORDS = "does not pass keyword arguments on"
OTHER_INPUTS = "takes queries, keys and values from different inputs"
STAYS = "its attention stays within windows"
WINDOWS = "attends within windows or over several resolutions"
NEIGHBOURS = "also depend on neighbouring tokens"
OTHER_BIASES = "adds a relative position bias of a form that prompts cannot be given"

AT_ATTACH = (NOT_ON_INTERFACE, KEEPS_KEYWORDS, OTHER_INPUTS, STAYS, WINDOWS, NEIGHBOURS, OTHER_BIASES)


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        outcome: one of the constants above.
        auto: transformers class that makes the model.
        settings: of the config.
        config: model type of the config, where it is not the entry's name.
        tolerance: of the comparison in float64, which a model leaves where it computes in float32.
        mept: settings that MEPTConfig needs for this architecture.
        single: whether the model cannot run in float64.
        pads: whether the model itself is sound with padding.
        kernel: attention kernel, where the architecture has it.
        says: what attaching says beside the warning of the generic rule.
    """

    outcome: str
    auto: str
    settings: dict[str, Any]
    config: str | None = None
    tolerance: float = 1e-10
    mept: dict[str, Any] = field(default_factory=dict)
    says: str | None = None
    kernel: str = "sdpa"
    single: bool = False
    pads: bool = True


_LM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LM_WIDE_HEADS = _LM | {"head_dim": 16}
_NEOX = {name: value for name, value in _LM.items() if name != "num_key_value_heads"}
_OPT = {name: value for name, value in _NEOX.items() if name != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}
_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# transformers 5.24 put them on the attention interface, with tables of (sin, cos) stored by position.
_NEW_GPTJ = hasattr(transformers.models.gptj.modeling_gptj, "GPTJRotaryEmbedding")
_TWO_KINDS = ["sliding_attention", "full_attention"]
_GEMMA_STACK = _LM_WIDE_HEADS | {"sliding_window": 4, "layer_types": _TWO_KINDS, "attn_logit_softcapping": None}
_LM_ALONE = {name: value for name, value in _LM.items() if name not in ("intermediate_size", "num_key_value_heads")}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
_NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
_FALCON = _NEOX | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "hidden_dropout_prob": 0.0}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    # Few and coarse buckets, so that a position that is off by one falls into another bucket at these lengths.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,  # narrower than the keys
    "first_k_dense_replace": 1,
}
_DELTA = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
_WAV2VEC = {
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}

_CAUSAL, _ANY = "AutoModelForCausalLM", "AutoModel"
_CLASSIFIER, _SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
_SAMPLE = {"routing": "sample"}

ARCHITECTURES: dict[str, Arch] = {
    # Decoders, one line for each way of building a block.
    "qwen2": Arch(EXACT, _CAUSAL, _LM),
    "gemma": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "gemma2": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS | {"sliding_window": 4}),
    "olmo": Arch(EXACT, _CAUSAL, _LM),
    "olmo2": Arch(EXACT, _CAUSAL, _LM),
    "olmo3": Arch(EXACT, _CAUSAL, _LM | {"sliding_window": 4}),
    "granite": Arch(EXACT, _CAUSAL, _LM),
    "stablelm": Arch(EXACT, _CAUSAL, _LM),
    "stablelm_parallel": Arch(EXACT, _CAUSAL, _LM | {"use_parallel_residual": True}, "stablelm"),
    "starcoder2": Arch(EXACT, _CAUSAL, _LM),
    "cohere": Arch(EXACT, _CAUSAL, _LM),
    "cohere2": Arch(EXACT, _CAUSAL, _LM | {"sliding_window": 4}),
    "smollm3": Arch(EXACT, _CAUSAL, _LM),
    "seed_oss": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "helium": Arch(EXACT, _CAUSAL, _LM | {"head_dim": 8}),
    "glm": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "glm4": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "nemotron": Arch(EXACT, _CAUSAL, _LM),
    "exaone4": Arch(EXACT, _CAUSAL, _LM | {"sliding_window": 4}),
    "arcee": Arch(EXACT, _CAUSAL, _LM),
    "hunyuan_v1_dense": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "ministral": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS | {"sliding_window": 4}),
    "apertus": Arch(EXACT, _CAUSAL, _LM),
    "ernie4_5": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "bitnet": Arch(EXACT, _CAUSAL, _LM),
    "persimmon": Arch(EXACT, _CAUSAL, _LM),
    "phi": Arch(EXACT, _CAUSAL, _LM),
    "phi3": Arch(EXACT, _CAUSAL, _LM),
    "gpt_neox": Arch(EXACT, _CAUSAL, _NEOX),
    "gpt_neox_sequential": Arch(EXACT, _CAUSAL, _NEOX | {"use_parallel_residual": False}, "gpt_neox"),
    "opt": Arch(EXACT, _CAUSAL, _OPT),
    "opt_post_norm": Arch(EXACT, _CAUSAL, _OPT | {"do_layer_norm_before": False}, "opt"),
    "gpt_bigcode": Arch(EXACT, _CAUSAL, _GPT),
    "modernbert-decoder": Arch(EXACT, _CAUSAL, _NEOX | {"local_attention": 4}),
    "mixtral": Arch(EXACT, _CAUSAL, _LM | {"num_local_experts": 4}),
    "qwen2_moe": Arch(EXACT, _CAUSAL, _LM | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS | _MOE | {"num_experts": 4}),
    "olmoe": Arch(EXACT, _CAUSAL, _LM | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": Arch(  # its softmax has a sink and is float32
        EXACT,
        _CAUSAL,
        _LM_WIDE_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        tolerance=1e-5,
    ),
    "deepseek_v3": Arch(EXACT, _CAUSAL, _LM | _MLA),
    "qwen3_next": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS | _MOE | _DELTA),
    "lfm2": Arch(EXACT, _CAUSAL, _LM | {"full_attn_idxs": [1], "block_multiple_of": 8}),
    "llama4_text": Arch(  # turns in float32
        EXACT, _CAUSAL, _LM_WIDE_HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 48}, tolerance=1e-5
    ),
    "deepseek_v2": Arch(EXACT, _CAUSAL, _LM | _MLA, tolerance=1e-5),  # turns in float32
    "gptj": Arch(
        EXACT if _NEW_GPTJ else NOT_ON_INTERFACE,
        _CAUSAL,
        _GPT | {"rotary_dim": 4},
    ),
    "codegen": Arch(EXACT if _NEW_GPTJ else NOT_ON_INTERFACE, _CAUSAL, _GPT | {"rotary_dim": 4}),
    "gpt_neo": Arch(
        EXACT, _CAUSAL, _NEO | {"attention_types": [[["global"], 2]]}, tolerance=1e-5
    ),  # scores in float32
    # In whose window the rows stay, where those of a longer text would leave it.
    "gpt_neo_local": Arch(
        WORKS, _CAUSAL, _NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 4}, "gpt_neo"
    ),
    "xglm": Arch(
        EXACT,
        _CAUSAL,
        {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "pad_token_id": 0},
        tolerance=1e-4,
        single=True,
    ),
    "openai-gpt": Arch(EXACT, _CAUSAL, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    # Attention that the layers compute themselves, past the interface.
    "gpt_neox_japanese": Arch(EXACT, _CAUSAL, _LM_ALONE | {"intermediate_multiple_size": 2}),
    "ctrl": Arch(EXACT, _CAUSAL, {"vocab_size": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4} | _NO_DROPOUT),
    "trocr": Arch(
        EXACT,
        _CAUSAL,
        {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        | {"is_decoder": True, "pad_token_id": 0},
        says="start at random",
    ),
    "luke": Arch(EXACT, _CLASSIFIER, _BERT | {"entity_vocab_size": 8, "entity_emb_size": 32}),
    "mvp": Arch(EXACT, _SEQ2SEQ, _BART),
    "prophetnet": Arch(
        EXACT,
        _SEQ2SEQ,
        {"vocab_size": 64, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
        | {"num_encoder_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 64}
        | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
        tolerance=1e-4,
        single=True,
        pads=False,
    ),
    "bloom": Arch(  # softmax in float32
        EXACT, _CAUSAL, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, tolerance=1e-5
    ),
    "falcon": Arch(EXACT, _CAUSAL, _FALCON),
    "falcon_eager": Arch(EXACT, _CAUSAL, _FALCON, "falcon", kernel="eager"),
    "falcon_new": Arch(EXACT, _CAUSAL, _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "falcon"),
    "falcon_alibi": Arch(WORKS, _CAUSAL, _FALCON | {"alibi": True}, "falcon"),
    "falcon_alibi_eager": Arch(EXACT, _CAUSAL, _FALCON | {"alibi": True}, "falcon", tolerance=1e-7, kernel="eager"),
    "mpt": Arch(EXACT, _CAUSAL, {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, tolerance=1e-5),
    "ministral3": Arch(EXACT, _CAUSAL, _LM_WIDE_HEADS),
    "afmoe": Arch(
        EXACT,
        _CAUSAL,
        _LM_WIDE_HEADS | _MOE | {"num_experts": 4, "sliding_window": 4, "layer_types": _TWO_KINDS},
    ),
    "jetmoe": Arch(EXACT, _CAUSAL, _LM | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "recurrent_gemma": Arch(
        WORKS, _CAUSAL, _LM | {"num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 4}
    ),
    "falcon_h1": Arch(
        WORKS,  # of prompts run through the whole block, the state space part would see some too
        _CAUSAL,
        _LM
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
        | {"attention_in_multiplier": 0.7},
    ),
    "deepseek_v32": Arch(
        WORKS,
        _CAUSAL,
        _LM | _MLA | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "num_key_value_heads": 4},
    ),
    "zaya": Arch(NEIGHBOURS, _CAUSAL, _LM | {"num_experts": 2}),
    "mamba": Arch(
        NOT_ON_INTERFACE, _CAUSAL, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    ),
    # Encoders of text
    "xlm-roberta": Arch(EXACT, _CLASSIFIER, _BERT),
    "camembert": Arch(EXACT, _CLASSIFIER, _BERT),
    "data2vec-text": Arch(EXACT, _CLASSIFIER, _BERT),
    "ernie": Arch(EXACT, _CLASSIFIER, _BERT),
    "layoutlm": Arch(EXACT, _CLASSIFIER, _BERT),
    "electra": Arch(EXACT, _CLASSIFIER, _BERT | {"embedding_size": 16}),
    "albert": Arch(  # one block, three times
        EXACT,
        _CLASSIFIER,
        _BERT | {"embedding_size": 16, "num_hidden_layers": 3},
        says="one set of prompts for all its runs",
    ),
    "roberta-prelayernorm": Arch(EXACT, _CLASSIFIER, _BERT),
    "xlm-roberta-xl": Arch(EXACT, _CLASSIFIER, _BERT),
    "esm": Arch(
        EXACT, _CLASSIFIER, _BERT | {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 3}
    ),
    "eurobert": Arch(EXACT, _CLASSIFIER, _LM),
    "nomic_bert": Arch(EXACT, _ANY, _BERT),
    "jina_embeddings_v3": Arch(EXACT, _ANY, _BERT),
    "clip_text_model": Arch(EXACT, _ANY, _BERT | {"projection_dim": 32, "eos_token_id": 2}),
    "mobilebert": Arch(OTHER_INPUTS, _CLASSIFIER, _BERT | {"embedding_size": 32, "intra_bottleneck_size": 32}),
    "mpnet": Arch(EXACT, _CLASSIFIER, _BERT),
    "deberta": Arch(EXACT, _CLASSIFIER, _BERT | _DISENTANGLED | {"max_relative_positions": 16}),
    "deberta_one_term": Arch(
        EXACT, _CLASSIFIER, _BERT | _DISENTANGLED | {"max_relative_positions": 16, "pos_att_type": ["c2p"]}, "deberta"
    ),
    "deberta_absolute": Arch(EXACT, _CLASSIFIER, _BERT, "deberta"),
    "deberta-v2": Arch(  # divides by a root in float32
        EXACT, _CLASSIFIER, _BERT | _DISENTANGLED | {"max_relative_positions": 8}, tolerance=1e-7
    ),
    "deberta-v3": Arch(
        EXACT,
        _CLASSIFIER,
        _BERT | _DISENTANGLED | {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "deberta-v2",
        tolerance=1e-7,
    ),
    "rembert": Arch(EXACT, _CLASSIFIER, _BERT | {"input_embedding_size": 32}),
    "rembert_causal": Arch(EXACT, _CAUSAL, _BERT | {"input_embedding_size": 32, "is_decoder": True}, "rembert"),
    "roformer": Arch(EXACT, _CLASSIFIER, _BERT, tolerance=1e-6),  # its angles are float32
    "roformer_causal": Arch(EXACT, _CAUSAL, _BERT | {"is_decoder": True}, "roformer", tolerance=1e-6),
    "megatron-bert": Arch(EXACT, _CLASSIFIER, _BERT),
    "tapas": Arch(EXACT, _CLASSIFIER, _BERT | {"type_vocab_sizes": [3] * 7}),
    "convbert": Arch(NOT_ON_INTERFACE, _CLASSIFIER, _BERT),
    "nystromformer": Arch(NOT_ON_INTERFACE, _CLASSIFIER, _BERT),
    # Encoder-decoders
    "mt5": Arch(EXACT, _SEQ2SEQ, _T5),
    "umt5": Arch(EXACT, _SEQ2SEQ, _T5),
    "switch_transformers": Arch(EXACT, _SEQ2SEQ, _T5),
    "mbart": Arch(EXACT, _SEQ2SEQ, _BART),
    "pegasus": Arch(EXACT, _SEQ2SEQ, _BART),
    "blenderbot": Arch(EXACT, _SEQ2SEQ, _BART),
    "blenderbot-small": Arch(EXACT, _SEQ2SEQ, _BART),
    "marian": Arch(EXACT, _SEQ2SEQ, _BART),
    "m2m_100": Arch(EXACT, _SEQ2SEQ, _BART),
    "plbart": Arch(EXACT, _SEQ2SEQ, _BART),
    "whisper": Arch(EXACT, "AutoModelForSpeechSeq2Seq", _BART | _WHISPER),
    "t5gemma": Arch(  # softmax in float32
        EXACT,
        _SEQ2SEQ,
        {"encoder": _GEMMA_STACK, "decoder": _GEMMA_STACK, "dropout_rate": 0.0, "decoder_start_token_id": 1},
        tolerance=1e-5,
    ),
    "longt5": Arch(STAYS, _SEQ2SEQ, _T5),
    # Whose layers have a table like T5's, and add what the stack makes of three.
    "udop": Arch(OTHER_BIASES, _ANY, _T5 | {"image_size": 16, "patch_size": 4, "max_2d_position_embeddings": 32}),
    "led": Arch(STAYS, _SEQ2SEQ, _BART),
    "pegasus_x": Arch(STAYS, _SEQ2SEQ, _BART),
    "fsmt": Arch(
        NOT_ON_INTERFACE, _SEQ2SEQ, _BART | {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
    ),
    # Vision and speech
    "vit": Arch(EXACT, _ANY, _VIT),
    "deit": Arch(EXACT, _ANY, _VIT),
    "beit": Arch(EXACT, _ANY, _VIT),
    "beit_relative_bias": Arch(WORKS, _ANY, _VIT | {"use_relative_position_bias": True}, "beit"),
    "dinov2": Arch(EXACT, _ANY, _VIT),
    "dinov2_with_registers": Arch(EXACT, _ANY, _VIT | {"num_register_tokens": 2}),
    "vit_mae": Arch(EXACT, _ANY, _VIT),
    "vit_msn": Arch(EXACT, _ANY, _VIT),
    "ijepa": Arch(EXACT, _ANY, _VIT),
    "dpt": Arch(EXACT, _ANY, _VIT),
    "yolos": Arch(EXACT, _ANY, _VIT | {"image_size": [16, 16], "num_detection_tokens": 3}),
    "clip_vision_model": Arch(EXACT, _ANY, _VIT),
    "wav2vec2": Arch(EXACT, _ANY, _BERT | _WAV2VEC),
    "sew-d": Arch(NOT_ON_INTERFACE, _ANY, _BERT | _WAV2VEC),
    "wavlm": Arch(EXACT, _ANY, _BERT | _WAV2VEC | {"num_buckets": 8, "max_bucket_distance": 16}),
    "wavlm_pre_norm": Arch(EXACT, _ANY, _BERT | _WAV2VEC | {"do_stable_layer_norm": True, "num_buckets": 8}, "wavlm"),
    "dinov3_vit": Arch(WORKS, _ANY, _VIT | {"num_register_tokens": 2}),
    "siglip_vision_model": Arch(EXACT, _ANY, _VIT),
    "aimv2_vision_model": Arch(EXACT, _ANY, _VIT, tolerance=1e-5),  # its norms are float32
    "videomae": Arch(EXACT, _ANY, _VIT | {"num_frames": 2}),
    "swin": Arch(WINDOWS, _ANY, _SWIN),
    "data2vec-vision": Arch(EXACT, _ANY, _VIT),
    "data2vec-vision_relative_bias": Arch(WORKS, _ANY, _VIT | {"use_relative_position_bias": True}, "data2vec-vision"),
    "convnext": Arch(NOT_ON_INTERFACE, _ANY, {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
}


def with_outcome(*outcomes: str) -> list[str]:
    """Names of the architectures with one of the outcomes."""
    return [name for name, arch in ARCHITECTURES.items() if arch.outcome in outcomes]


def make_model(name: str) -> nn.Module:
    """A random float64 model in eval mode, under sdpa where the architecture has it, with weights that matter."""
    arch = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch.config or name, **arch.settings)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    auto = getattr(transformers, arch.auto)
    try:
        model = auto.from_config(config, attn_implementation=arch.kernel)
    except ValueError:  # has no sdpa
        model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # RoFormer's sines
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.15))
    return (model if arch.single else model.double()).eval()


def make_inputs(model: Any, padded: bool = False) -> dict[str, Tensor]:
    """Two samples for the model's main input; of text, the second one is two tokens shorter if `padded`."""
    generator = torch.Generator().manual_seed(5)
    inputs: dict[str, Tensor]
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).double()}
        if model.config.model_type == "videomae":
            inputs = {"pixel_values": torch.randn(2, 2, 3, 16, 16, generator=generator).double()}
        if model.config.model_type == "vit_mae":  # otherwise it draws which patches to drop
            inputs["noise"] = torch.rand(2, 16, generator=generator).double()
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(2, 160, generator=generator).double()}
    elif model.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(2, 8, 32, generator=generator).double()}
    else:
        inputs = {"input_ids": torch.randint(5, 60, (2, 7), generator=generator)}
        if padded:
            inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
            inputs["attention_mask"][1, 5:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[1, 2, 3], [3, 4, 5]])
    return inputs


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The output that a user reads, at real tokens only."""
    output = model(**inputs)
    logits = output.get("logits")
    tensor: Tensor = output.last_hidden_state if logits is None else logits
    mask = inputs.get("attention_mask")
    if mask is not None and tensor.ndim == 3 and tensor.shape[1] == mask.shape[1]:
        return tensor[mask.bool()]
    return tensor
