# SPDX-License-Identifier: Apache-2.0
"""Table of the tested architectures: names and structure of their attention layers."""

from __future__ import annotations

from dataclasses import dataclass

from .alibi import BLOOM, FALCON, MPT
from .disentangled import DEBERTA, DEBERTA_V2
from .own_attention import OwnAttention
from .relative import CONFORMER, PARAKEET, ROFORMER, SPEECHT5, WAVLM
from .written_out import (
    BART_LIKE,
    BERT_LIKE,
    CTRL,
    EOMT,
    GPT_NEO,
    GPT_NEOX_JAPANESE,
    LUKE,
    MPNET,
    OPENAI_GPT,
    PROPHETNET,
    VIDEOMAE,
    VJEPA2,
    XGLM,
)

FOUND = "?"


@dataclass(frozen=True)
class Family:
    """How the attention layers of one architecture are named and built.

    Attributes:
        attention: regular expression that fully matches the paths of the attention layers to prompt.
        norm: attribute of the block with the norm in front of the attention layer, or several possible names. None for
            post-norm blocks. FOUND: it is found by reading the block's code.
        key, value: attributes of the attention layer with the key and value projections.
        key_norm: attribute with the norm of each head's keys, if the layer has one.
        fused: attribute with one projection for queries, keys and values, used instead of `key` and `value`.
        head_dim: attribute of the attention layer with the width of one head.
        input_norm: path from the block to its last norm, whose output is the next block's input (post-norm).
        stem_norm: end of the path of the norm after the embeddings, whose output is the first block's input
            (post-norm).
        direct: whether keys and values are computed with the projections named here. Otherwise the layer itself is run
            on the prompt rows.
        own: how the layer computes attention, if it does not use transformers' AttentionInterface; else None.
        rows_by_mask: whether prompt rows are passed together with the attention mask. Needed in layers that pass on no
            other arguments.
        windows: whether the layers attend within windows, in blocks of several stages. Prompts cannot join them; only
            what is added to the outputs of whole blocks can.
    """

    attention: str
    norm: str | tuple[str, ...] | None = None
    key: str = "k_proj"
    value: str = "v_proj"
    key_norm: str | None = None
    fused: str | None = None
    head_dim: str = "head_dim"
    input_norm: str | None = None
    stem_norm: str | None = None
    direct: bool = True
    rows_by_mask: bool = False
    own: OwnAttention | None = None
    windows: bool = False


_BERT = Family(
    r"(.*\.)?encoder\.layer\.\d+\.attention\.self",
    key="key",
    value="value",
    head_dim="attention_head_size",
    input_norm="output.LayerNorm",
    stem_norm="embeddings.LayerNorm",
)


def _post_norm(own: OwnAttention) -> Family:
    return Family(_BERT.attention, own=own, input_norm="output.LayerNorm", stem_norm="embeddings.LayerNorm")


_LLAMA = Family(r"(.*\.)?layers\.\d+\.self_attn", norm="input_layernorm")
_QK_NORM = Family(r"(.*\.)?layers\.\d+\.self_attn", norm="input_layernorm", key_norm="k_norm")

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Family(
        r"(.*\.)?transformer\.layer\.\d+\.attention",
        key="k_lin",
        value="v_lin",
        head_dim="attention_head_size",
        input_norm="output_layer_norm",
        stem_norm="embeddings.LayerNorm",
    ),
    "modernbert": Family(r"(.*\.)?layers\.\d+\.attn", norm="attn_norm", fused="Wqkv"),
    "t5": Family(
        r"(.*\.)?encoder\.block\.\d+\.layer\.0\.SelfAttention",
        norm="layer_norm",
        key="k",
        value="v",
        head_dim="key_value_proj_dim",
    ),
    "bart": Family(
        r"(.*\.)?encoder\.layers\.\d+\.self_attn",
        input_norm="final_layer_norm",
        stem_norm="encoder.layernorm_embedding",
    ),
    "whisper": Family(r"(.*\.)?layers\.\d+\.self_attn", norm="self_attn_layer_norm"),
    "gpt2": Family(r"(.*\.)?h\.\d+\.attn", norm="ln_1", fused="c_attn"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _QK_NORM,
    "gemma3_text": _QK_NORM,
    "bloom": Family(r"(.*\.)?h\.\d+\.self_attention", norm="input_layernorm", own=BLOOM),
    "falcon": Family(r"(.*\.)?h\.\d+\.self_attention", norm=("ln_attn", "input_layernorm"), own=FALCON),
    "mpt": Family(r"(.*\.)?blocks\.\d+\.attn", norm="norm_1", own=MPT),
    "deberta": _post_norm(DEBERTA),
    "deberta-v2": _post_norm(DEBERTA_V2),
    "gpt_neo": Family(r"(.*\.)?h\.\d+\.attn\.attention", norm=FOUND, own=GPT_NEO),
    "xglm": Family(r"(.*\.)?layers\.\d+\.self_attn", norm="self_attn_layer_norm", own=XGLM),
    "openai-gpt": Family(r"(.*\.)?h\.\d+\.attn", own=OPENAI_GPT),
    "megatron-bert": Family(_BERT.attention, norm=FOUND, own=BERT_LIKE),
    "rembert": _post_norm(BERT_LIKE),
    "tapas": _post_norm(BERT_LIKE),
    "luke": _post_norm(LUKE),
    "gpt_neox_japanese": Family(r"(.*\.)?layers\.\d+\.attention", norm="input_layernorm", own=GPT_NEOX_JAPANESE),
    "ctrl": Family(r"(.*\.)?h\.\d+\.multi_head_attention", norm="layernorm1", own=CTRL),
    "mvp": Family(r"(.*\.)?(?:en|de)coder\.layers\.\d+\.self_attn", own=BART_LIKE),
    "trocr": Family(r"(.*\.)?decoder\.layers\.\d+\.self_attn", own=BART_LIKE),
    "prophetnet": Family(r"(.*\.)?encoder\.layers\.\d+\.self_attn", own=PROPHETNET),
    "roformer": _post_norm(ROFORMER),
    "mpnet": Family(r"(.*\.)?encoder\.layer\.\d+\.attention\.attn", own=MPNET),
}

