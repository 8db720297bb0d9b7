# SPDX-License-Identifier: Apache-2.0
"""Sizes by which the config of any model of transformers becomes that of a tiny one, and what single types need."""

from __future__ import annotations

from typing import Any

VOCABULARY, WIDTH = 256, 64


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


WIDTHS = (
    "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size embedding_dim word_embed_proj_dim "
    "word_embed_dim out_hidden_size attention_hidden_size n_embed lookup_embedding_dim output_dim "
    "projection_dim hidden_dim text_hidden_size fc_hidden_dim lru_width projector_hidden_size "
    "mm_hidden_size entity_emb_size conv_hidden_size output_size num_hidden_features qformer_hidden_size "
    "encoder_hidden_size dim_model d_embed vision_hidden_size encoder_dim decoder_dim text_dim vision_dim "
    "hidden_width output_hidden_size proj_dim audio_hidden_size mm_embed_dim d_text"
)

FEED_FORWARD = (
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size "
    "shared_expert_intermediate_size mlp_dim dim_ff feed_forward_hidden_size shared_intermediate_size "
    "expert_ffn_hidden_size ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size feedforward_dim block_ff_dim mlp_hidden_size "
    "expert_intermediate_size feed_forward_dim mlp_intermediate_size mlp_size encoder_mlp_dim "
    "moe_ffn_hidden_size ff_dim ffn_intermediate_size dim_feedforward encoder_intermediate_size "
    "decoder_intermediate_size prediction_head_intermediate_size adapter_dim"
)

LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth num_block_layers encoder_num_layers decoder_num_layers "
    "num_self_attends_per_block encoder_depth decoder_depth num_transformer_layers num_hidden_layers_text "
    "encoder_num_hidden_layers decoder_num_hidden_layers vision_layers text_layers speech_encoder_layers "
    "t2u_encoder_layers t2u_decoder_layers"
)

HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_query_heads n_attn_heads encoder_num_attention_heads decoder_num_attention_heads "
    "swa_num_attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads "
    "t2u_decoder_attention_heads global_num_attention_heads vision_num_heads"
)

HEAD_WIDTHS = (
    "head_dim d_kv attention_head_dim kv_channels swa_head_dim global_head_dim head_size "
    "key_value_proj_dim dim_head attention_head_size"
)

EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts encoder_num_experts"

ACTIVE = "num_experts_per_tok moe_top_k top_k_experts num_experts_per_token moe_k moe_topk num_selected_experts"

