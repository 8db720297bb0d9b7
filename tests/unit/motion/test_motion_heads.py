# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the heads against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_promptmoe.motion.depth_head import DepthHead
from peft_promptmoe.motion.flow_head import FlowHead, correlate, expected_flow, look_up
from peft_promptmoe.motion.layers import cell_grid, convex_upsample
from peft_promptmoe.motion.losses import depth_loss, flow_loss, valid_depth, valid_flow


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stride", [(3, 3), (2, 4)])
def test_convex_upsampling_is_a_weighted_mean_of_nine_cells(stride: tuple[int, int]) -> None:
    rows, columns = 3, 4
    coarse, logits = random(2, 2, rows, columns), random(2, 9 * stride[0] * stride[1], rows, columns, seed=1)
    found = convex_upsample(coarse, logits, stride)
    assert found.shape == (2, 2, rows * stride[0], columns * stride[1])
    for b, c, y, x in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        cell, inside = (y // stride[0], x // stride[1]), (y % stride[0], x % stride[1])
        total, weighted = 0.0, 0.0
        for tap in range(9):
            place = min(max(cell[0] + tap // 3 - 1, 0), rows - 1), min(max(cell[1] + tap % 3 - 1, 0), columns - 1)
            index = (tap * stride[0] + inside[0]) * stride[1] + inside[1]
            weight = math.exp(float(logits[b, index, cell[0], cell[1]]))
            total, weighted = total + weight, weighted + weight * float(coarse[b, c, place[0], place[1]])
        assert math.isclose(float(found[b, c, y, x]), weighted / total, abs_tol=1e-10)


def test_convex_upsampling_keeps_a_constant() -> None:
    coarse = torch.full((1, 2, 3, 3), 2.5, dtype=torch.float64)
    found = convex_upsample(coarse, 5 * random(1, 9 * 16, 3, 3), (4, 4))
    assert torch.allclose(found, torch.full_like(found, 2.5), atol=1e-12)


def test_correlation_is_the_cosine_of_cells_and_expected_flow_its_mean_target() -> None:
    one, two = random(2, 5, 2, 3), random(2, 5, 2, 3, seed=1)
    scores = correlate(one, two)
    flow = expected_flow(7 * scores, cell_grid(2, 3, one.device).double())
    for b in range(2):
        for y, x in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            a, target, weights = one[b, :, y, x], torch.zeros(2, dtype=torch.float64), 0.0
            for v, u in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
                cosine = float(a @ two[b, :, v, u] / a.norm() / two[b, :, v, u].norm())
                assert math.isclose(float(scores[b, y * 3 + x, v * 3 + u]), cosine, abs_tol=1e-10)
                weight = math.exp(7 * cosine)
                weights, target = weights + weight, target + weight * torch.tensor([u, v], dtype=torch.float64)
            expected = target / weights - torch.tensor([x, y])
            assert torch.allclose(flow[b, :, y, x], expected, atol=1e-10)


@pytest.mark.parametrize("flow", [(0, 0), (1, 0), (-1, 2), (0.25, -0.5), (9, -9)])
def test_lookup_reads_the_correlation_around_the_target(flow: tuple[float, float]) -> None:
    rows, columns, radius = 4, 5, 2
    correlation = random(1, rows * columns, rows * columns)
    targets = cell_grid(rows, columns, correlation.device).double()[None]
    targets = targets + torch.tensor(flow, dtype=torch.float64)[:, None, None]
    found = look_up(correlation, targets, radius)
    assert found.shape == (1, 25, rows, columns)
    for y, x in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).tolist():
        plane = correlation[0, y * columns + x].view(rows, columns)
        for tap in range(25):
            u = min(max(x + flow[0] + tap % 5 - radius, 0), columns - 1)
            v = min(max(y + flow[1] + tap // 5 - radius, 0), rows - 1)
            left, top = min(int(u), columns - 2), min(int(v), rows - 2)
            right, low = u - left, v - top
            upper = plane[top, left] * (1 - right) + plane[top, left + 1] * right
            lower = plane[top + 1, left] * (1 - right) + plane[top + 1, left + 1] * right
            expected = float(upper * (1 - low) + lower * low)
            assert math.isclose(float(found[0, tap, y, x]), expected, abs_tol=1e-10)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (6, 1)])
def test_a_grid_of_one_row_or_column_works(grid: tuple[int, int]) -> None:
    head = FlowHead([8], (7, 7))
    flows = head([torch.randn(2, 8, *grid)], [torch.randn(2, 8, *grid)])
    assert len(flows) == 4
    assert all(flow.shape == (2, 2, 7 * grid[0], 7 * grid[1]) and flow.isfinite().all() for flow in flows)


def training_free(width: int, stride: int, refinements: int = 0) -> FlowHead:
    """A head that matches the features themselves, sharply, and upsamples by equal weights."""
    head = FlowHead([width], (stride, stride), channels=width, refinements=refinements)
    with torch.no_grad():
        head.matching.norms[0] = torch.nn.Identity()
        head.matching.linear.weight.copy_(torch.eye(width))
        head.matching.linear.bias.zero_()
        head.temperature.fill_(math.log(500.0))
        head.upsample.weights[-1].weight.zero_()
        head.upsample.weights[-1].bias.zero_()
    return head


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -1), (-1, 3)])
def test_a_shift_by_whole_cells_is_found_without_training(right: int, down: int) -> None:
    stride, features = 7, torch.randn(1, 32, 12, 12)
    moved = features.roll((down, right), dims=(2, 3))
    flow = training_free(32, stride)([features], [moved])[-1][0]
    inside = flow[:, 4 * stride : -4 * stride, 4 * stride : -4 * stride]
    expected = torch.tensor([right * stride, down * stride], dtype=torch.float32)[:, None, None]
    assert torch.allclose(inside, expected.expand_as(inside), atol=1e-2)


