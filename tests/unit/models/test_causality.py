# SPDX-License-Identifier: Apache-2.0
"""Which layers look back only, whose outputs are read token by token, and that nothing looks ahead there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*were found by a generic rule"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LM: dict[str, Any] = _IDS | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_BERT: dict[str, Any] = {name: value for name, value in _LM.items() if name not in ("num_key_value_heads", "head_dim")}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_BART: dict[str, Any] = _IDS | {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def make(model: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def llama(model: str = "LlamaForCausalLM") -> Any:
    return make(model, "LlamaConfig", _LM)


def bert(model: str, **settings: Any) -> Any:
    return make(model, "BertConfig", _BERT | settings)


def paligemma(model: str) -> Any:
    text = _LM | {"model_type": "gemma", "num_key_value_heads": 1, "initializer_range": 0.2}
    vision = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    settings = {"text_config": text, "vision_config": vision, "image_token_index": 63, "projection_dim": 32}
    return make(model, "PaliGemmaConfig", settings)


def clip(model: str) -> Any:
    if model == "CLIPTextModel":
        return make(model, "CLIPTextConfig", _BERT)
    return make(model, "CLIPConfig", {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 24})


class MultiTask(nn.Module):
    """A user's own module around a model: value heads, several tasks."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.value = body, nn.Linear(32, 1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
        output = self.body(input_ids=input_ids, output_hidden_states=True, **more)
        return output.hidden_states[-1], self.value(output.hidden_states[-1])


TOKEN, ROW, AHEAD = (True, True), (True, False), (False, False)  # causal, and by_token
TOWERS: dict[str, tuple[Callable[[], Any], list[tuple[bool, bool]]]] = {
    "llama": (llama, [TOKEN, TOKEN]),
    "llama-bare": (lambda: llama("LlamaModel"), [TOKEN, TOKEN]),
    "llama-token-classes": (lambda: llama("LlamaForTokenClassification"), [TOKEN, TOKEN]),
    "llama-sequence-classes": (lambda: llama("LlamaForSequenceClassification"), [ROW, ROW]),
    "llama-in-a-users-module": (lambda: MultiTask(llama()), [TOKEN, TOKEN]),
    "llama-sequence-classes-in-a-users-module": (
        lambda: MultiTask(llama("LlamaForSequenceClassification")),
        [ROW, ROW],
    ),
    "paligemma": (lambda: paligemma("PaliGemmaForConditionalGeneration"), [AHEAD, TOKEN, TOKEN]),
    "paligemma-bare": (lambda: paligemma("PaliGemmaModel"), [AHEAD, TOKEN, TOKEN]),
    "doge": (lambda: make("DogeForCausalLM", "DogeConfig", _LM), [TOKEN, TOKEN]),
    "doge-bare": (lambda: make("DogeModel", "DogeConfig", _LM), [TOKEN, TOKEN]),
    "bigbird_pegasus": (lambda: make("BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", _BART), [TOKEN]),
    "decision_transformer": (
        lambda: make(
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        ),
        [TOKEN],
    ),
    "bert": (lambda: bert("BertModel"), [AHEAD, AHEAD]),
    "bert-masked": (lambda: bert("BertForMaskedLM"), [AHEAD, AHEAD]),
    "bert-decoder": (lambda: bert("BertModel", is_decoder=True), [TOKEN, TOKEN]),
    "bert-writing": (lambda: bert("BertLMHeadModel", is_decoder=True), [TOKEN, TOKEN]),
    "gemma3-both-ways": (
        lambda: make("Gemma3TextModel", "Gemma3TextConfig", _LM | {"use_bidirectional_attention": True}),
        [AHEAD, AHEAD],
    ),
    "t5": (
        lambda: make("T5ForConditionalGeneration", "T5Config", {"vocab_size": 64, "d_model": 32, "num_layers": 1}),
        [AHEAD],
    ),
    "clip": (lambda: clip("CLIPModel"), [ROW, ROW, AHEAD]),
    "clip-text": (lambda: clip("CLIPTextModel"), [TOKEN, TOKEN]),
    "clip-text-with-projection": (
        lambda: make("CLIPTextModelWithProjection", "CLIPTextConfig", _BERT | {"projection_dim": 24}),
        [ROW, ROW],
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_causality_is_read_off_attention(name: str) -> None:
    build, expected = TOWERS[name]
    model = get_peft_model(build(), MEPTConfig(num_virtual_tokens=2, prompt_init="random"))
    sites = [layer.site for layer in prompt_layers(model)]
    assert [(site.causal, site.by_token) for site in sites] == expected
    assert model.peft_config["default"].routing == ("token" if TOKEN in expected else "sample")


def paligemma_batch(ids: Tensor) -> dict[str, Tensor]:
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = torch.cat([torch.full((2, 4), 63), ids], dim=1)
    types = torch.cat([torch.zeros(2, 6), torch.ones(2, ids.shape[1] - 2)], dim=1).long()
    labels = whole.masked_fill(types == 0, -100)
    return {"input_ids": whole, "pixel_values": image, "token_type_ids": types, "labels": labels}


def text_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


WRITERS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], dict[str, Tensor]]]] = {
    "llama-bare": (lambda: llama("LlamaModel"), text_batch),
    "llama-in-a-users-module": (lambda: MultiTask(llama()), text_batch),
    "llama-token-classes": (lambda: llama("LlamaForTokenClassification"), text_batch),
    "paligemma": (lambda: paligemma("PaliGemmaForConditionalGeneration"), paligemma_batch),
    "doge-bare": (lambda: make("DogeModel", "DogeConfig", _LM), text_batch),
    "bigbird_pegasus": (lambda: make("BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", _BART), text_batch),
    "bert-decoder": (lambda: bert("BertModel", is_decoder=True), text_batch),
    "clip-text": (lambda: clip("CLIPTextModel"), text_batch),
}


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    found = output[0] if isinstance(output, tuple) else output.get("logits", output.get("last_hidden_state"))
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore:routing='sample' on a causal model reads the whole input")
def test_by_default_nothing_looks_ahead(name: str) -> None:
    """What changes the last token changes no earlier output; with sample routing, on the same model, it does."""
    build, batch_of = WRITERS[name]
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 17) % 50 + 5
    for routing in ("auto", "sample"):
        model = get_peft_model(build(), MEPTConfig(num_virtual_tokens=3, routing=routing, init_weights=False))
        for training in (True, False):
            model.train(training)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            batches = [batch_of(ids), batch_of(other)]
            if routing == "sample":
                for batch in batches:
                    batch.pop("labels", None)
            torch.manual_seed(7)
            before = outputs(model, batches[0])
            torch.manual_seed(7)
            moved = (outputs(model, batches[1]) - before).abs()
            ahead = float(moved[:, :-1].max())
            assert (ahead < 1e-6) == (routing == "auto"), f"{routing}: {ahead}"
            assert float(moved[:, -1].max()) > 1e-3


def test_labels_protect_sample_routing_behind_a_prefix_that_sees_itself() -> None:
    model = get_peft_model(
        paligemma("PaliGemmaForConditionalGeneration"),
        MEPTConfig(num_virtual_tokens=3, routing="sample", init_weights=False),
    ).train()
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, -2:] = (other[:, -2:] + 17) % 50 + 5
    moved = (outputs(model, paligemma_batch(ids)) - outputs(model, paligemma_batch(other))).abs()
    assert float(moved[:, :-2].max()) < 1e-6
    assert float(moved[:, -1].max()) > 1e-3
    with pytest.raises(ValueError, match="given_query"):
        model(**{name: value for name, value in paligemma_batch(ids).items() if name != "labels"})
