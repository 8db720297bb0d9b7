# SPDX-License-Identifier: Apache-2.0
"""Prompts inside attention equal prompts put in front of a block and dropped behind it, in float64.

The reference knows nothing of attention: it runs the stock blocks on longer inputs, with rows that loops have made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL_KERNELS, Case, assert_different, each_case, logits, one_per_architecture, prompted_base
from naive_blocks import rows_through_blocks
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft asks transformers by an old name
    pytest.mark.filterwarnings("ignore:.*reads the whole input"),
]
STATIC: dict[str, dict[str, Any]] = {
    "mept": {"routing": "sample", "num_experts": 1, "top_k": 1, "num_shared_experts": 0},
    "vapt": {"num_static_layers": "all"},
}
NORM_EPS = 1e-6


def compare(case: Case, settings: dict[str, Any], rows_of: Callable[[Any, Tensor | None], Any]) -> None:
    """Logits with prompts in attention, and with the rows of each layer put through its block."""
    alone = {"decoder_sees_prompts": False} if case.task_type == "SEQ_2_SEQ_LM" else {}
    model = case.model(base=case.base().double(), init_weights=False, **settings | alone)
    layers = list(prompted_base(model).values())
    sites = [layer.site for layer in layers]
    count = model.peft_config["default"].num_virtual_tokens
    batch = {name: value.double() if value.is_floating_point() else value for name, value in case.batch().items()}
    batch = case.prompt_only(batch) | ({"labels": batch["labels"]} if case.task_type == "SEQ_2_SEQ_LM" else {})
    mask = batch.get("attention_mask")
    with torch.no_grad():
        got = logits(model, batch)
        with model.disable_adapter():
            plain = logits(model, batch)
            rows = [rows_of(layer, mask) for layer in layers]
            with rows_through_blocks(model, sites, rows, count):
                expected = logits(model, batch)
    if mask is not None and case.task_type not in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        got, expected, plain = (values[mask.bool()] for values in (got, expected, plain))
    assert_different(expected, plain, "logits with and without prompts", at_least=0.01)
    tolerance = case.architecture.tolerance
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def static_rows(layer: nn.Module, mask: Tensor | None) -> Tensor:
    if hasattr(layer, "mept_prompts"):
        return layer.mept_prompts["default"].weight[0] * layer.prompt_config["default"].prompt_scale
    return layer.vapt_prompts["default"].weight


def routed_rows(layer: Any, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The published router, sample by sample and number by number."""
    config = layer.prompt_config["default"]
    experts = layer.mept_prompts["default"].weight * config.prompt_scale
    shared = layer.mept_shared_prompts["default"].weight * config.prompt_scale
    router = layer.mept_router["default"].weight

    def rows(x: Tensor) -> Tensor:
        made = []
        for number, sample in enumerate(x):
            tokens = [t for t in range(len(sample)) if mask is None or mask[number, t]]
            pooled = torch.zeros_like(sample[0])
            for t in tokens:
                mean_square = sum(float(value) ** 2 for value in sample[t]) / len(sample[t])
                pooled = pooled + sample[t] / (mean_square + NORM_EPS) ** 0.5 / len(tokens)
            scores = [sum(float(a) * float(b) for a, b in zip(row, pooled, strict=True)) for row in router]
            chances = [2.718281828459045**score for score in scores]
            best = sorted(range(len(scores)), key=lambda e: -scores[e])[: config.top_k]
            made.append(shared.sum(0) + sum(chances[e] / sum(chances) * experts[e] for e in best))
        return torch.stack(made)

    return rows


@each_case(lambda case: case.method.joins_attention and one_per_architecture(case), kernels=ALL_KERNELS)
def test_static_rows_equal_rows_through_the_block(case: Case) -> None:
    compare(case, STATIC[case.method_name], static_rows)


@each_case(lambda case: case.variant_name == "sample")
def test_routed_rows_equal_a_loop_through_the_block(case: Case) -> None:
    compare(case, {}, routed_rows)


@each_case(lambda case: case.variant_name == "token" and case.is_causal_lm)
def test_token_routed_rows_equal_all_experts_rows_under_a_gated_mask(case: Case) -> None:
    """The rows of all experts in front of every block, and on their columns each token's own log-gates."""
    model = case.model(base=case.base().double(), init_weights=False, num_experts=3, top_k=2)
    layers = list(prompted_base(model).values())
    config = model.peft_config["default"]
    slots, experts = config.num_virtual_tokens, config.num_experts
    batch = case.prompt_only(case.batch())
    both = [(layer.mept_prompts["default"].weight, layer.mept_shared_prompts["default"].weight) for layer in layers]
    rows = [torch.cat(tables).flatten(0, 1).detach() * config.prompt_scale for tables in both]

    def gates_of(layer: Any) -> Callable[[Tensor], Tensor]:
        router = layer.mept_router["default"].weight.detach()

        def gates(x: Tensor) -> Tensor:
            made = torch.zeros(*x.shape[:2], len(rows[0]), dtype=x.dtype)
            for sample, t in [(s, t) for s in range(x.shape[0]) for t in range(x.shape[1])]:
                token = x[sample, t]
                token = token / (token.square().mean() + NORM_EPS).sqrt()
                chances = torch.log_softmax(router @ token, dim=0)
                chosen = chances.topk(config.top_k).indices.tolist()
                for e in range(experts):
                    gate = chances[e] if e in chosen else torch.finfo(x.dtype).min / 4
                    made[sample, t, e * slots : (e + 1) * slots] = gate
            return made

        return gates

    sites, gated = [layer.site for layer in layers], [gates_of(layer) for layer in layers]
    with torch.no_grad():
        got = logits(model, batch)
        with model.disable_adapter():
            plain = logits(model, batch)
            with rows_through_blocks(model, sites, rows, len(rows[0]), slots=slots, gates=gated):
                expected = logits(model, batch)
    mask = batch.get("attention_mask")
    if mask is not None:
        got, expected, plain = (values[mask.bool()] for values in (got, expected, plain))
    assert_different(expected, plain, "logits with and without prompts", at_least=0.01)
    tolerance = max(case.architecture.tolerance, 1e-10)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