def test_refinement_starts_from_the_matched_flow() -> None:
    """The last layer of the step is zero at first, and hidden features only change how flow is upsampled."""
    one, two = [torch.randn(1, 16, 5, 6)], [torch.randn(1, 16, 5, 6)]
    flows = training_free(16, 4, refinements=3)(one, two)
    assert len(flows) == 4
    for flow in flows[1:]:
        assert torch.allclose(flow, flows[0], atol=1e-5)


def test_rounds_do_not_send_gradients_back_through_flow() -> None:
    """Only the first round trains the temperature: later ones get the flow detached and the cosines without it."""
    head = FlowHead([8], (2, 2), refinements=2)
    torch.nn.init.normal_(head.flow_step.weight)
    flows = head([torch.randn(1, 8, 4, 4)], [torch.randn(1, 8, 4, 4)])
    flows[0].sum().backward(retain_graph=True)
    assert head.temperature.grad is not None and head.temperature.grad.abs() > 0
    head.zero_grad()
    flows[-1].sum().backward()
    assert head.temperature.grad is None or head.temperature.grad == 0
    assert head.flow_step.weight.grad is not None and head.flow_step.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("near", "far"), [(1e-3, 80.0), (0.5, 10.0), (1.0, 3.0)])
def test_depth_starts_at_a_fifth_of_the_largest_or_amid_a_narrow_range(near: float, far: float) -> None:
    head = DepthHead([8], (4, 4), min_depth=near, max_depth=far)
    torch.nn.init.zeros_(head.first.weight)
    depths = head([torch.randn(1, 8, 4, 4)])
    expected = max(far / 5, 2 / (1 / near + 1 / far))
    assert len(depths) == 3
    assert torch.allclose(depths[-1], torch.full_like(depths[-1], expected), rtol=1e-3)


