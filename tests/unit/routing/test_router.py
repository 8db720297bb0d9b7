# SPDX-License-Identifier: Apache-2.0
"""Routing functions against references written with loops over plain numbers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_promptmoe.mept.center import MOMENTUM, RouterCenter
from peft_promptmoe.mept.layer import orthogonal_rows
from peft_promptmoe.routing.balance_loss import balance_loss
from peft_promptmoe.routing.router import (
    RMS_EPS,
    mix_experts,
    perturb,
    pooled_input,
    token_logits,
    top_k_log_gates,
    unit_rms,
)

B, T, D, E, P = 3, 5, 8, 6, 4
REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rms(values: list[float]) -> float:
    return 1.0 / math.sqrt(sum(v * v for v in values) / len(values) + RMS_EPS)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [part / sum(parts) for part in parts]


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def close(got: Tensor, expected: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


def test_unit_rms() -> None:
    x = normal(B, T, D)
    close(unit_rms(x), [[rms(x[b, t].tolist()) for t in range(T)] for b in range(B)])


@pytest.mark.parametrize("normalize", [True, False], ids=["rms", "raw"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all_real"])
def test_pooled_input(normalize: bool, masked: bool) -> None:
    x = normal(B, T, D) * 3
    expected = []
    for b in range(B):
        tokens = [t for t in range(T) if not masked or REAL[b, t]]
        total = [0.0] * D
        for t in tokens:
            scale = rms(x[b, t].tolist()) if normalize else 1.0
            total = [total[d] + float(x[b, t, d]) * scale for d in range(D)]
        expected.append([value / max(len(tokens), 1) for value in total])
    close(pooled_input(x, REAL if masked else None, normalize), expected)


def test_pooled_input_ignores_what_is_not_real() -> None:
    x = normal(B, T, D)
    spoilt = torch.where(REAL[..., None], x, torch.full_like(x, 1e6))
    assert torch.equal(pooled_input(x, REAL, True), pooled_input(spoilt, REAL, True))
    assert torch.equal(pooled_input(x, REAL, True)[2], torch.zeros(D, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_routers_compute_in_float32(dtype: torch.dtype) -> None:
    x = normal(B, T, D).to(dtype)
    assert pooled_input(x, REAL, True).dtype is torch.float32
    assert token_logits(x, normal(E, D).to(dtype), None, True).dtype is torch.float32


@pytest.mark.parametrize("normalize", [True, False], ids=["rms", "raw"])
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "plain"])
def test_token_logits(normalize: bool, centred: bool) -> None:
    x, weight, center = normal(B, T, D) * 3, normal(E, D), normal(D) if centred else None
    expected = torch.empty(B, T, E, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            scale = rms(x[b, t].tolist()) if normalize else 1.0
            for e in range(E):
                expected[b, t, e] = sum(
                    (float(x[b, t, d]) * scale - (float(center[d]) if center is not None else 0.0))
                    * float(weight[e, d])
                    for d in range(D)
                )
    close(token_logits(x, weight, center, normalize), expected)


@pytest.mark.parametrize("renormalize", [False, True], ids=["softmax", "renormalized"])
@pytest.mark.parametrize("k", range(1, E + 1))
def test_top_k_log_gates(k: int, renormalize: bool) -> None:
    logits = normal(B, T, E)
    log_gates, index = top_k_log_gates(logits, k, renormalize)
    assert index.shape == (B, T, k)
    for b in range(B):
        for t in range(T):
            probs = softmax(logits[b, t].tolist())
            chosen = best(probs, k)
            total = sum(probs[e] for e in chosen) if renormalize else 1.0
            assert index[b, t].tolist() == chosen
            close(log_gates[b, t].exp(), [probs[e] / total if e in chosen else 0.0 for e in range(E)])


def test_gates_of_closed_experts_have_no_gradient_but_the_softmax_has() -> None:
    logits = normal(1, E).requires_grad_()
    log_gates, index = top_k_log_gates(logits, 1, False)
    (gradient,) = torch.autograd.grad(log_gates.gather(-1, index).sum(), logits)
    probs = softmax(logits[0].tolist())
    expected = [(1.0 if e == int(index) else 0.0) - probs[e] for e in range(E)]
    close(gradient[0], expected)
    (dead,) = torch.autograd.grad(top_k_log_gates(logits, 1, True)[0].gather(-1, index).sum(), logits)
    close(dead[0], [0.0] * E)  # why renormalize_top_k with top_k=1 is refused


def test_mix_experts() -> None:
    experts, logits = normal(E, P, D), normal(B, E)
    log_gates, index = top_k_log_gates(logits, 3, False)
    expected = torch.zeros(B, P, D, dtype=torch.float64)
    for b in range(B):
        probs = softmax(logits[b].tolist())
        for e in best(probs, 3):
            expected[b] += probs[e] * experts[e]
    close(mix_experts(experts, log_gates, index), expected)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all_real"])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss(k: int, masked: bool) -> None:
    logits = normal(B, T, E)
    _, index = top_k_log_gates(logits, k, False)
    fraction, mean, count = [0.0] * E, [0.0] * E, 0
    for b in range(B):
        for t in range(T):
            if masked and not REAL[b, t]:
                continue
            count += 1
            probs = softmax(logits[b, t].tolist())
            for e in range(E):
                mean[e] += probs[e]
                fraction[e] += (e in best(probs, k)) / k
    expected = E * sum(fraction[e] / count * mean[e] / count for e in range(E))
    close(balance_loss(logits, index, REAL if masked else None), expected)


def test_balance_loss_is_one_when_even_and_e_when_all_go_to_one() -> None:
    even = torch.eye(E, dtype=torch.float64) * 1e-9
    assert balance_loss(even, top_k_log_gates(even, 1, False)[1], None).item() == pytest.approx(1.0)
    single = torch.zeros(7, E, dtype=torch.float64)
    single[:, 2] = 50.0
    assert balance_loss(single, top_k_log_gates(single, 1, False)[1], None).item() == pytest.approx(E)
    nobody = torch.zeros(7, dtype=torch.bool)
    assert balance_loss(single, top_k_log_gates(single, 1, False)[1], nobody).item() == 0.0


def test_perturb_statistics() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.float64).expand(200_000, 4).clone().requires_grad_()
    assert perturb(logits, 0.0, 0.0) is logits
    noisy = perturb(logits, 0.3, 0.0)
    torch.testing.assert_close(noisy.mean(0), logits[0], rtol=0, atol=0.01)
    torch.testing.assert_close(noisy.std(0), 0.3 * logits[0].abs(), rtol=0, atol=0.01)
    (gradient,) = torch.autograd.grad(noisy.sum(), logits)
    assert torch.equal(gradient, torch.ones_like(gradient))  # the noise's scale is no path
    dropped = perturb(logits, 0.0, 0.2)
    assert (dropped[:, 0] == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert set(dropped[:, 0].detach().tolist()) <= {0.0, 2.0 / 0.8}


def test_router_center_is_a_mean_first_and_a_running_mean_later() -> None:
    center = RouterCenter(D).double()
    seen = [normal(D) for _ in range(150)]
    expected = torch.zeros(D, dtype=torch.float64)
    for step, value in enumerate(seen, start=1):
        center.update(value[None], torch.ones(1, 1))
        momentum = max(1.0 / step, MOMENTUM)
        expected = expected + momentum * (value - expected)
        if step == 40:
            torch.testing.assert_close(center.weight, torch.stack(seen[:40]).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(center.weight, expected, rtol=0, atol=1e-6)
    assert int(center.steps) == 150


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_batch_that_did_not_last_is_noticed(loaded: bool) -> None:
    """FSDP2 lets a block write to a copy of the whole tensor, which it then puts away."""
    center, batch = RouterCenter(D), (normal(B, D).float(), torch.ones(B, 1))
    if loaded:
        center.load_state_dict({"weight": torch.ones(D), "steps": torch.tensor(50)})
    before = center.weight.detach().clone()
    center.update(*batch)
    center.weight.data.copy_(before)
    with pytest.raises(RuntimeError, match="set router_centering=False"):
        center.update(*batch)


def test_a_centre_that_is_loaded_again_is_not_taken_for_a_lost_one() -> None:
    center, state = RouterCenter(D), {"weight": torch.ones(D), "steps": torch.tensor(50)}
    for _ in range(2):
        center.load_state_dict(state)
        center.update(normal(B, D).float(), torch.ones(B, 1))
    assert int(center.steps) == 51


def test_a_router_center_without_its_steps_counts_as_one_of_many() -> None:
    center, value = RouterCenter(D), normal(D).float()
    with torch.no_grad():
        center.weight.copy_(normal(D))
    before = center.weight.clone()
    assert bool(center.is_known) and not bool(RouterCenter(D).is_known)
    center.update(value[None], torch.ones(1, 1))
    torch.testing.assert_close(center.weight, before + MOMENTUM * (value - before), rtol=0, atol=1e-3)
    assert not center.weight.requires_grad


def test_rows_that_do_not_count_are_not_in_a_router_center() -> None:
    center, values = RouterCenter(D), normal(3, D).float()
    mean = center.update(values, torch.tensor([[1.0], [0.0], [1.0]]))
    torch.testing.assert_close(mean, (values[0] + values[2]) / 2)
    torch.testing.assert_close(center(), mean)


def test_a_lost_router_center_is_noticed_at_the_second_step() -> None:
    center = RouterCenter(D)
    center.update(normal(2, D), torch.ones(2, 1))
    with torch.no_grad():
        center.weight.zero_()
    with pytest.raises(RuntimeError, match=r"FSDP and ZeRO-3.*router_centering=False"):
        center.update(normal(2, D), torch.ones(2, 1))


@pytest.mark.parametrize("rows", [1, D, D + 3, 3 * D])
def test_orthogonal_rows(rows: int) -> None:
    weight = orthogonal_rows(rows, D)
    assert weight.shape == (rows, D)
    for start in range(0, rows, D):
        group = weight[start : start + D]
        torch.testing.assert_close(group @ group.T, torch.eye(len(group)), rtol=0, atol=1e-5)