SIZES: dict[str, int] = {
    **dict.fromkeys(WIDTHS.split(), WIDTH),
    **dict.fromkeys(FEED_FORWARD.split(), 96),
    **dict.fromkeys(LAYERS.split(), 2),
    **dict.fromkeys(HEADS.split(), 4),
    **dict.fromkeys(HEAD_WIDTHS.split(), 16),
    **dict.fromkeys(EXPERTS.split(), 4),
    **dict.fromkeys(ACTIVE.split(), 2),
    # MLA
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 32,
    # experts
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "zero_expert_num": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    # lengths
    "max_source_positions": 256,
    "max_target_positions": 256,
    # images
    "image_size": 32,
    "patch_size": 8,
    "img_size": 32,
    # ssm
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_mamba_heads": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_d_ssm": 128,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "mamba_ngroups": 1,
    "mamba_headdim": 16,
    "mamba_d_conv": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rotary_dim": 8,
    "num_mel_bins": 80,
    "num_buckets": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 6,
    "num_query_tokens": 4,
    "query_length": 4,
    "num_latents": 8,
    "d_latents": WIDTH,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
GROUPED_HEADS = [
    "num_key_value_heads",
    "n_kv_heads",
    "num_kv_heads",
    "n_head_kv",
    "num_query_groups",
    "encoder_num_key_value_heads",
    "decoder_num_key_value_heads",
    "swa_num_key_value_heads",
    "attention_kv_heads",
    "num_global_key_value_heads",
]

# What models of two others are made of here.
PARTS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
BERT = PARTS | {"model_type": "bert", "vocab_size": VOCABULARY}
DECODER = BERT | {"add_cross_attention": True, "is_decoder": True}
VIT = PARTS | {"model_type": "vit", "image_size": 32, "patch_size": 8}
WAV2VEC2 = PARTS | {
    "conv_dim": [32] * 7,
    "model_type": "wav2vec2",
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
}

# By model type, of the config itself or of one inside another.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_attn_head_dim": 16},
    "bamba": {
        "attn_layer_indices": [1],
        "attn_rotary_emb": 8,
        "layer_types": "__drop__",
        "layers_block_type": "__drop__",
    },
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 32, 32], "num_groups": 8},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 10,
            "IMGIMGAZ": 20,
            "IMGIMGBZ": 21,
            "IMGIMGCZ": 22,
            "IMGIMGDZ": 23,
            "IMGIMGEZ": 24,
            "IMGIMGFZ": 25,
            "IMGIMGGZ": 26,
            "IMGIMGHZ": 27,
        }
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"mrope_section": [3, 3, 2], "rope_theta": 10000.0, "rope_type": "default"},
            "sliding_attention": {"mrope_section": [3, 3, 2], "rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "deepseek_v2": {"n_group": 1, "num_experts_per_tok": 2, "topk_group": 1},
    "dia_decoder": {
        "cross_head_dim": 16,
        "cross_hidden_size": 64,
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
    },
    "donut-swin": {"depths": [1, 1], "embed_dim": 16, "image_size": 64, "num_heads": [2, 2], "window_size": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"depth_coefficient": 0.25, "hidden_dim": 320, "width_coefficient": 0.25},
    "emu3": {
        "vocabulary_map": {
            "<image>": 10,
            "<|visual token 000000|>": 20,
            "<|visual token 000001|>": 21,
            "<|visual token 000002|>": 22,
            "<|visual token 000003|>": 23,
            "<|visual token 000004|>": 24,
            "<|visual token 000005|>": 25,
            "<|visual token 000006|>": 26,
            "<|visual token 000007|>": 27,
            "<|visual token 000008|>": 28,
            "<|visual token 000009|>": 29,
            "<|visual token 000010|>": 30,
            "<|visual token 000011|>": 31,
            "<|visual token 000012|>": 32,
            "<|visual token 000013|>": 33,
            "<|visual token 000014|>": 34,
            "<|visual token 000015|>": 35,
            "<|visual token 000016|>": 36,
            "<|visual token 000017|>": 37,
            "<|visual token 000018|>": 38,
            "<|visual token 000019|>": 39,
            "<|visual token 000020|>": 40,
            "<|visual token 000021|>": 41,
            "<|visual token 000022|>": 42,
            "<|visual token 000023|>": 43,
            "<|visual token 000024|>": 44,
            "<|visual token 000025|>": 45,
            "<|visual token 000026|>": 46,
            "<|visual token 000027|>": 47,
            "<|visual token 000028|>": 48,
            "<|visual token 000029|>": 49,
            "<|visual token 000030|>": 50,
            "<|visual token 000031|>": 51,
        }
    },
    "encoder-decoder": {"decoder": DECODER, "encoder": BERT},
    "esm": {"mask_token_id": 4, "pad_token_id": 1, "vocab_size": 256},
    "exaone4_5_text": {"rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"}},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8},
    "fun_asr_nano_adaptor": {"intermediate_size": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_audio": {"conf_num_attention_heads": 4, "conf_num_hidden_layers": 1},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
    },
    "glm46v_text": {
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "glm4v_text": {
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "glm_ocr_text": {
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "glmga_text": {
        "rope_parameters": {
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_d_head": 16,
        "mamba_n_heads": 8,
        "num_hidden_layers": 2,
    },
    "hgnet_v2": {"hidden_sizes": "__drop__"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "janus_vqgan": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "embed_dim": 32,
        "num_embeddings": 32,
        "num_res_blocks": 1,
    },
    "kyutai_speech_to_text": {"codebook_vocab_size": 64},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "led": {"attention_window": [4, 4]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
    },
    "lilt": {"hidden_size": 96},
    "llama4_text": {
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "num_hidden_layers": 4,
    },
    "longformer": {"attention_window": [4, 4], "sep_token_id": 2},
    "mamba2": {"head_dim": 16, "n_groups": 1, "num_heads": 8},
    "mimi": {"upsample_groups": 64},
    "ministral": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "mistral4": {"head_dim": 32},
    "mllama_vision_model": {"num_channels": 3},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine": {"decoder_num_key_value_heads": 4, "encoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"num_key_value_heads": 4},
    "moshi": {"audio_vocab_size": 64},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"num_hidden_layers": 4},
    "paddleocr_vl_text": {
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"}
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"depth": 2, "embed_dim": 64, "global_pool": "", "img_size": [28, 28]},
            "model_type": "timm_wrapper",
        }
    },
    "qwen2_5_omni_text": {
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"}
    },
    "qwen2_5_vl_text": {
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"}
    },
    "qwen2_vl_text": {"rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 10000.0, "rope_type": "default"}},
    "qwen2_vl_vision": {"hidden_size": 64},
    "qwen3_5_moe_text": {
        "head_dim": 64,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    },
    "qwen3_5_text": {
        "head_dim": 64,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "qwen3_vl_moe_text": {
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "qwen3_vl_text": {
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "rope_theta": 10000.0,
            "rope_type": "default",
        }
    },
    "qwen4_exp_text": {
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 16,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "hidden_size": 64,
        "is_decoder": True,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "max_position_embeddings": 64,
        "num_buckets": 4,
    },
    "speech-encoder-decoder": {"decoder": DECODER, "encoder": WAV2VEC2},
    "swin": {"depths": [1, 1], "embed_dim": 16, "image_size": 64, "num_heads": [2, 2], "window_size": 4},
    "textnet": {"hidden_sizes": "__drop__"},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vision-encoder-decoder": {"decoder": DECODER, "encoder": VIT},
    "zamba": {
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_dt_rank": 8,
        "num_hidden_layers": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_hidden_layers": 3,
    },
}
