# SPDX-License-Identifier: Apache-2.0
"""What MEPT's prompts are before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.vocabulary_start import why_unread
from peft_promptmoe.mept.layer import MEPTLayer
from peft_promptmoe.models.reader import text_reader

SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
P, E, S = 3, 4, 2


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return (BertModel(BertConfig(**SIZES)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**SIZES))).eval()


def started(kind: str, seed: int = 1, **settings: Any) -> list[MEPTLayer]:
    model = base(kind)
    torch.manual_seed(seed)
    shape = {"num_virtual_tokens": P, "num_experts": E, "num_shared_experts": S}
    return prompt_layers(get_peft_model(model, MEPTConfig(**shape | settings)))  # type: ignore[return-value]


def rows(layer: MEPTLayer) -> tuple[Tensor, Tensor | None]:
    """Rows (E, P, D) of the routed and (S, P, D) of the shared experts."""
    scale = layer.prompt_config["default"].prompt_scale
    shared = layer.mept_shared_prompts["default"].weight * scale if "default" in layer.mept_shared_prompts else None
    return layer.mept_prompts["default"].weight * scale, shared


def known_inputs(kind: str) -> Tensor:
    """(P, V, D) inputs of the first layer for every token of the vocabulary at the first P places."""
    model: Any = base(kind)
    ids = torch.arange(SIZES["vocab_size"])[:, None].expand(-1, P)
    with torch.no_grad():
        hidden = model.embeddings(input_ids=ids) if kind == "bert" else model.model.embed_tokens(ids)
    return hidden.transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "settings", "experts"),
    [
        pytest.param("bert", {"routing": "token"}, E + S, id="bert-token"),
        pytest.param("llama", {"routing": "token"}, E + S, id="llama-token"),
        pytest.param("bert", {"num_experts": 1, "num_shared_experts": 0}, 1, id="bert-static"),
        pytest.param("bert", {"routing": "sample"}, E, id="bert-sample"),
        pytest.param("bert", {"routing": "sample", "num_shared_experts": 0, "top_k": 2}, E, id="bert-sample-alone"),
    ],
)
def test_rows_start_as_inputs_on_vocabulary_tokens(kind: str, settings: dict[str, Any], experts: int) -> None:
    layers = started(kind, **{"start_scale": "inputs"} | settings)
    routed, shared = rows(layers[0])
    parts = [part for part in (routed, shared) if part is not None]
    from_vocabulary = torch.cat(parts)[:experts]
    inputs = known_inputs(kind)
    for expert in from_vocabulary:
        for place, row in enumerate(expert):
            assert (inputs[place] - row).abs().amax(-1).min() < 1e-5
    assert len({tuple(row.tolist()) for expert in from_vocabulary for row in expert}) == experts * P
    # The next layer's rows are what the first made of such tokens.
    later = torch.cat([part for part in rows(layers[1]) if part is not None])[:experts]
    assert not torch.allclose(later, from_vocabulary, atol=1e-3)


@pytest.mark.parametrize("prompt_init", ["random", "sample_vocab"])
def test_shared_experts_start_small_where_they_are_added(prompt_init: str) -> None:
    for layer in started("bert", routing="sample", prompt_init=prompt_init):
        routed, shared = rows(layer)
        assert shared is not None and layer.site.input_std == pytest.approx(1.0, abs=1e-4)
        assert routed.std().item() == pytest.approx(1.0, rel=0.15)
        assert shared.std().item() == pytest.approx(0.1, rel=0.15)


def test_seeds_make_the_start() -> None:
    one, same, other = (rows(started("bert", seed=seed)[0])[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# -- how large they are -----------------------------------------------------------------------------------------------


class Squashed(nn.Module):
    """A norm that lets scale through (dynamic tanh)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def grown(kind: str) -> Any:
    """A model whose layer inputs grow with depth as those of trained ones do, in float64."""
    torch.manual_seed(0)
    if kind == "t5":
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        )
    else:
        model = base(kind.removesuffix("-squashed"))
    if kind.startswith("llama"):
        model.model.embed_tokens.weight.data.mul_(10)
        for depth, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.data.mul_(1000.0**depth * 30)
            if kind == "llama-squashed":
                block.input_layernorm = Squashed()
    return model.double().eval()


