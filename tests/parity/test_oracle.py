# SPDX-License-Identifier: Apache-2.0
"""The oracle checked against transformers and against itself, without the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import IGNORED, Batch, Mept, Oracle, transformers_in_float64
from tiny import FAMILIES, WIDTH, make_batch, make_model, read_positions
from torch import Tensor, nn

PADDINGS = ["none", "right", "left", "left_columns"]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with transformers_in_float64(rotary_table=False):  # as transformers has it
        yield


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


def attach(model: nn.Module, paths: list[str], mept: Mept, seed: int = 3) -> None:
    """The package's parameter names, without the package."""
    generator = torch.Generator().manual_seed(seed)
    n_slots = mept.num_virtual_tokens
    shapes: dict[str, tuple[int, ...]] = {"mept_prompts": (mept.num_experts, n_slots, WIDTH)}
    if mept.num_shared_experts:
        shapes["mept_shared_prompts"] = (mept.num_shared_experts, n_slots, WIDTH)
    if mept.num_experts > 1:
        shapes["mept_router"] = (mept.num_experts, WIDTH)
    for path in paths:
        child = nn.Module()
        for name, shape in shapes.items():
            holder = nn.Module()
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            holder.weight = nn.Parameter(0.3 * weight if name == "mept_router" else weight)
            child.add_module(name, nn.ModuleDict({mept.adapter: holder}))
        model.get_submodule(path).add_module("promptmoe", child)


def oracle_of(family_name: str, mept: Mept | None, batch: Batch, attn: str = "eager", seed: int = 0) -> Oracle:
    family = FAMILIES[family_name]
    model = make_model(family, attn, seed)
    plain = family.oracle(model, batch, None)
    if mept is None:
        return plain
    attach(model, [plain.attention_path(i) for i in range(len(plain.layers()))], mept)
    return family.oracle(model, batch, mept)


@pytest.mark.parametrize(("attn", "padding"), [*(("sdpa", padding) for padding in PADDINGS), ("eager", "right")])
@pytest.mark.parametrize("family_name", [name for name in FAMILIES if name != "t5_drops"])
def test_without_prompts_it_is_transformers(family_name: str, attn: str, padding: str) -> None:
    family = FAMILIES[family_name]
    batch = make_batch(family, padding)
    oracle = oracle_of(family_name, None, batch, attn)
    read = read_positions(family, batch)
    with torch.no_grad():
        ours, theirs = oracle.logits(), oracle.model(**batch.kwargs()).logits
    close(*((ours, theirs) if read is None else (ours[read], theirs[read])))


def prepend_through_transformers(oracle: Oracle, mept: Mept) -> Tensor:
    """Sample routing by running transformers' own blocks on [rows; text], routing written with batched tensors."""
    model, batch, n_slots = oracle.model, oracle.batch, mept.num_virtual_tokens
    real = batch.real.double()
    x = oracle.embed()
    n = n_slots + x.shape[1]
    allowed = torch.cat([torch.ones(len(real), n_slots), real], 1)[:, None, None].bool()
    pool = real
    if oracle.causal:
        allowed = allowed & torch.ones(n, n).tril().bool()
        if batch.labels is not None:
            answered = ((batch.labels != IGNORED) & (real > 0)).long().cumsum(1) > 0
            pool = real * ~answered
    positions = torch.cat([oracle.slot_positions(), oracle.position_ids], 1)
    for i, layer in enumerate(oracle.layers()):
        prompts = mept.prompt_scale * oracle.tensor(i, "mept_prompts")
        rows = prompts[0].expand(len(real), -1, -1)
        if mept.num_experts > 1:
            normed = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
            s = (normed * pool[..., None]).sum(1) / pool.sum(1, keepdim=True).clamp(min=1)
            v, r = (s @ oracle.tensor(i, "mept_router").T).softmax(-1).topk(mept.top_k)
            if mept.renormalize_top_k:
                v = v / v.sum(-1, keepdim=True)
            rows = (v[..., None, None] * prompts[r]).sum(1)
        if mept.num_shared_experts:
            rows = rows + mept.prompt_scale * oracle.tensor(i, "mept_shared_prompts").sum(0)
        stream = torch.cat([rows, x], 1)
        seen = allowed
        window = oracle.window(i)
        if window is not None:
            text = torch.arange(n)
            inside = (text[:, None] - text[None] < window) | (text[None] < n_slots)
            seen = seen & inside
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
        kind = type(layer).__name__
        extra: dict[str, Any] = {}
        if kind == "T5Block":
            first = oracle.layers()[0].layer[0].SelfAttention
            relative = positions[:, None] - positions[:, :, None]
            bucket = first._relative_position_bucket(
                relative,
                True,
                first.relative_attention_num_buckets,
                first.relative_attention_max_distance,
            )
            extra["position_bias"] = first.relative_attention_bias(bucket).permute(0, 3, 1, 2)
        elif kind == "Gemma3DecoderLayer":
            extra["position_embeddings"] = model.model.rotary_emb(stream, positions, model.config.layer_types[i])
        elif kind in ("LlamaDecoderLayer", "Qwen3DecoderLayer"):
            extra["position_embeddings"] = model.model.rotary_emb(stream, positions)
        out = layer(stream, attention_mask=mask, **extra)
        out = out[0] if isinstance(out, tuple) else out
        x = out if oracle.keeps_slots(i) else out[:, n_slots:]
    return x


