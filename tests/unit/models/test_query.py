# SPDX-License-Identifier: Apache-2.0
"""What routers of whole rows read: queries, guesses of assisted decoding, masks of several kinds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import Case, gradients, logits
from peft import get_peft_model
from torch import Tensor
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState

from peft_promptmoe import MEPTConfig, RoutingCallback

BERT, T5, BART, LLAMA, GEMMA = (
    Case("mept", name, "sample", "sdpa") for name in ("bert", "t5", "bart", "llama", "gemma3")
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


def router_gradients(case: Case, weight: float, **more: Any) -> dict[str, Tensor]:
    model = case.model(balance_loss_weight=weight, init_weights=False)
    found = gradients(model, case.batch() | more)[1]
    return {name: gradient for name, gradient in found.items() if "mept_router" in name}


@pytest.mark.parametrize("case", [BERT, T5, BART], ids=str)
def test_balance_is_scaled_as_the_loss_of_models_that_do_not_divide_by_the_steps_labels(case: Case) -> None:
    """The Trainer gives them the number of labels in a step, as it does to all, and their loss stays the same."""
    items = {"num_items_in_batch": torch.tensor(400)}
    plain, counted = router_gradients(case, 0.0), router_gradients(case, 0.0, **items)
    with_balance, both = router_gradients(case, 1.0), router_gradients(case, 1.0, **items)
    for name, gradient in with_balance.items():
        torch.testing.assert_close(counted[name], plain[name])
        assert (gradient - plain[name]).abs().max() > 1e-4
        torch.testing.assert_close(both[name], gradient)


@pytest.mark.parametrize("ways", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}], ids=["lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_answer(ways: dict[str, Any]) -> None:
    model = LLAMA.model(init_weights=False)
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    more = {"assistant_model": LLAMA.base(seed=3)} if ways.pop("assistant", None) else ways
    plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **more), plain)


@pytest.mark.parametrize("positions", ["prefix", "unrotated"])
def test_prompts_that_the_decoder_sees_stand_where_all_others_do(positions: str) -> None:
    texts = []
    for sees in (True, False):
        model = T5.model(T5.base().double(), decoder_sees_prompts=sees, prompt_positions=positions, init_weights=False)
        batch = T5.prompt_only(T5.batch())
        with torch.no_grad():
            states = model.get_encoder()(**batch).last_hidden_state
        texts.append(states[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()])
    torch.testing.assert_close(texts[0], texts[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("closed", [-1e4, -1e9, -torch.inf])
def test_padding_is_padding_whatever_closes_it(closed: float) -> None:
    base = BertModel(BERT.base().config, add_pooling_layer=False)
    base.load_state_dict(BERT.base().bert.state_dict(), strict=False)
    model = get_peft_model(base.double(), MEPTConfig(routing="sample", init_weights=False)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    mask[..., 4:] = closed
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :4]
        torch.testing.assert_close(padded, model(input_ids=ids[:, :4]).last_hidden_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", [True, False], ids=["query", "no-query"])
def test_labels_without_a_query_are_told_once(asked: bool) -> None:
    model, batch = LLAMA.model().train(), LLAMA.batch()
    batch = batch if asked else batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**batch)
    assert sum("has a query" in str(warning.message) for warning in caught) == (0 if asked else 1)


def test_copies_of_data_parallel_are_refused() -> None:
    model, batch = BERT.model(), BERT.batch()
    replica = model.get_base_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel .* torchrun"):
        replica(**batch)


def test_angles_that_depend_on_the_length_are_refused_before_anything_is_changed() -> None:
    settings = LLAMA.architecture.settings
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="prompt_positions='unrotated'"):
        get_peft_model(base, MEPTConfig(task_type="CAUSAL_LM", prompt_positions="prefix"))
    assert [name for name, _ in base.named_modules()] == names
    model = get_peft_model(base, MEPTConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].prompt_positions == "unrotated"
    model(torch.tensor([[5, 6]]))


def test_masks_by_kind_of_layer_and_labels_go_together() -> None:
    model, batch = GEMMA.model(), GEMMA.batch()
    expected = logits(model, batch)
    length = batch["input_ids"].shape[1]
    seen = (
        torch.ones(length, length, dtype=torch.bool).tril()[None, None] & batch["attention_mask"].bool()[:, None, None]
    )
    near = torch.ones(length, length, dtype=torch.bool).triu(1 - GEMMA.architecture.settings["sliding_window"])
    masks = {"full_attention": seen, "sliding_attention": seen & near}
    found = logits(model, batch | {"attention_mask": masks})
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize("steps", [1, 40])
def test_few_choices_are_no_collapse(steps: int) -> None:
    model, batch = BERT.model(top_k=1), BERT.batch(lengths=(8,))
    callback, state = RoutingCallback(), TrainerState()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(**batch)
            callback.on_step_end(None, state, TrainerControl(), model=model)
            callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0}, model=model)
    told = [warning for warning in caught if "send nearly everything" in str(warning.message)]
    assert len(told) == (0 if steps == 1 else 1)