_VIT = Family(r"(.*\.)?layers\.\d+\.attention", norm="layernorm_before")
_DINOV2 = Family(r"(.*\.)?encoder\.layer\.\d+\.attention", norm="norm1")
_CLIP_PATH = r"(.*\.)?encoder\.layers\.\d+\.self_attn"

# By model type in the attention layer's own config. In a model with several towers that is the tower's config.
VISION_FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _VIT,
    "vit_mae": _VIT,
    "vit_msn": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": Family(r"(.*\.)?layer\.\d+\.attention", norm="norm1"),
    "videomae": Family(r"(.*\.)?encoder\.layer\.\d+\.attention\.attention", norm=FOUND, own=VIDEOMAE),
    "data2vec-vision": Family(r"(.*\.)?encoder\.layer\.\d+\.attention\.attention", norm=FOUND, own=VIDEOMAE),
    "eomt": Family(r"(.*\.)?layers\.\d+\.attention", norm="norm1", own=EOMT),
    "vjepa2": Family(r"(.*\.)?encoder\.layer\.\d+\.attention", norm="norm1", own=VJEPA2),
    "clip_vision_model": Family(_CLIP_PATH, norm="layer_norm1"),
    "siglip_vision_model": Family(_CLIP_PATH, norm="layer_norm1", rows_by_mask=True),
}

# By class of the attention layer, for classes that several models use. Their adapters between encoder and decoder,
# which shorten the audio sequence before attention, have another path.
_SPEECH_PATH = r"(?!(?:.*\.)?adapter\.)(.*\.)?layers\.\d+\.self_attn"
LAYER_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "Wav2Vec2BertSelfAttention",
            "Wav2Vec2ConformerSelfAttention",
            "SeamlessM4TConformerSelfAttention",
            "SeamlessM4Tv2ConformerSelfAttention",
        ),
        Family(_SPEECH_PATH, norm="self_attn_layer_norm", own=CONFORMER),
    ),
    "ParakeetEncoderAttention": Family(_SPEECH_PATH, norm=FOUND, own=PARAKEET),
    "SpeechT5Attention": Family(
        r"(.*\.)?layers\.\d+\.attention",
        own=SPEECHT5,
        input_norm="final_layer_norm",
        stem_norm="encoder.layer_norm",
    ),
    "WavLMAttention": Family(r"(.*\.)?layers\.\d+\.attention", norm=FOUND, own=WAVLM),
}

_STAGES = Family(r"(.*\.)?layers\.\d+\.blocks\.\d+\.(attention|attn)", windows=True)
# By class of the attention layer: blocks whose outputs are all patches of their stage, in order.
WINDOW_FAMILIES: dict[str, Family] = {
    "transformers.models.swin.modeling_swin.SwinAttention": _STAGES,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Attention": _STAGES,
    "timm.models.swin_transformer.WindowAttention": _STAGES,
    "timm.models.swin_transformer_v2.WindowAttention": _STAGES,
}

TIMM_PATH = r"(?:[A-Za-z_]\w*\.)*blocks\.\d+\.(?:attns\.\d+\.)?attn"
# By class of timm's attention layer. timm has many blocks, so the norm is found by reading the block's code. EVA (and
# timm's DINOv3) splits the biases of its projection, so there the layer itself is run.
TIMM_FAMILIES: dict[str, Family] = {
    "timm.layers.attention.Attention": Family(TIMM_PATH, fused="qkv", key_norm="k_norm"),
    "timm.models.eva.EvaAttention": Family(TIMM_PATH, direct=False),
}
