# SPDX-License-Identifier: Apache-2.0
"""Chosen experts attended apart equal attention over all columns at once, whatever falls on which expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_promptmoe.engine.blocks import block_size, in_blocks
from peft_promptmoe.engine.chosen import HALVES, LEAST, attend_chosen
from peft_promptmoe.engine.chosen_slots import ChosenSlots, Turn
from peft_promptmoe.engine.columns import Columns, Slots, join_rows, merge_columns

DOUBLE = torch.float64


@dataclass(frozen=True)
class Scene:
    """One attention call: sizes, what falls on which expert, and what else there is."""

    batch: int = 2
    tokens: int = 5
    heads: int = 2
    each: int = 1
    width: int = 4
    value_width: int = 4
    experts: int = 3
    slots: int = 2
    active: int = 1
    shared: int = 2
    adapters: int = 1
    own_keys: bool = False
    mask: str = "none"
    skew: str = "spread"
    bias: bool = False
    cap: float | None = None
    turned: bool = False
    seed: int = 0


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    experts = draw(st.integers(1, 9))
    mask = draw(st.sampled_from(["none", "causal", "padding", "additive", "heads"]))
    cap = None if mask == "causal" else draw(st.sampled_from([None, 3.0]))
    return Scene(
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from([1, 2, 5, 9, 40])),
        heads=draw(st.integers(1, 2)),
        each=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([2, 4, 10])),
        value_width=draw(st.sampled_from([2, 4, 12])),
        experts=experts,
        slots=draw(st.integers(1, 4)),
        active=draw(st.integers(1, min(3, experts))),
        shared=draw(st.integers(0, 3)),
        adapters=draw(st.integers(1, 2)),
        own_keys=draw(st.booleans()),
        mask=mask,
        skew=draw(st.sampled_from(["spread", "all_on_one", "two_of_many"])),
        bias=draw(st.booleans()),
        cap=cap,
        turned=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Call:
    """Tensors of a scene, the equation, and what the package makes of them."""

    def __init__(self, scene: Scene, dtype: torch.dtype = DOUBLE, device: str = "cpu") -> None:
        self.scene, self.leaves, self.scale = scene, [], 0.3
        self.generator = torch.Generator().manual_seed(scene.seed)
        self.dtype, self.device = dtype, device
        s = scene
        self.query = self.leaf(s.batch, s.heads * s.each, s.tokens, s.width)
        self.key = self.leaf(s.batch, s.heads, s.tokens, s.width)
        self.value = self.leaf(s.batch, s.heads, s.tokens, s.value_width)
        self.parts = [self.part() for _ in range(s.adapters)]
        self.mask = self.make_mask()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=DOUBLE).to(self.dtype).to(self.device)

    def leaf(self, *shape: int) -> Tensor:
        self.leaves.append(self.random(*shape).requires_grad_())
        return self.leaves[-1]

    def part(self) -> Columns:
        s = self.scene
        rows = self.scene.experts * s.slots
        batch = s.batch if s.own_keys else 1
        key, value = self.leaf(batch, s.heads, rows, s.width), self.leaf(1, s.heads, rows, s.value_width)
        logits = 3 * self.random(s.batch, s.tokens, s.experts)
        if s.skew == "all_on_one":
            logits[..., s.experts // 2] += 50
        elif s.skew == "two_of_many":
            logits[..., 2:] -= 50
        log_gates, experts = torch.log_softmax(logits, -1).topk(s.active, -1)
        self.leaves.append(log_gates.detach().requires_grad_())
        bias = self.leaf(1, s.heads * s.each, s.tokens, s.slots) if s.bias else None
        chosen = ChosenSlots(key, value, self.leaves[-1 - s.bias], experts, s.slots, bias)
        if s.turned:
            angle = self.random(s.batch, 1, s.width // 2).repeat(1, 1, 2)
            chosen.turn = Turn(angle.cos(), angle.sin(), rotate)
        open_key = self.leaf(1, s.heads, s.shared, s.width)
        open_value = self.leaf(1, s.heads, s.shared, s.value_width)
        return Columns([Slots(open_key, open_value)], [chosen])

    def make_mask(self) -> Tensor | None:
        s = self.scene
        if s.mask in ("none", "causal"):
            return None
        heads = s.heads * s.each if s.mask == "heads" else 1
        open_ = torch.rand(s.batch, heads, s.tokens, s.tokens, generator=self.generator) < 0.6
        if s.mask == "padding":
            return open_.to(self.device)
        additive = torch.randn(open_.shape, generator=self.generator, dtype=DOUBLE).masked_fill(~open_, -1e9)
        return additive.to(self.dtype).to(self.device)

    # -- the equation -------------------------------------------------------------------------------------------------

    def scores(self, key: Tensor, query: Tensor | None = None) -> Tensor:
        query = self.query if query is None else query
        key = key.expand(self.scene.batch, -1, -1, -1).repeat_interleave(self.scene.each, 1)
        found = self.scale * query @ key.transpose(2, 3)
        return found if self.scene.cap is None else self.scene.cap * torch.tanh(found / self.scene.cap)

    def dense(self) -> Tensor:
        """(B, T, Hq, v) by one softmax over all slots, those of experts not chosen at minus infinity, and the rest."""
        s, scores, values = self.scene, [], []
        for part in self.parts:
            (chosen,) = part.chosen
            query = self.query if chosen.turn is None else by_matrix(self.query, chosen.turn)
            gates = torch.full((s.batch, s.tokens, s.experts), -torch.inf, dtype=self.dtype)
            gates = gates.scatter(-1, chosen.experts, chosen.log_gates).repeat_interleave(s.slots, -1)[:, None]
            bias = 0.0 if chosen.bias is None else chosen.bias.repeat(1, 1, 1, s.experts)
            (always,) = part.slots
            scores += [self.scores(chosen.key, query) + bias + gates, self.scores(always.key)]
            values += [chosen.value, always.value]
        text = self.scores(self.key)
        if s.mask == "causal":
            text = text.masked_fill(torch.ones(s.tokens, s.tokens).triu(1).bool(), -torch.inf)
        elif self.mask is not None:
            text = text.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else text + self.mask
        weights = torch.cat([*scores, text], dim=-1).softmax(-1)
        all_values = torch.cat([value.expand(s.batch, -1, -1, -1) for value in [*values, self.value]], dim=2)
        return (weights @ all_values.repeat_interleave(s.each, 1)).transpose(1, 2)

    # -- the package --------------------------------------------------------------------------------------------------

    def apart(self) -> Tensor:
        """(B, T, Hq, v) by one column, through sdpa or, where scores are capped, by hand as transformers does it."""
        s, columns = self.scene, merge_columns(self.parts)
        causal = s.mask == "causal"
        lead = columns.number if causal else 0
        joined = join_rows(columns, self.query, self.key, self.value, self.mask, self.scale, lead, s.cap)
        assert (
            joined.key.shape[2] == columns.number + s.tokens == len(columns.chosen) + s.adapters * s.shared + s.tokens
        )
        assert joined.key.shape[3] == joined.value.shape[3] == joined.query.shape[3]
        if s.cap is None:
            found = F.scaled_dot_product_attention(
                joined.query, joined.key, joined.value, joined.mask, is_causal=causal, scale=joined.scaling,
                enable_gqa=s.each > 1,
            )  # fmt: skip
        else:
            key, value = (rows.repeat_interleave(s.each, 1) for rows in (joined.key, joined.value))
            weights = s.cap * torch.tanh(joined.query @ key.transpose(2, 3) * joined.scaling / s.cap)
            assert joined.mask is not None
            found = (weights + joined.mask).softmax(-1) @ value
        return joined.finish(found.transpose(1, 2))


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' Llama turns queries and keys."""

    def half(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([-other, one], -1)

    cos, sin = cos[:, None], sin[:, None]
    return query * cos + half(query) * sin, key * cos + half(key) * sin


def by_matrix(rows: Tensor, turn: Turn) -> Tensor:
    """Rows turned back, each pair of features by a matrix."""
    width = rows.shape[-1] // 2
    turned = torch.zeros_like(rows)
    for b in range(len(rows)):
        for i in range(width):
            cos, sin = turn.cos[b, 0, i], turn.sin[b, 0, i]
            one, other = rows[b, ..., i], rows[b, ..., i + width]
            turned[b, ..., i], turned[b, ..., i + width] = cos * one + sin * other, cos * other - sin * one
    return turned


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(scenes())
@example(Scene(tokens=1, batch=1, experts=1, slots=1, shared=0))
@example(Scene(tokens=40, experts=7, active=3, each=3, own_keys=True, mask="causal", adapters=2, turned=True))
@example(Scene(tokens=9, experts=5, skew="all_on_one", mask="heads", cap=3.0, bias=True, active=2))
def test_apart_equals_all_columns_at_once(scene: Scene) -> None:
    call = Call(scene)
    expected, found = call.dense(), call.apart()
    same(found, expected)
    weight = call.random(*expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), call.leaves, allow_unused=True)
    got = torch.autograd.grad((found * weight).sum(), call.leaves, allow_unused=True)
    for gradient, reference, leaf in zip(got, wanted, call.leaves, strict=True):
        if leaf.numel():
            same(gradient, reference)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=70), st.integers(13, 40))
