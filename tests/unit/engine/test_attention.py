# SPDX-License-Identifier: Apache-2.0
"""Masks, gates, columns and the config view: the parts that attention is put together from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MistralConfig, StaticCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from peft_promptmoe import MEPTConfig
from peft_promptmoe.engine.columns import Columns, Slots, add_gates, gates_of, join_rows, merge_columns
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.rows import Experts, Rows, columns_of, decoding_table
from peft_promptmoe.engine.transformers_attention import INTERFACE, ConfigView
from peft_promptmoe.models.call_arguments import first_real, real_tokens
from peft_promptmoe.routing.record import Chosen
from peft_promptmoe.routing.router import best_gates

B, T, D = 3, 6, 16
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": D,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
PADDING = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "both": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]],
}


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional"])
@pytest.mark.parametrize("padding", PADDING)
def test_real_tokens_on_the_masks_of_transformers(padding: str, kind: str, implementation: str) -> None:
    config = MistralConfig(**SMALL, sliding_window=3, attn_implementation=implementation)
    attention_mask = torch.tensor(PADDING[padding])
    embeds = torch.zeros(B, T, D)
    if kind == "bidirectional":
        mask = create_bidirectional_mask(config, embeds, attention_mask)
    else:
        make = create_causal_mask if kind == "causal" else create_sliding_window_causal_mask
        mask = make(config, embeds, attention_mask, None)
    assert mask.ndim == 4
    real = real_tokens(mask, T)
    assert real is not None and torch.equal(real, attention_mask.bool())
    assert first_real(real).tolist() == attention_mask.argmax(dim=1).tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_real_tokens_with_a_static_cache(padding: str, implementation: str) -> None:
    config = LlamaConfig(**SMALL, attn_implementation=implementation)
    attention_mask = torch.tensor(PADDING[padding])
    cache = StaticCache(config, max_cache_len=T + 10)
    mask = create_causal_mask(config, torch.zeros(B, T, D), attention_mask, cache)
    assert mask.shape[-1] > T
    real = real_tokens(mask, T)
    assert real is not None and torch.equal(real, attention_mask.bool())


def test_real_tokens_of_a_row_mask() -> None:
    mask = torch.tensor(PADDING["left"]).bool()[:, None, None]
    assert torch.equal(real_tokens(mask, T), mask[:, 0, 0])
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(real_tokens(additive, T), mask[:, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_tokens_of_additive_masks_with_a_bias(dtype: torch.dtype) -> None:
    open_ = torch.tensor(PADDING["right"]).bool()[:, None, None].expand(-1, -1, T, -1)
    bias = torch.randn(B, 1, T, T).to(dtype) * 20  # T5 models add positions to the mask
    mask = bias.masked_fill(~open_, torch.finfo(dtype).min)
    assert torch.equal(real_tokens(mask, T), open_[:, 0, 0])


def test_no_mask_means_no_padding() -> None:
    assert real_tokens(None, T) is None and first_real(None) is None


def test_masks_of_other_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4-D attention masks.*\(3, 6\)"):
        real_tokens(torch.ones(B, T), T)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_added_gates_keep_the_mask(masked: bool, additive: bool) -> None:
    rows, gated = 5, 3
    query = torch.randn(B, 2, T, D, dtype=torch.float64)
    mask = None
    if masked:
        mask = F.pad(torch.ones(B, 1, T, T, dtype=torch.bool).tril(), (rows, 0), value=True)
        if additive:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    gates = torch.randn(B, T, gated, dtype=torch.float64)
    got = add_gates(mask, gates, query, rows + T)
    rest = got[..., gated:]
    if mask is None:
        assert (rest == 0).all()
    else:
        open_ = mask if not additive else mask == 0
        assert torch.equal(rest == 0, open_[..., gated:].expand_as(rest))
    assert torch.equal(got[:, 0, :, :gated], gates)


def _rows(batch: int, value_batch: int, experts: int, shared: int, slots: int) -> Rows:
    def pair(count: int) -> tuple[Tensor, Tensor]:
        key = torch.randn(batch, 2, count * slots, D, dtype=torch.float64)
        return key, torch.randn(value_batch, 2, count * slots, D + 2, dtype=torch.float64)

    return Rows(*pair(shared), Experts(*pair(experts), slots))


@pytest.mark.parametrize("shared", [0, 2], ids=["no_shared_expert", "shared_expert"])
@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("key_batch, value_batch", [(1, 1), (B, 1), (B, B)])
def test_gathered_columns_equal_slots_attended_apart(
    active: int, key_batch: int, value_batch: int, shared: int
) -> None:
    experts, slots = 4, 3
    rows = _rows(key_batch, value_batch, experts, shared, slots)
    choice = Chosen(*best_gates(torch.randn(B, 1, experts, dtype=torch.float64), active, False), experts)
    query = torch.randn(B, 2, 1, D, dtype=torch.float64)
    text = torch.randn(B, 2, T, D, dtype=torch.float64), torch.randn(B, 2, T, D + 2, dtype=torch.float64)

    def attend(columns: Columns) -> Tensor:
        joined = join_rows(columns, query, *text, None, None)
        output = F.scaled_dot_product_attention(
            joined.query, joined.key, joined.value, joined.mask, scale=joined.scaling
        )
        return joined.finish(output.transpose(1, 2))

    apart = columns_of(rows, choice)
    assert len(apart.chosen) == 1 and apart.rows == shared * slots
    with torch.no_grad():
        gathered = columns_of(rows, choice)
    assert not gathered.chosen and gathered.rows == (active + shared) * slots
    torch.testing.assert_close(attend(gathered), attend(apart), rtol=0, atol=1e-13)
    assert rows.experts is not None
    rows.experts.table = decoding_table(rows.experts)
    with torch.no_grad():
        assert torch.equal(attend(columns_of(rows, choice)), attend(gathered))


def test_merged_columns_keep_their_gates_apart() -> None:
    def part(gated: int, always: int) -> Columns:
        def slots(count: int, gates: Tensor | None) -> Slots:
            return Slots(torch.randn(1, 2, count, D), torch.randn(1, 2, count, D), gates)

        found = [slots(gated, torch.randn(B, T, gated))] if gated else []
        return Columns([*found, slots(always, None)])

    parts = [part(2, 1), part(0, 2), part(3, 1)]
    gates = gates_of(merge_columns(parts).slots)
    assert gates is not None and gates.shape == (B, T, 9) and merge_columns(parts).number == 9
    assert torch.equal(gates[..., :2], parts[0].slots[0].gates)
    assert torch.equal(gates[..., 5:8], parts[2].slots[0].gates)
    assert (gates[..., [2, 3, 4, 8]] == 0).all()
    assert merge_columns(parts[:1]) is parts[0]
    assert gates_of(merge_columns([parts[1], parts[1]]).slots) is None


# -- the config view --------------------------------------------------------------------------------------------------


def test_view_reads_and_writes_the_real_config() -> None:
    real = LlamaConfig(**SMALL, attn_implementation="eager")
    view: Any = ConfigView(real)
    assert view._attn_implementation == INTERFACE and real._attn_implementation == "eager"
    assert view.hidden_size == D and view.to_dict() == real.to_dict()
    view.hidden_size = 99
    assert real.hidden_size == 99 and vars(view) == {"real": real, "compared": False}
    real.rope_theta = 5.0
    assert view.rope_theta == 5.0
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = view.no_such_field
    assert not hasattr(view, "no_such_field") and getattr(view, "no_such_field", 3) == 3


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_view_is_copied(how: str) -> None:
    view: Any = ConfigView(LlamaConfig(**SMALL))
    twin: Any = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    }[how](view)
    assert type(twin) is ConfigView and twin is not view and twin.hidden_size == D
    assert (twin.real is view.real) == (how == "copy")


def test_one_view_stays_when_two_adapters_come() -> None:
    base = BertModel(BertConfig(**SMALL))
    model = get_peft_model(base, MEPTConfig(), adapter_name="one")
    model.add_adapter("two", MEPTConfig())
    for layer in prompt_layers(model):
        assert type(layer.site.attention.config) is ConfigView
        assert layer.site.attention.config.real is base.config


def test_kernel_chosen_after_attaching_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="sdpa")).double().eval()
    model = get_peft_model(base, MEPTConfig(num_virtual_tokens=3)).eval()
    calls: list[int] = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        by_sdpa = model(input_ids=ids).logits
        assert len(calls) == 2
        base.set_attn_implementation("eager")
        output = model(input_ids=ids, output_attentions=True)
    assert len(calls) == 2
    torch.testing.assert_close(output.logits, by_sdpa, rtol=0, atol=1e-6)
    # The weights that a caller reads have a column for each token and none for prompts.
    assert output.attentions[0].shape == (1, 2, 4, 4)
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, by_sdpa)


def test_kernel_that_is_not_supported_is_refused_in_the_forward_too() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model = get_peft_model(base, MEPTConfig()).eval()
    base.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("slots", [1, 9], ids=["few_rows", "many_rows"])
def test_causal_kernels_stay_without_a_mask(
    slots: int, routing: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask would cost the causal kernel, and copies of grouped keys; for more rows than tokens it costs less."""
    config = LlamaConfig(**SMALL | {"num_attention_heads": 4}, num_key_value_heads=2, attn_implementation="sdpa")
    base = LlamaForCausalLM(config).double()
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": slots, "routing": routing, "num_experts": 3, "init_weights": False}
    model = get_peft_model(base, MEPTConfig(**settings)).double().train(training)
    calls: list[tuple[bool, bool, bool]] = []
    plain = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs["attn_mask"] is None, kwargs["is_causal"], kwargs.get("enable_gqa", False)))
        return plain(*args, **kwargs)

    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 2, 11, 4, 5]])
    with monkeypatch.context() as patch, torch.set_grad_enabled(training):
        patch.setattr(F, "scaled_dot_product_attention", spy)
        by_sdpa = model(input_ids=ids, labels=ids.masked_fill(ids < 4, -100)).logits
    fast = slots == 1
    assert calls == [(fast, fast, fast)] * 2
    base.set_attn_implementation("eager")
    with torch.set_grad_enabled(training):
        by_eager = model(input_ids=ids, labels=ids.masked_fill(ids < 4, -100)).logits
    # transformers' eager kernel takes its softmax in float32
    torch.testing.assert_close(by_sdpa, by_eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("routing", ["sample", "token"])
def test_rows_leave_the_kernel_on_the_base_models_path(
    routing: str, padded: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask where there was none, no mask that trains, grouped heads repeated only where the base model does."""
    config = LlamaConfig(**SMALL | {"num_attention_heads": 4}, num_key_value_heads=2, attn_implementation="sdpa")
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 2, 11, 4, 5]])
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids < 4, -100)}
    if padded:
        inputs["attention_mask"] = torch.tensor(PADDING["right"][:2])
    plain = F.scaled_dot_product_attention

    def calls(model: Any) -> list[tuple[bool, bool, bool, int]]:
        found = []

        def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            mask = kwargs["attn_mask"]
            assert mask is None or not mask.requires_grad
            found.append((mask is None, kwargs["is_causal"], kwargs.get("enable_gqa", False), key.shape[1]))
            return plain(query, key, *args, **kwargs)

        with monkeypatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(F, "scaled_dot_product_attention", spy)
            model.train(training)(**inputs)
        return found

    expected = calls(base)
    settings = {"num_virtual_tokens": 2, "routing": routing, "num_experts": 3, "init_weights": False}
    assert calls(get_peft_model(base, MEPTConfig(**settings))) == expected
    assert expected == [(not padded, not padded, not padded, 4 if padded else 2)] * 2