def start_of(kind: str, start_scale: str, **settings: Any) -> tuple[list[Tensor], Tensor]:
    """Rows (N, P, D) of every layer, and what the model puts out with them."""
    model = grown(kind)
    torch.manual_seed(1)
    shape = {"num_virtual_tokens": P, "num_experts": E, "num_shared_experts": S}
    prompted = get_peft_model(model, MEPTConfig(**shape | {"start_scale": start_scale} | settings)).double().eval()
    ids = torch.arange(2, 14).view(2, 6)
    further = {"decoder_input_ids": ids[:, :3]} if kind == "t5" else {}
    with torch.no_grad():
        out: Any = prompted(input_ids=ids, **further)
    tables = [rows(layer) for layer in prompt_layers(prompted)]  # type: ignore[arg-type]
    return [torch.cat([part for part in parts if part is not None]).detach() for parts in tables], out[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("llama", {"routing": "token"}, id="llama-token"),
        pytest.param("llama", {"num_experts": 1, "num_shared_experts": 0}, id="llama-static"),
        pytest.param("llama", {"routing": "sample", "num_shared_experts": 0, "top_k": 2}, id="llama-sample"),
        pytest.param("t5", {"routing": "sample", "num_shared_experts": 0, "top_k": 2}, id="t5-decoder-sees"),
        pytest.param("llama-squashed", {"routing": "token"}, id="norm-that-lets-scale-through"),
        pytest.param("bert", {"routing": "token"}, id="no-norm-in-front"),
    ],
)
def test_unit_scale_changes_nothing_of_what_the_start_does(kind: str, settings: dict[str, Any]) -> None:
    unit, put_out = start_of(kind, "unit", **settings)
    inputs, as_before = start_of(kind, "inputs", **settings)
    assert torch.allclose(put_out, as_before, atol=0.01 * float(as_before.std()))
    left_alone = {"t5": [1], "llama-squashed": [0, 1], "bert": [0, 1]}.get(kind, [])
    for depth, (scaled, plain) in enumerate(zip(unit, inputs, strict=True)):
        if depth in left_alone:
            assert torch.equal(scaled, plain)
            continue
        factors = plain / scaled
        assert factors.std() < 1e-4 * factors.mean()
        assert scaled.square().mean(-1).sqrt().median().item() == pytest.approx(1.0, rel=1e-3)


def test_shared_experts_that_are_added_weigh_a_tenth_in_every_layer() -> None:
    config = MEPTConfig(num_virtual_tokens=8, routing="sample")  # unit scale is the default
    for layer in prompt_layers(get_peft_model(grown("llama"), config)):
        routed, shared = rows(layer)  # type: ignore[arg-type]
        assert shared is not None
        assert float(shared.detach().square().mean().sqrt()) == pytest.approx(0.1, rel=0.1)
        assert float(routed.detach().square().mean(-1).sqrt().median()) == pytest.approx(1.0, rel=1e-3)


# -- what stands between a model and its embeddings -------------------------------------------------------------------