def test_every_choice_has_a_row_of_its_own_beside_its_expert(experts: list[int], groups: int) -> None:
    group = torch.tensor(experts)
    order = in_blocks(group, groups)
    size = block_size(len(experts), groups)
    assert len(order.source) == size * len(order.group)
    assert order.place.unique().numel() == len(experts)
    assert torch.equal(order.group[order.place // size], group)
    assert torch.equal(order.source[order.place], torch.arange(len(experts)))
    assert (order.source >= 0).sum() == len(experts)


def test_what_fills_blocks_up_is_half_of_the_work_at_most() -> None:
    for choices in (1024, 8192, 65_536):
        for groups in (4, 16, 64, 256):
            rows = len(in_blocks(torch.arange(choices) % groups, groups).source)
            assert rows <= 1.5 * choices or block_size(choices, groups) == 4


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_keep_more_than_half_precision_in_the_query(dtype: torch.dtype) -> None:
    call = Call(Scene(tokens=40, width=8, value_width=8), dtype)
    apart = attend_chosen(call.query, call.value, call.parts[0].chosen, call.scale)
    features = apart.query[..., 8 : 8 + HALVES].double().sum(-1).transpose(1, 2) * call.scale
    assert apart.score.dtype == torch.float32
    torch.testing.assert_close(features, apart.score[0].double(), rtol=2**-14, atol=1e-6)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_chosen_experts_that_weigh_nothing_leave_all_finite(dtype: torch.dtype, shared: int) -> None:
    """Gates of e^-1e5, in rows that see no text, too."""
    call = Call(Scene(shared=shared, mask="padding"), dtype)
    chosen = call.parts[0].chosen[0]
    chosen.log_gates = (chosen.log_gates.detach() - 1e5).float().requires_grad_()
    call.mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    call.mask[1] = False
    found = call.apart()
    found.float().square().sum().backward()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in call.leaves if leaf.grad is not None)
    apart = attend_chosen(call.query, call.value, [chosen], call.scale)
    assert torch.isfinite(apart.query).all() and apart.query[..., 4].max() == LEAST
    if shared:  # where there is anything else, their share is zero
        assert math.exp(LEAST * call.scale) == 0.0
        weighed = Call(Scene(shared=shared, mask="padding"), dtype)
        weighed.parts[0].chosen = []
        weighed.mask = call.mask
        torch.testing.assert_close(found[0], weighed.apart()[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kernel", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_scores_in_float32(kernel: torch.dtype) -> None:
    call = Call(Scene(tokens=9, experts=4, width=8, value_width=8), torch.float32)
    expected = call.dense()
    with torch.autocast("cpu", kernel):
        found = call.apart()
    assert found.dtype == kernel
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-2)
    found.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and torch.isfinite(leaf.grad).all() for leaf in call.leaves)


# -- shapes that depend on nothing but sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_compiles_into_one_graph(mask: str) -> None:
    torch._dynamo.reset()
    scene = Scene(tokens=9, experts=4, each=2, active=2, mask=mask, turned=True, adapters=2)
    call = Call(scene)
    expected = call.apart()
    weight = call.random(*expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), call.leaves)
    compiled = torch.compile(call.apart, fullgraph=True, backend="aot_eager")
    found = compiled()
    same(found, expected)
    for gradient, reference in zip(torch.autograd.grad((found * weight).sum(), call.leaves), wanted, strict=True):
        same(gradient, reference)


def test_runs_without_values() -> None:
    """Nothing waits for a value: neither shapes nor branches depend on what falls on which expert."""
    call = Call(Scene(tokens=9, experts=4, active=2, own_keys=True), torch.float32, "meta")
    call.apart().sum().backward()
    assert call.query.grad is not None and call.query.grad.is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = Call(Scene(tokens=9, experts=4, active=2), torch.float32)
        call.apart().sum().backward()


def test_nothing_of_the_experts_is_kept_but_their_rows() -> None:
    """Bytes kept for the backward pass differ by rows of keys and values alone, and by a few numbers per block."""

    def kept(experts: int) -> dict[int, int]:
        call = Call(Scene(batch=4, tokens=64, width=16, value_width=16, experts=experts, slots=3), torch.float32)
        own = {leaf.untyped_storage()._cdata for leaf in call.leaves}
        seen: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            call.apart()
        return sum(storage.nbytes() for storage in seen.values())

    per_choice = 2 * 8  # where each lies, and the one that lies in each row, but for what fills blocks up
    assert abs(kept(64) - kept(4)) <= 4 * 64 * per_choice + 2 * 8 * 64