def test_depth_stays_within_its_range() -> None:
    head = DepthHead([8], (2, 2), min_depth=0.5, max_depth=20.0)
    torch.nn.init.normal_(head.first.weight, std=50)
    depth = head([torch.randn(2, 8, 4, 4)], all_rounds=False)[-1]
    assert depth.min() >= 0.5 - 1e-6 and depth.max() <= 20 + 1e-4 and depth.std() > 1


def test_flow_loss_against_loops() -> None:
    flows, target = [random(2, 2, 3, 4, seed=seed) for seed in range(3)], random(2, 2, 3, 4, seed=9)
    valid = random(2, 3, 4, seed=5) > 0
    expected = 0.0
    for i, flow in enumerate(flows):
        total, count = 0.0, 0
        for b, y, x in valid.nonzero().tolist():
            total += sum(abs(float(flow[b, axis, y, x] - target[b, axis, y, x])) for axis in (0, 1))
            count += 1
        expected += 0.8 ** (2 - i) * total / count
    assert math.isclose(float(flow_loss(flows, target, valid)), expected, abs_tol=1e-10)


def test_depth_loss_against_loops() -> None:
    depths, target = [random(2, 3, 4, seed=seed).exp() for seed in range(3)], random(2, 3, 4, seed=9).exp()
    valid = random(2, 3, 4, seed=5) > 0
    expected = 0.0
    for i, depth in enumerate(depths):
        logs = [math.log(float(depth[p]) / float(target[p])) for p in map(tuple, valid.nonzero().tolist())]
        spread = sum(g * g for g in logs) / len(logs) - 0.85 * (sum(logs) / len(logs)) ** 2
        expected += 0.8 ** (2 - i) * 10 * math.sqrt(spread)
    assert math.isclose(float(depth_loss(depths, target, valid)), expected, abs_tol=1e-9)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_unknown_labels_reach_neither_losses_nor_gradients(unknown: float) -> None:
    flow, depth = random(1, 2, 4, 4).requires_grad_(), random(1, 4, 4, seed=1).exp().requires_grad_()
    true_flow, true_depth = random(1, 2, 4, 4, seed=2), random(1, 4, 4, seed=3).exp()
    true_flow[0, 0, 1, 1] = true_depth[0, 1, 1] = unknown
    true_depth[0, 2, 2] = 0.0
    valid = valid_flow(true_flow, 400.0), valid_depth(true_depth, 1e-3, 80.0)
    assert [int(each.sum()) for each in valid] == [15, 14]
    (flow_loss([flow], true_flow, valid[0]) + depth_loss([depth], true_depth, valid[1])).backward()
    for gradient in (flow.grad, depth.grad):
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0
    assert flow.grad[0, :, 1, 1].abs().sum() == 0 == depth.grad[0, 1, 1]  # type: ignore[index]


def test_without_valid_pixels_the_loss_is_zero_and_still_has_a_graph() -> None:
    flow, depth = random(1, 2, 2, 2).requires_grad_(), random(1, 2, 2).exp().requires_grad_()
    none = torch.zeros(1, 2, 2, dtype=torch.bool)
    loss = flow_loss([flow], torch.full((1, 2, 2, 2), math.nan), none) + depth_loss(
        [depth], torch.zeros(1, 2, 2), none
    )
    loss.backward()
    assert loss == 0
    assert all(x.grad is not None and x.grad.abs().sum() == 0 for x in (flow, depth))


def test_what_counts_as_valid() -> None:
    flow = torch.tensor([[3.0, 300.0, 0.0, 400.0], [4.0, 300.0, 0.0, 0.0]]).view(1, 2, 1, 4)
    assert valid_flow(flow, 400.0).tolist() == [[[True, False, True, False]]]
    mask = torch.tensor([[[False, True, True, True]]])
    assert valid_flow(flow, 400.0, mask).tolist() == [[[False, False, True, False]]]
    depth = torch.tensor([[[0.0, 0.5, 80.0, 81.0]]])
    assert valid_depth(depth, 0.1, 80.0).tolist() == [[[False, True, True, False]]]
