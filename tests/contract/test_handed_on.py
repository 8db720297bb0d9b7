# SPDX-License-Identifier: Apache-2.0
"""Hooks that hand other tensors on, as DeepSpeed ZeRO-3 has them on every module: prompts find their inputs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import Case, assert_equal, each_case, gradients, predict
from test_training import assert_same_gradients, checkpointing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_promptmoe.engine.prompt_layer import PromptLayer

LLAMA = Case("mept", "llama", "token", "sdpa")
SAMPLE = Case("mept", "llama", "sample", "sdpa")
CARRIED = Case("pmoe", "vit", "dinov2", "sdpa")


class HandOn(torch.autograd.Function):
    """Another tensor of the same memory, as ZeRO-3 makes of inputs and outputs to hear of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def other(value: Any) -> Any:
    """`value` with every tensor in it another one."""
    if isinstance(value, Tensor):
        return HandOn.apply(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        for key, each in value.items():
            value[key] = other(each)
        return value
    return type(value)(other(each) for each in value) if type(value) in (tuple, list) else value


def hand_others_on(model: nn.Module) -> nn.Module:
    """Hook every module as ZeRO-3 does when it takes a model over."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: other(args))
        module.register_forward_hook(lambda module, args, output: other(output))
    return model


@each_case()
def test_hooks_that_hand_other_tensors_on_change_nothing(case: Case) -> None:
    batch = case.batch()
    expected, (loss, given) = predict(case.model(), batch), gradients(case.model(), batch)
    model = hand_others_on(case.model())
    assert_equal(predict(model, batch), expected, "logits")
    found_loss, found = gradients(model, batch)
    assert_equal(found_loss, loss, "loss")
    assert_same_gradients(found, given, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("case", [LLAMA, SAMPLE], ids=str)
def test_checkpointed_blocks_find_their_inputs(case: Case, reentrant: bool) -> None:
    batch = case.batch()
    loss, given = gradients(case.model(), batch)
    model = hand_others_on(case.model())
    checkpointing(model, reentrant)
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=2e-6)
    assert_same_gradients(found, given, 1e-5)


class Checkpointed(nn.Module):
    """A block that is run again alone in the backward pass."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_prompts_that_blocks_carry_are_never_those_of_another_run(reentrant: bool) -> None:
    model = hand_others_on(CARRIED.model())
    blocks = model.get_base_model().vit.layers
    blocks[1] = Checkpointed(blocks[1], reentrant)
    batch = CARRIED.batch()
    with pytest.raises(RuntimeError, match="so prompts cannot be carried on"):
        loss = model(**batch).loss
        assert not reentrant, "this is known in the forward"
        loss.backward()


def test_nothing_is_kept_of_a_forward_that_is_over() -> None:
    for case in (LLAMA, CARRIED):
        model = hand_others_on(case.model())
        predict(model, case.batch())
        layers = [module for module in model.modules() if isinstance(module, PromptLayer)]
        assert layers and not any(layer.notes._last for layer in layers)


def test_hooks_that_scale_a_norms_output_may_stand_between() -> None:
    model, batch = LLAMA.model(), LLAMA.batch()
    norm = model.get_base_model().model.layers[0].input_layernorm
    hook = norm.register_forward_hook(lambda norm, args, output: output * 1.0)
    found = predict(model, batch)
    hook.remove()
    assert_equal(found, predict(model, batch), "logits")


@pytest.mark.parametrize("experts", [1, 3])
def test_hooks_before_the_packages_own_may_hand_on_another_input(experts: int) -> None:
    """As FSDP has them on a layer that is sharded by itself."""
    model, batch = LLAMA.model(num_experts=experts, top_k=1), LLAMA.batch()
    expected = predict(model, batch)

    def first(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"hidden_states": other(kwargs["hidden_states"])}

    for block in model.get_base_model().model.layers:
        block.self_attn.register_forward_pre_hook(first, with_kwargs=True, prepend=True)
    assert_equal(predict(model, batch), expected, "logits")


def test_compiled_models_find_their_inputs() -> None:
    batch = LLAMA.batch()
    loss, given = gradients(LLAMA.model(), batch)
    model = LLAMA.model()
    for block in model.get_base_model().model.layers:
        block.input_layernorm.register_forward_hook(lambda norm, args, output: output * 1.0)
    torch._dynamo.reset()
    found_loss, found = gradients(model, batch, forward=torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, given, 1e-5)


def test_exported_models_find_their_inputs() -> None:
    model, batch = LLAMA.model().eval(), {"input_ids": LLAMA.batch()["input_ids"]}
    expected = predict(model, batch)
    hand_others_on(model.get_base_model().model.layers[0].input_layernorm)
    exported = torch.export.export(model, (), {**batch, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(**batch, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_threads_find_their_own_inputs() -> None:
    model = hand_others_on(LLAMA.model())
    batches = [LLAMA.batch((8, 6, 7), seed=seed) for seed in range(4)]
    expected = [predict(model, batch) for batch in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(10):
            if not torch.equal(predict(model, batches[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_attention_layer_that_is_called_alone_does_not_get_the_input_of_another_run() -> None:
    model = hand_others_on(LLAMA.model()).eval()
    attention = model.get_base_model().model.layers[0].self_attn
    hook = attention.q_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    batch = LLAMA.batch()
    with pytest.raises(ZeroDivisionError):
        predict(model, batch)
    hook.remove()
    x = torch.randn(*batch["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="is not the output of"):
        attention(hidden_states=x, position_embeddings=(torch.ones(1, 8, 8), torch.zeros(1, 8, 8)))