class Valued(nn.Module):
    """A user's own module around a language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = LlamaModel(LlamaConfig(**SIZES))
        self.value = nn.Linear(64, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.value(self.inner(input_ids).last_hidden_state)


def lora(**settings: Any) -> PeftModel:
    config = LoraConfig(**{"target_modules": ["q_proj"]} | settings)
    return get_peft_model(base("llama"), config, adapter_name="lora")


def second_adapter() -> PeftModel:
    saved = MEPTConfig(num_virtual_tokens=P, modules_to_save=["embed_tokens"])
    model = get_peft_model(base("llama"), saved, adapter_name="first")
    with torch.no_grad():  # the first one's copy has moved on, and is not what the second one will see
        model.get_input_embeddings().modules_to_save["first"].weight.add_(5.0)
    model.add_adapter("prompts", MEPTConfig(num_virtual_tokens=P, start_scale="inputs"))
    return model


def prompted(model: nn.Module, **settings: Any) -> PeftModel:
    config = MEPTConfig(num_virtual_tokens=P, prompt_init="sample_vocab", start_scale="inputs", **settings)
    return get_peft_model(model, config, adapter_name="prompts")


WRAPPED: dict[str, Any] = {
    "saved_embeddings": lambda: prompted(base("llama"), modules_to_save=["embed_tokens"]),
    "second_adapter": second_adapter,
    "lora_on_embeddings": lambda: prompted(lora(target_modules=["embed_tokens"])),
    "trainable_tokens": lambda: prompted(lora(trainable_token_indices=[5, 6])),
    "own_module": lambda: prompted(Valued()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_embeddings_give_the_rows_as_plain_ones_do(name: str) -> None:
    model = WRAPPED[name]()
    layer: Any = prompt_layers(model)[0]
    rows = layer.mept_prompts["prompts"].weight * layer.prompt_config["prompts"].prompt_scale
    known = model.get_submodule("base_model.model.inner") if name == "own_module" else base("llama").model
    table = known.embed_tokens.weight.detach()
    for row in rows.flatten(0, 1):
        assert (table - row).abs().amax(-1).min() < 1e-5


# -- where they cannot be had -----------------------------------------------------------------------------------------


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name != "vocab_size"}
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=60, vision_feature_layer=-1)
    )


def test_layers_that_text_does_not_reach_start_at_random_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="start at random") as caught:
        model = get_peft_model(llava(), MEPTConfig(num_virtual_tokens=P, start_scale="inputs"))
    (said,) = [str(warning.message) for warning in caught if "start at random" in str(warning.message)]
    assert "text alone does not reach 2 of the prompted layers" in said and "vision_tower" in said
    for layer in prompt_layers(model):
        spread = float(rows(layer)[0].detach().std())  # type: ignore[arg-type]
        assert (spread > 0.5) == ("vision_tower" in layer.site.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=4)), "4 positions", id="short"),
        pytest.param(llava, "text alone does not reach 2 of the prompted layers", id="images-beside"),
        pytest.param(
            lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, hidden_size=64, num_attention_heads=2)),
            "does not read token ids alone",
            id="images",
        ),
    ],
)
def test_the_reason_is_the_true_one(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_init='sample_vocab'.*{reason}.*prompt_init='random'"):
        get_peft_model(make(), MEPTConfig(num_virtual_tokens=P, prompt_init="sample_vocab"))


def test_models_that_want_more_than_token_ids_start_at_random_and_say_why() -> None:
    def wants_boxes(embeddings: nn.Module, args: Any) -> None:
        raise ValueError("Boxes are missing.")

    reason = r"on token ids alone it raises ValueError \(Boxes are missing\)"
    for init in ("auto", "sample_vocab"):
        model = base("bert")
        model.embeddings.register_forward_pre_hook(wants_boxes)
        if init == "sample_vocab":
            with pytest.raises(ValueError, match=reason):
                get_peft_model(model, MEPTConfig(num_virtual_tokens=P, prompt_init=init))
        else:
            with pytest.warns(UserWarning, match=f"start at random.*{reason}"):
                layers = prompt_layers(get_peft_model(model, MEPTConfig(num_virtual_tokens=P)))
            assert all(layer.mept_prompts["default"].weight.std() > 0 for layer in layers)


def test_weights_that_are_not_in_memory_are_not_run() -> None:
    model = base("llama")
    assert why_unread(model, text_reader(model), P) is None
    model.model.layers[1].mlp.to("meta")
    assert why_unread(model, text_reader(model), P) == "its weights are not in memory"