@pytest.mark.parametrize(("padding", "renormalize"), [("none", False), ("right", True), ("left", False)])
@pytest.mark.parametrize("family_name", list(FAMILIES))
def test_sample_routing_is_prepend_and_drop(family_name: str, padding: str, renormalize: bool) -> None:
    family = FAMILIES[family_name]
    mept = Mept(
        4,
        2,
        1,
        routing="sample",
        prompt_scale=1.5,
        decoder_sees_prompts=family.decoder_sees_prompts,
        renormalize_top_k=renormalize,
    )
    batch = make_batch(family, padding)
    oracle = oracle_of(family_name, mept, batch, "sdpa")
    with torch.no_grad():
        ours, theirs = oracle.run_blocks(), prepend_through_transformers(oracle, mept)
    if ours.shape[1] == batch.real.shape[1]:
        ours, theirs = ours[batch.real.bool()], theirs[batch.real.bool()]
    close(ours, theirs, 1e-11)


@pytest.mark.parametrize("family_name", ["t5_sees", "bart"])
def test_seq2seq_slots_reach_the_decoder_as_transformers_would(family_name: str) -> None:
    family = FAMILIES[family_name]
    mept = Mept(3, 1, 1, routing="sample")
    batch = make_batch(family, "right")
    oracle = oracle_of(family_name, mept, batch, "sdpa")
    with torch.no_grad():
        memory = oracle.run_blocks()
        if family_name == "t5_sees":
            memory = oracle.model.encoder.final_layer_norm(memory)
        mask = torch.cat([torch.ones(len(memory), mept.num_virtual_tokens, dtype=torch.long), batch.real], 1)
        theirs = oracle.model(encoder_outputs=(memory,), attention_mask=mask, labels=batch.labels).logits
        close(oracle.logits(), theirs)


@pytest.mark.parametrize("padding", ["right", "left_columns"])
@pytest.mark.parametrize("family_name", [name for name in FAMILIES if name != "t5_sees"])
def test_one_expert_is_the_same_under_both_routings(family_name: str, padding: str) -> None:
    family = FAMILIES[family_name]
    batch = make_batch(family, padding)
    mept = Mept(1, 1, 0, routing="sample", decoder_sees_prompts=False)
    sample = oracle_of(family_name, mept, batch)
    token = family.oracle(sample.model, batch, dataclasses.replace(mept, routing="token"))
    base = family.oracle(sample.model, batch, None)
    read = batch.real.bool()
    with torch.no_grad():
        close(sample.run_blocks()[read], token.run_blocks()[read], 1e-11)
        assert (sample.logits() - base.logits()).abs().max() > 1e-2


@pytest.mark.parametrize("family_name", list(FAMILIES))
@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
def test_token_routing_is_one_masked_attention(family_name: str, renormalize: bool) -> None:
    """The same equation with batched tensors: all experts' columns, minus infinity where a query is not routed."""
    family = FAMILIES[family_name]
    batch = make_batch(family, "left")
    mept = Mept(4, 2, 2, routing="token", renormalize_top_k=renormalize, prompt_scale=0.8)
    oracle = oracle_of(family_name, mept, batch)
    n_text, n_slots = batch.real.shape[1], mept.num_virtual_tokens
    with torch.no_grad():
        x = oracle.embed()
        for i in range(len(oracle.layers())):
            expected = oracle.block(i, x, 0, oracle.token_slots(i, x))
            u = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) @ oracle.tensor(i, "mept_router").T
            kept, chosen = u.topk(mept.top_k)
            log_p = u - (kept if renormalize else u).logsumexp(-1, keepdim=True)
            gates = torch.full_like(u, -torch.inf).scatter(-1, chosen, log_p.gather(-1, chosen))
            gates = torch.cat([gates, torch.zeros(*u.shape[:2], mept.num_shared_experts)], -1)
            rows = torch.cat([oracle.tensor(i, "mept_prompts"), oracle.tensor(i, "mept_shared_prompts")])
            rows = mept.prompt_scale * rows.flatten(0, 1).expand(len(x), -1, -1)
            stream = torch.cat([rows, x], 1)
            positions = torch.cat([oracle.slot_positions().repeat(1, gates.shape[-1]), oracle.position_ids], 1)
            query, key, value = oracle.project(i, oracle.pre_norm(i, stream))
            query, key = oracle.rotate(i, query, positions), oracle.rotate(i, key, positions)
            seen = batch.real[:, None].bool().expand(-1, n_text, -1)
            if oracle.causal:
                distance = torch.arange(n_text)[:, None] - torch.arange(n_text)[None]
                seen = seen & (distance >= 0) & (distance < (oracle.window(i) or n_text))
            text = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
            mask = torch.cat([gates.repeat_interleave(n_slots, -1), text], -1)[:, None]
            if oracle.has_relative_bias:
                bias = [
                    torch.stack([oracle.relative_bias(p.tolist(), int(p[t])) for t in range(-n_text, 0)])
                    for p in positions
                ]
                mask = mask + torch.stack(bias).permute(0, 3, 1, 2)
            mixed = nn.functional.scaled_dot_product_attention(
                query[:, -n_text:].transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=mask,
                scale=oracle.scale(i),
                enable_gqa=True,
            )
            ours = oracle.after_attention(i, x, mixed.transpose(1, 2).flatten(2))
            close(expected, ours, 1e-11)
            x = expected


def test_query_is_the_leading_run_only() -> None:
    family = FAMILIES["gpt2"]
    labels = torch.tensor(
        [[IGNORED, IGNORED, 5, IGNORED, 6], [IGNORED, IGNORED, 7, 8, IGNORED], [5, IGNORED, 6, 7, 8]]
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = Batch(torch.full((3, 5), 4), mask, None, labels)
    oracle = oracle_of("gpt2", None, batch)
    assert [oracle.pooled_columns(b) for b in range(3)] == [[0, 1], [1], []]
    unlabelled = family.oracle(oracle.model, dataclasses.replace(batch, labels=None), None)
    assert unlabelled.pooled_columns(1) == [1, 2, 3, 4]
