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
from peft_promptmoe.engine.columns import (
    CLOSED,
    Columns,
    add_gates,
    expert_table,
    fold_gates,
    gates_by_row,
    merge_columns,
    open_columns,
    owner_of,
)
from peft_promptmoe.engine.model_hooks import prompt_layers
from peft_promptmoe.engine.transformers_attention import INTERFACE, ConfigView
from peft_promptmoe.models.call_arguments import first_real, real_tokens
from peft_promptmoe.routing.record import Chosen
from peft_promptmoe.routing.router import best_gates, top_k_log_gates

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


def _by_row(log_gates: Tensor, scene: dict[str, Any]) -> Tensor:
    rows = scene["key"][:, :, : len(scene["owner"])]
    return gates_by_row(Columns(rows, rows, log_gates, scene["owner"]))


def _scene(gates: int = 4, slots: int = 3, shared: int = 3, heads: int = 2, active: int = 2) -> dict[str, Any]:
    rows = gates * slots + shared
    owner = torch.arange(rows) // slots
    return {
        "query": torch.randn(B, heads, T, D, dtype=torch.float64, requires_grad=True),
        "key": torch.randn(B, heads, rows + T, D, dtype=torch.float64, requires_grad=True),
        "value": torch.randn(B, heads, rows + T, D, dtype=torch.float64, requires_grad=True),
        "logits": torch.randn(B, T, gates, dtype=torch.float64, requires_grad=True),
        "owner": torch.where(owner < gates, owner, -1),
        "active": active,
        "rows": rows,
    }


def _by_loops(scene: dict[str, Any], open_: Tensor, scaling: float) -> Tensor:
    """Attention in which slot p of expert e gets log g[t, e], written per query and column."""
    query, key, value, owner = scene["query"], scene["key"], scene["value"], scene["owner"]
    log_gates = top_k_log_gates(scene["logits"], scene["active"], False)[0]
    output = torch.zeros_like(query)
    for b in range(B):
        for h in range(query.shape[1]):
            for t in range(T):
                scores, values = [], []
                for column in range(key.shape[2]):
                    score = query[b, h, t] @ key[b, h, column] * scaling
                    if column < scene["rows"]:
                        gate = int(owner[column])
                        if gate >= 0:
                            if log_gates[b, t, gate] == -torch.inf:
                                continue
                            score = score + log_gates[b, t, gate]
                    elif not open_[b, t, column - scene["rows"]]:
                        continue
                    scores.append(score)
                    values.append(value[b, h, column])
                output[b, h, t] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return output


@pytest.mark.parametrize("scaling", [D**-0.5, 1.0, 0.02])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "causal"])
def test_folded_and_added_gates_equal_the_equation(masked: bool, scaling: float) -> None:
    scene = _scene()
    open_ = torch.ones(B, T, T, dtype=torch.bool)
    open_ = open_.tril() if masked else open_
    leaves = [scene[name] for name in ("query", "key", "value", "logits")]
    expected = _by_loops(scene, open_, scaling)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)

    mask = F.pad(open_[:, None], (scene["rows"], 0), value=True) if masked else None
    for way in ("fold", "add"):
        log_gates = top_k_log_gates(scene["logits"], scene["active"], False)[0]
        query, key, value, with_gates = scene["query"], scene["key"], scene["value"], mask
        if way == "fold":
            query, key, value = fold_gates(query, key, value, log_gates, scene["owner"], scaling)
            assert query.shape[-1] % 8 == 0
        else:
            with_gates = add_gates(mask, _by_row(log_gates, scene), query, key)
            assert with_gates.shape == (B, 1, T, scene["rows"] + T)
        output = F.scaled_dot_product_attention(query, key, value, with_gates, scale=scaling)[..., :D]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        got = torch.autograd.grad((output * weight).sum(), leaves)
        for gradient, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_closed_gate_is_closed_in_every_dtype(dtype: torch.dtype) -> None:
    """exp(CLOSED * scale) must vanish, and CLOSED itself be representable."""
    query, key, value = (torch.randn(1, 1, 2, 8, dtype=dtype) for _ in range(3))
    log_gates = torch.tensor([[[0.0, -torch.inf]]], dtype=dtype).expand(1, 2, 2)
    query, key, value = fold_gates(query, key, value, log_gates, torch.tensor([0, 1]), 8**-0.5)
    assert torch.isfinite(query).all() and query.min() >= CLOSED
    weights = torch.softmax((query @ key.transpose(-1, -2)).float() * 8**-0.5, dim=-1)
    assert weights[..., 1].max() == 0.0


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_added_gates_keep_the_mask(masked: bool, additive: bool) -> None:
    scene = _scene(active=1)
    mask = None
    if masked:
        mask = F.pad(torch.ones(B, 1, T, T, dtype=torch.bool).tril(), (scene["rows"], 0), value=True)
        if additive:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    log_gates = top_k_log_gates(scene["logits"], 1, False)[0]
    got = add_gates(mask, _by_row(log_gates, scene), scene["query"], scene["key"])
    shared_and_text = got[..., 12:]
    if mask is None:
        assert (shared_and_text == 0).all()
    else:
        open_ = mask if not additive else mask == 0
        assert torch.equal(shared_and_text == 0, open_[..., 12:].expand_as(shared_and_text))
    assert torch.equal(got[:, 0, :, :12], log_gates.repeat_interleave(3, dim=-1))


