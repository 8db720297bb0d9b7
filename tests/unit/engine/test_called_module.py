# SPDX-License-Identifier: Apache-2.0
"""Whatever module of a model is called, its routers hear of the query, keep their centres and balance their load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import PROMPT_CHILD, Case
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:.*found by a generic rule")
IDS = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 2}
_VISION = {
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def clip() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=_TEXT | {"num_attention_heads": 4, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=_VISION,
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


def siglip() -> Any:
    """Its layers hand nothing on but their mask."""
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**_VISION)
    return transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=vision.to_dict(), num_labels=2)
    )


def routers(model: nn.Module) -> Tensor:
    found = {name: p.grad for name, p in model.named_parameters() if "mept_router." in name}
    assert found and all(gradient is not None for gradient in found.values())
    return torch.cat([found[name].flatten() for name in sorted(found)])  # type: ignore[union-attr]


PARTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "clip-image-features": (clip, lambda m: m.get_image_features(pixel_values=IMAGES).pooler_output, "vision_model"),
    "clip-text-features": (clip, lambda m: m.get_text_features(input_ids=IDS).pooler_output, "text_model"),
    "t5-encoder": (
        lambda: Case("mept", "t5", "sample", "sdpa").base(),
        lambda m: m.get_encoder()(input_ids=IDS).last_hidden_state,
        "encoder",
    ),
    "bert-body": (
        lambda: Case("mept", "bert", "sample", "sdpa").base(),
        lambda m: m.bert(input_ids=IDS).last_hidden_state,
        "bert",
    ),
    "bert-encoder": (
        lambda: Case("mept", "bert", "sample", "sdpa").base(),
        lambda m: m.bert.encoder(m.bert.embeddings(IDS)).last_hidden_state,
        "bert.encoder",
    ),
    "llama-body": (
        lambda: Case("mept", "llama", "token", "sdpa").base(),
        lambda m: m.model(input_ids=IDS).last_hidden_state,
        "model",
    ),
    "siglip-tower": (siglip, lambda m: m.vision_model(pixel_values=IMAGES).last_hidden_state, "vision_model"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_called_by_itself_keeps_centres_and_learns(name: str) -> None:
    build, call, path = PARTS[name]
    torch.manual_seed(0)
    config = MEPTConfig(num_virtual_tokens=3, router_centering=True, init_weights=False)
    model = get_peft_model(build(), config).train()
    call(model.get_base_model()).square().sum().backward()
    layers = [layer for layer in prompt_layers(model) if layer.site.name.startswith(path)]
    for layer in layers:
        assert int(layer.mept_router_center["default"].steps) == 1
        assert float(layer.mept_router["default"].weight.grad.abs().max()) > 0
    assert layers


@pytest.mark.parametrize("name", PARTS)
def test_a_balance_loss_without_the_models_loss_says_so(name: str) -> None:
    build, call, _ = PARTS[name]
    torch.manual_seed(0)
    model = get_peft_model(build(), MEPTConfig(num_virtual_tokens=3, balance_loss_weight=1.0)).train()
    features = call(model.get_base_model())
    with pytest.warns(UserWarning, match="have no effect in this step"):
        features.square().sum().backward()


@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
@pytest.mark.parametrize("routing", ["sample", "token"])
def test_clips_own_loss_carries_the_balance_loss_to_both_towers(routing: str, return_dict: bool) -> None:
    found = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = get_peft_model(
            clip(), MEPTConfig(num_virtual_tokens=3, routing=routing, balance_loss_weight=weight)
        ).train()
        output = model(input_ids=IDS, pixel_values=IMAGES, return_loss=True, return_dict=return_dict)
        (output.loss if return_dict else output[0]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "mept_router." in n})
    assert len(found[0]) == 4
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).abs().max()) > 1e-3, name


def test_a_tower_that_hands_nothing_on_has_a_balance_loss_too() -> None:
    found = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = get_peft_model(siglip(), MEPTConfig(num_virtual_tokens=3, balance_loss_weight=weight)).train()
        model(pixel_values=IMAGES, labels=torch.tensor([0, 1, 1])).loss.backward()
        found.append(routers(model))
    assert float((found[1] - found[0]).abs().max()) > 1e-2


# -- users' own modules around a model --------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """Takes the labels itself and hands nothing on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = LlamaModel(LLAMA), nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.body(input_ids).last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class TheirLoss(nn.Module):
    """Hands labels on and puts out the loss of the model within, first or last."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.first = LlamaForCausalLM(LLAMA), first

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Any, ...]:
        output = self.model(input_ids=input_ids, labels=labels)
        return (output.loss, output.logits) if self.first else (output.logits, output.loss)


def labelled(query: int = 4) -> dict[str, Tensor]:
    labels = IDS.clone()
    labels[:, :query] = -100
    return {"input_ids": IDS, "labels": labels}


def balanced(weight: float) -> MEPTConfig:
    return MEPTConfig(num_virtual_tokens=3, routing="sample", balance_loss_weight=weight, prompt_init="random")


def plain(weight: float) -> Tensor:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA)
    torch.manual_seed(1)
    model = get_peft_model(base, balanced(weight)).train()
    model(**labelled()).loss.backward()
    return routers(model)


@pytest.mark.parametrize(
    ("first", "compiled"),
    [(True, False), (False, False), (True, True)],
    ids=["loss-first", "loss-last", "loss-first-compiled"],
)
def test_a_module_around_a_model_changes_no_gradient(first: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    expected = plain(1.0)
    assert float((expected - plain(0.0)).abs().max()) > 1e-2
    base = TheirLoss(first)
    torch.manual_seed(1)
    model = get_peft_model(base, balanced(1.0)).train()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    run(**labelled())[0 if first else 1].backward()
    torch.testing.assert_close(routers(model), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "body-compiled"])
def test_labels_and_loss_of_a_module_that_hands_nothing_on_reach_the_layers(compiled: bool) -> None:
    torch._dynamo.reset()
    found = []
    for weight in (0.0, 5.0):
        base = OwnLoss()
        torch.manual_seed(1)
        model = get_peft_model(base, balanced(weight)).train()
        if compiled:
            base.body.compile(fullgraph=True, backend="aot_eager")
        model(**labelled())["loss"].backward()
        found.append(routers(model))
        changed = {name: value.clone() for name, value in labelled().items()}
        for value in changed.values():
            value[:, -1] = 7
        with torch.no_grad():
            moved = (model(**changed)["logits"] - model(**labelled())["logits"]).abs()
        assert float(moved[:, :-1].max()) < 1e-6
        assert float(moved[:, -1].max()) > 1e-3
    assert float((found[1] - found[0]).abs().max()) > 1e-2


# -- what stays behind ------------------------------------------------------------------------------------------------


def begun(model: nn.Module) -> dict[int, Any]:
    hooks: Any = getattr(model.get_base_model(), PROMPT_CHILD)  # type: ignore[operator]
    return hooks.calls._calls  # type: ignore[no-any-return]


def test_a_forward_that_fails_is_over() -> None:
    """The next one, of a part of the model, would else take its query."""
    model = Case("mept", "llama", "sample", "sdpa").model().train()
    lm = model.get_base_model()
    with pytest.raises(TypeError):
        model(**labelled(), position_ids="none")
    assert not begun(model)
    with pytest.raises(ValueError, match="given_query"):
        lm.model(input_ids=IDS)
    assert not begun(model)


def test_copies_have_calls_of_their_own() -> None:
    model = Case("mept", "bert", "sample", "sdpa").model(router_centering=True).train()
    other = copy.deepcopy(model)
    assert {id(layer.calls) for layer in prompt_layers(other)} == {
        id(getattr(other.get_base_model(), PROMPT_CHILD).calls)
    }
    other.get_base_model().bert(input_ids=IDS)
    assert [int(layer.mept_router_center["default"].steps) for layer in prompt_layers(model)] == [0, 0]
    assert [int(layer.mept_router_center["default"].steps) for layer in prompt_layers(other)] == [1, 1]


def test_a_block_that_is_called_by_itself_is_told_what_to_call() -> None:
    model = Case("mept", "bert", "sample", "sdpa").model(router_centering=True).train()
    bert = model.get_base_model().bert
    with pytest.raises(ValueError, match=r"Call the model or its encoder"):
        bert.encoder.layer[0](bert.embeddings(IDS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_that_compiled_checkpoints_would_lose_are_refused(reentrant: bool) -> None:
    """Without balance loss the two go together; and so do compiled code and the loss without checkpoints."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))

    def backward(weight: float, checkpointed: bool) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, routing="token", balance_loss_weight=weight)
        model = get_peft_model(base, config).train()
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss.backward()

    backward(0.0, checkpointed=True)
    backward(1.0, checkpointed=False)
    with pytest.raises(ValueError, match=r"torch\.compile together with gradient_checkpointing loses"):
        backward(1.0, checkpointed=True)
