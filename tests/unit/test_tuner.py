# SPDX-License-Identifier: Apache-2.0
"""Defects that a review found, one test each."""

from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
)

from peft_promptmoe import MEPTConfig, RoutingCallback
from peft_promptmoe.engine.model_hooks import prompt_layers

IDS = torch.arange(1, 25).view(4, 6)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )


def bert(**settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("spelling", ["SEQ_CLS", TaskType.SEQ_CLS], ids=["string", "enum"])
def test_either_spelling_of_the_task_trains_the_head_and_names_the_auto_class(spelling: Any, tmp_path: Any) -> None:
    base = BartForSequenceClassification(
        BartConfig(
            vocab_size=40,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
        )
    )
    model = get_peft_model(base, MEPTConfig(task_type=spelling))
    assert any("classification_head" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert "AutoPeftModelForSequenceClassification" in (tmp_path / "README.md").read_text()


def test_balance_gradient_under_the_trainers_own_accumulation() -> None:
    """The Trainer passes `num_items_in_batch` and then does not divide the loss by the accumulation steps."""
    model = get_peft_model(
        llama(), MEPTConfig(task_type="CAUSAL_LM", routing="token", balance_loss_weight=1.0)
    ).train()
    routers = [p for n, p in model.named_parameters() if "mept_router" in n]

    def gradients(weight: float, parts: int) -> list[torch.Tensor]:
        for layer in prompt_layers(model):
            layer.prompt_config["default"].balance_loss_weight = weight
        model.zero_grad()
        # The same rows in every micro-batch, so that their balance terms are equal and only the scale can differ.
        for _ in range(parts):
            model(input_ids=IDS[:1], labels=IDS[:1], num_items_in_batch=parts * IDS.shape[1]).loss.backward()
        return [p.grad.clone() for p in routers if p.grad is not None]

    once = [a - b for a, b in zip(gradients(1.0, 1), gradients(0.0, 1), strict=True)]
    four = [a - b for a, b in zip(gradients(1.0, 4), gradients(0.0, 4), strict=True)]
    assert any(gradient.abs().max() > 1e-3 for gradient in once)
    for a, b in zip(once, four, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trainable", [False, True], ids=["inference", "trainable"])
@pytest.mark.parametrize("with_prompts", [False, True], ids=["alone", "beside-prompts"])
def test_a_file_with_base_weights_is_refused(trainable: bool, with_prompts: bool, tmp_path: Any) -> None:
    model = get_peft_model(llama(), MEPTConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    tensors = {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(32, 16)}
    if with_prompts:
        from safetensors.torch import load_file

        tensors |= load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = llama()
    before = base.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match="neither prompts nor saved modules"):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable)
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, before)


def test_a_saved_copy_of_the_norm_that_prompts_pass_through_is_refused() -> None:
    with pytest.raises(ValueError, match="modules_to_save='input_layernorm'"):
        get_peft_model(llama(), MEPTConfig(task_type="CAUSAL_LM", modules_to_save=["input_layernorm"]))


def test_more_slots_than_positions_start_at_random() -> None:
    with pytest.warns(UserWarning, match="start at random.*32 positions"):
        model = get_peft_model(bert(max_position_embeddings=32), MEPTConfig(num_virtual_tokens=40)).eval()
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    base = bert(max_position_embeddings=32)
    with pytest.raises(ValueError, match="prompt_init='random'"):
        get_peft_model(base, MEPTConfig(num_virtual_tokens=40, prompt_init="sample_vocab"))
    assert not prompt_layers(base) and not hasattr(base, "promptmoe")


def test_the_router_centre_stays_in_float32_on_a_half_precision_model() -> None:
    model = get_peft_model(bert().bfloat16(), MEPTConfig(router_centering=True))
    centers = [p for n, p in model.named_parameters() if n.endswith("mept_router_center.default.weight")]
    assert centers and all(center.dtype == torch.float32 for center in centers)


def test_a_frozen_adapter_keeps_its_centre_in_training_mode() -> None:
    model = get_peft_model(bert(), MEPTConfig(router_centering=True)).train().requires_grad_(False)
    model(input_ids=IDS)
    assert all(int(b) == 0 for n, b in model.named_buffers() if n.endswith("steps"))


def test_the_callback_is_silent_where_nothing_is_routed() -> None:
    model = get_peft_model(bert(), MEPTConfig(num_experts=1))
    model(input_ids=IDS)
    RoutingCallback().on_step_end(None, TrainerState(), TrainerControl(), model=model)


@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens_q"])
def test_packed_rows_are_refused_by_sample_routing(named: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    packed = {"position_ids": [[0, 1, 2, 0, 1, 2]], "cu_seq_lens_q": [0, 3, 6]}
    extra = {named: torch.tensor(packed[named])}
    model = get_peft_model(llama(), MEPTConfig(task_type="CAUSAL_LM", routing="sample")).eval()
    with pytest.raises(ValueError, match=r"packed with several samples.*routing='token'"):
        model(input_ids=ids, labels=ids, **extra)
    token = get_peft_model(llama(), MEPTConfig(task_type="CAUSAL_LM", routing="token")).eval()
    packed_logits = token(input_ids=ids, labels=ids, use_cache=False, **extra).logits
    if named == "position_ids":  # transformers' sdpa kernel goes by these; those are for varlen kernels
        for part in (slice(0, 3), slice(3, 6)):
            torch.testing.assert_close(packed_logits[:, part], token(input_ids=ids[:, part]).logits)


@pytest.mark.parametrize("static", [False, True])
def test_positions_of_padding_are_no_packing(static: bool) -> None:
    model = get_peft_model(llama(), MEPTConfig(task_type="CAUSAL_LM", routing="sample")).eval()
    ids, mask = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    more = {"cache_implementation": "static"} if static else {}
    both = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **more)
    alone = model.generate(input_ids=ids[:1, 2:], max_new_tokens=3, do_sample=False, **more)
    assert torch.equal(both[0, 4:], alone[0, 2:])


def test_gpt2s_own_upcast_attention_is_refused() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, reorder_and_upcast_attn=True))
    with pytest.raises(ValueError, match="reorder_and_upcast_attn=False"):
        get_peft_model(base, MEPTConfig(task_type="CAUSAL_LM"))


def test_the_decoder_mask_grows_by_the_slots_and_nothing_else() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    model = get_peft_model(base, MEPTConfig(task_type="SEQ_2_SEQ_LM", decoder_sees_prompts=False)).eval()
    states = model.get_base_model().get_encoder()(input_ids=IDS)
    inputs = {"encoder_outputs": states, "attention_mask": torch.ones(4, 4), "decoder_input_ids": IDS[:, :2]}

    def outcome() -> str:
        try:
            return str(model(**inputs).logits.sum().item())
        except (RuntimeError, ValueError, IndexError) as error:
            return type(error).__name__

    with model.disable_adapter():
        stock = outcome()
    assert outcome() == stock