@pytest.mark.parametrize("shared", [0, 2], ids=["no_shared_expert", "shared_expert"])
@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("key_batch, value_batch", [(1, 1), (B, 1), (B, B)])
def test_gathered_columns_equal_all_columns(active: int, key_batch: int, value_batch: int, shared: int) -> None:
    gates, slots, heads = 4, 3, 2
    count = (gates + shared) * slots
    rows = Columns(
        torch.randn(key_batch, heads, count, D, dtype=torch.float64),
        torch.randn(value_batch, heads, count, D + 2, dtype=torch.float64),
    )
    logits = torch.randn(B, 1, gates, dtype=torch.float64)
    chosen = Chosen(*best_gates(logits, active, False), gates)
    opened = open_columns(rows, chosen, slots)
    assert opened.key.shape[2] == opened.value.shape[2] == (active + shared) * slots
    query = torch.randn(B, heads, 1, D, dtype=torch.float64)

    def attend(columns: Columns) -> Tensor:
        key, value = columns.key.expand(B, -1, -1, -1), columns.value.expand(B, -1, -1, -1)
        mask = add_gates(None, gates_by_row(columns), query, key)
        return F.scaled_dot_product_attention(query, key, value, mask)

    dense = open_columns(rows, top_k_log_gates(logits, active, False)[0], slots)
    assert dense.key is rows.key
    torch.testing.assert_close(attend(opened), attend(dense), rtol=0, atol=1e-13)
    kept = Columns(rows.key, rows.value, table=expert_table(rows, slots))
    assert torch.equal(attend(open_columns(kept, chosen, slots)), attend(opened))


def test_rows_answer_to_gates_in_order() -> None:
    rows = Columns(torch.randn(1, 2, 14, D), torch.randn(1, 2, 14, D))
    opened = open_columns(rows, top_k_log_gates(torch.randn(B, 2, 4), 1, False)[0], 3)
    owner = owner_of(opened)
    assert owner.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [-1] * 2
    named = Columns(rows.key, rows.value, opened.log_gates, owner)
    assert (
        torch.equal(gates_by_row(opened), gates_by_row(named)[..., :12]) and (gates_by_row(named)[..., 12:] == 0).all()
    )


def test_merged_columns_keep_their_gates_apart() -> None:
    def part(batch: int, rows: int, gates: int | None) -> Columns:
        columns = Columns(torch.randn(batch, 2, rows, D), torch.randn(batch, 2, rows, D))
        if gates is not None:
            columns.log_gates = torch.randn(B, T, gates)
            columns.owner = torch.tensor([*range(gates), *[-1] * (rows - gates)])
        return columns

    parts = [part(1, 3, 2), part(B, 2, None), part(1, 4, 3)]
    merged = merge_columns(parts)
    assert merged.key.shape == (B, 2, 9, D)
    assert merged.owner.tolist() == [0, 1, -1, -1, -1, 2, 3, 4, -1]
    assert torch.equal(merged.log_gates, torch.cat([parts[0].log_gates, parts[2].log_gates], -1))
    assert merge_columns(parts[:1]) is parts[0]
    assert merge_columns([part(1, 2, None), part(1, 2, None)]).log_gates is None


# -- the config view --------------------------------------------------------------------------------------------------


def test_view_reads_and_writes_the_real_config() -> None:
    real = LlamaConfig(**SMALL, attn_implementation="eager")
    view: Any = ConfigView(real)
    assert view._attn_implementation == INTERFACE and real._attn_implementation == "eager"
    assert view.hidden_size == D and view.to_dict() == real.to_dict()
    view.hidden_size = 99
    assert real.hidden_size == 99 and vars(view) == {"real": real}
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
