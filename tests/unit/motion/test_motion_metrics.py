# SPDX-License-Identifier: Apache-2.0
"""Metrics of flow and depth against values found by hand, in any split of a set into batches."""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from peft_promptmoe.motion import DepthError, EndPointError, trainer_metrics
from peft_promptmoe.motion.errors import geometric_median
from peft_promptmoe.motion.losses import valid_depth, valid_flow

NAN = math.nan


def flow(*pixels: tuple[float, float]) -> np.ndarray[Any, Any]:
    """(1, 2, 2, 2) of four pixels."""
    return np.array(pixels, dtype=np.float32).T.reshape(1, 2, 2, 2)


def test_flow_by_hand() -> None:
    true = flow((0, 0), (100, 0), (0, 10), (NAN, NAN))
    found = flow((0, 0), (104, 0), (3, 14), (50, 50))  # errors 0, 4, 5; the last one unknown
    scores = EndPointError().compute(predictions=found, references=true)
    assert scores["epe"] == pytest.approx(3.0) == scores["epe_per_image"]
    assert scores["1px"] == pytest.approx(1 / 3) == scores["3px"]
    assert scores["5px"] == pytest.approx(2 / 3)
    assert scores["f1_all"] == pytest.approx(100 / 3)  # 4 of 100 pixels is within 5 %, 5 of 10 is not
    assert scores["epe_zero_flow"] == pytest.approx(110 / 3)
    # from (0, 0) the distances to the three sum up to 110, and no other place is nearer to all: its angle is over 120
    assert scores["epe_constant_flow"] <= 110 / 3 + 1e-6
    assert scores["pixels"] == 3 and scores["images"] == 1


def test_per_pixel_and_per_image_means_differ() -> None:
    metric = EndPointError()
    metric.add(prediction=np.zeros((2, 1, 1)), reference=np.array([3.0, 4.0]).reshape(2, 1, 1))
    metric.add(prediction=np.zeros((2, 3, 3)), reference=np.zeros((2, 3, 3)))
    scores = metric.compute()
    assert scores["epe"] == pytest.approx(0.5) and scores["epe_per_image"] == pytest.approx(2.5)


def test_the_best_constant_flow_is_no_worse_than_any_other() -> None:
    points = torch.randn(2, 200, dtype=torch.float64) * torch.tensor([[3.0], [1.0]])
    best = (points - geometric_median(points)[:, None]).norm(dim=0).mean()
    for other in torch.randn(50, 2, dtype=torch.float64):
        assert best <= (points - other[:, None]).norm(dim=0).mean() + 1e-9
    assert best <= (points - points.mean(dim=1, keepdim=True)).norm(dim=0).mean() + 1e-9
    assert torch.allclose(geometric_median(torch.ones(2, 5).double()), torch.ones(2).double())
    most = torch.tensor([[0.0, 0.0, 0.0, 10.0], [0.0] * 4], dtype=torch.float64)  # their mean is at 2.5
    assert geometric_median(most).norm() < 1e-3


def test_masks_and_occlusion() -> None:
    true, found = flow((0, 0), (0, 0), (0, 0), (0, 0)), flow((1, 0), (2, 0), (3, 0), (4, 0))
    mask = np.array([[[True, True], [True, False]]])
    occluded = np.array([[[False, True], [False, True]]])
    scores = EndPointError().compute(predictions=found, references=true, mask=mask, occluded=occluded)
    assert scores["epe"] == pytest.approx(2.0)
    assert scores["epe_visible"] == pytest.approx(2.0) and scores["epe_occluded"] == pytest.approx(2.0)
    all_of_it = EndPointError().compute(predictions=found, references=true, occluded=occluded)
    assert all_of_it["epe_visible"] == pytest.approx(2.0) and all_of_it["epe_occluded"] == pytest.approx(3.0)


def test_padding_of_the_trainer_does_not_count() -> None:
    true, found = flow((1, 0), (-100, -100), (-100, 0), (0, 0)), flow((0, 0), (-100, -100), (-100, 0), (0, 0))
    assert EndPointError().compute(predictions=found, references=true)["pixels"] == 3


def test_depth_by_hand() -> None:
    true, found = np.array([[[1.0, 2.0], [4.0, 0.0]]]), np.array([[[2.0, 2.0], [2.0, 9.0]]])
    scores = DepthError().compute(predictions=found, references=true)
    log2 = math.log(2)
    assert scores["pixels"] == 3
    assert scores["abs_rel"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert scores["sq_rel"] == pytest.approx((1 + 0 + 1) / 3)
    assert scores["rmse"] == pytest.approx(math.sqrt((1 + 0 + 4) / 3))
    assert scores["rmse_log"] == pytest.approx(math.sqrt(2 * log2**2 / 3))
    assert scores["silog"] == pytest.approx(100 * math.sqrt(2 * log2**2 / 3))  # the mean difference is zero
    assert scores["delta1"] == pytest.approx(1 / 3) and scores["delta3"] == pytest.approx(1 / 3)
    assert scores["abs_rel_constant"] == pytest.approx((1 + 0 + 0.5) / 3)  # the median of the three is 2
    assert scores["abs_rel_per_image"] == pytest.approx(scores["abs_rel"])


def test_silog_forgives_a_factor_and_nothing_else_does() -> None:
    true = np.random.default_rng(0).uniform(1, 10, (1, 4, 4))
    scores = DepthError().compute(predictions=3 * true, references=true)
    assert scores["silog"] == pytest.approx(0, abs=1e-4) and scores["abs_rel"] == pytest.approx(2.0)
    assert scores["delta1"] == 0 and scores["delta3"] == 0


def test_median_scaling_is_asked_for_and_named() -> None:
    true = np.random.default_rng(0).uniform(1, 10, (1, 4, 4))
    scores = DepthError(median_scaling=True).compute(predictions=3 * true, references=true)
    assert scores["abs_rel_median_scaled"] == pytest.approx(0, abs=1e-6) and "abs_rel" not in scores
    assert scores["rmse_per_image_median_scaled"] == pytest.approx(0, abs=1e-5)


def test_medians_are_numpys() -> None:
    generator = np.random.default_rng(0)
    true, found = generator.uniform(1, 10, (1, 3, 4)), generator.uniform(1, 10, (1, 3, 4))
    scores = DepthError(median_scaling=True).compute(predictions=found, references=true)
    errors = np.abs(found * np.median(true) / np.median(found) - true) / true
    assert scores["abs_rel_median_scaled"] == pytest.approx(errors.mean())
    constant = (np.abs(np.median(true) - true) / true).mean()
    assert scores["abs_rel_constant_median_scaled"] == pytest.approx(constant)


def test_cap_crop_and_mask_choose_pixels() -> None:
    true = np.full((1, 100, 200), 10.0)
    true[0, 0, 0] = 200.0
    found = np.full_like(true, 500.0)
    capped = DepthError(cap=80).compute(predictions=found, references=true)
    assert capped["pixels"] == 100 * 200 - 1 and capped["rmse"] == pytest.approx(70.0)  # predictions are capped too
    garg = DepthError(crop="garg").compute(predictions=found, references=true)
    assert garg["pixels"] == (int(0.99189189 * 100) - int(0.40810811 * 100)) * (int(0.96405229 * 200) - 7)
    eigen = DepthError(crop="eigen").compute(predictions=found, references=true)
    assert eigen["pixels"] == (91 - 33) * (192 - 7)
    nyu = DepthError(crop="nyu").compute(predictions=np.ones((1, 480, 640)), references=np.ones((1, 480, 640)))
    assert nyu["pixels"] == (471 - 45) * (601 - 41)
    mask = np.zeros_like(true, dtype=bool)
    mask[0, 5:7] = True
    assert DepthError().compute(predictions=found, references=true, mask=mask)["pixels"] == 400


@pytest.mark.parametrize("split", [[8], [3, 5], [1] * 8])
def test_how_a_set_is_split_into_batches_does_not_matter(split: list[int]) -> None:
    rng = np.random.default_rng(0)
    flows = [rng.normal(0, 5, (8, 2, 6, 7)) for _ in range(2)]
    flows[1][rng.uniform(size=flows[1].shape) < 0.2] = np.nan
    depths = [rng.uniform(1, 20, (8, 6, 7)) for _ in range(2)]
    depths[1][:2] = 0.0
    for metric, (found, true) in ((EndPointError(), flows), (DepthError(cap=15), depths)):
        whole = metric.compute(predictions=found, references=true)
        start = 0
        for count in split:
            metric.add_batch(predictions=found[start : start + count], references=true[start : start + count])
            start += count
        assert len(metric) == 8
        assert metric.compute() == pytest.approx(whole, abs=1e-9)
        assert len(metric) == 0


def test_tensors_of_any_kind_are_read() -> None:
    true = torch.randn(2, 2, 3, 3)
    for kind in (torch.float32, torch.bfloat16):
        found = torch.zeros_like(true, dtype=kind).requires_grad_()
        scores = EndPointError().compute(predictions=found, references=true)
        assert scores["epe"] == pytest.approx(float(true.norm(dim=1).mean()), rel=1e-4)


def test_arrays_as_readers_of_files_return_them_are_read() -> None:
    true = np.random.default_rng(0).uniform(1, 20, (2, 6, 7)).astype(np.float32)
    expected = DepthError().compute(predictions=np.full_like(true, 2.0), references=true)
    big_endian, flipped = true.astype(">f4"), true[:, ::-1].copy()[:, ::-1]
    for given in (big_endian, flipped, true.astype(np.longdouble), [list(image) for image in true]):
        found = np.broadcast_to(np.float32(2.0), true.shape)
        assert DepthError().compute(predictions=found, references=given) == expected


def test_what_the_trainer_pads_is_no_part_of_a_crop() -> None:
    true = np.random.default_rng(0).uniform(1, 20, (1, 40, 50))
    padded = np.pad(true, ((0, 0), (0, 9), (0, 13)), constant_values=-100.0)
    for crop in ("garg", "eigen", "nyu"):
        expected = DepthError(crop=crop).compute(predictions=true + 1, references=true)  # type: ignore[arg-type]
        found = DepthError(crop=crop).compute(predictions=padded + 1, references=padded)  # type: ignore[arg-type]
        assert found == expected
    nothing = np.full((1, 4, 4), -100.0)
    with pytest.raises(ValueError, match="No pixel with a known reference"):
        DepthError(crop="garg").compute(predictions=nothing, references=nothing)


def test_what_is_unknown_or_padded_in_a_mask_does_not_count() -> None:
    mask = torch.tensor([[[1.0, 0.0], [NAN, -100.0]]])
    true = torch.ones(1, 2, 2, 2)
    assert EndPointError().compute(predictions=true, references=true, mask=mask)["pixels"] == 1
    assert EndPointError().compute(predictions=true, references=true, mask=(255 * mask.nan_to_num(0)))["pixels"] == 1
    assert valid_flow(true, 400.0, mask).sum() == 1 and valid_depth(true[:, 0], 0.1, 80.0, mask).sum() == 1


def test_no_valid_pixel_is_an_error() -> None:
    nothing = np.full((1, 2, 2, 2), np.nan)
    with pytest.raises(ValueError, match="No pixel with a known reference"):
        EndPointError().compute(predictions=np.zeros((1, 2, 2, 2)), references=nothing)
    with pytest.raises(ValueError, match="No pixel with a known reference"):
        DepthError().compute(predictions=np.ones((1, 2, 2)), references=np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="No pixel"):
        EndPointError().compute()


def test_an_image_without_valid_pixels_is_left_out_beside_others() -> None:
    metric = EndPointError()
    metric.add(prediction=np.ones((2, 2, 2)), reference=np.full((2, 2, 2), np.nan))
    metric.add(prediction=np.zeros((2, 2, 2)), reference=np.ones((2, 2, 2)))
    scores = metric.compute()
    assert scores["images"] == 1 and scores["epe_per_image"] == pytest.approx(math.sqrt(2))


def test_a_batch_that_is_refused_counts_not_at_all() -> None:
    metric = EndPointError()
    with pytest.raises(ValueError, match="size of the labels"):
        metric.add_batch(
            predictions=[np.ones((2, 2, 2)), np.ones((2, 3, 3))], references=[np.zeros((2, 2, 2)), np.zeros((2, 2, 2))]
        )
    assert len(metric) == 0


def test_predictions_that_are_no_numbers_are_never_good() -> None:
    scores = EndPointError().compute(predictions=flow(*[(NAN, 0.0)] * 4), references=flow(*[(1.0, 0.0)] * 4))
    assert math.isnan(scores["epe"]) and scores["f1_all"] == 100 and scores["1px"] == scores["5px"] == 0
    scores = DepthError(median_scaling=True).compute(
        predictions=np.full((1, 2, 2), NAN), references=np.ones((1, 2, 2))
    )
    assert math.isnan(scores["abs_rel_median_scaled"]) and scores["delta3_median_scaled"] == 0


@pytest.mark.parametrize("predicted", [-1.0, 0.0])
def test_depth_that_is_not_positive_is_not_scaled(predicted: float) -> None:
    with pytest.raises(ValueError, match=f"median of the predicted depth is {predicted:g}"):
        DepthError(median_scaling=True).compute(
            predictions=np.full((1, 2, 2), predicted), references=np.ones((1, 2, 2))
        )


def test_masks_come_with_their_batch() -> None:
    metric = EndPointError()
    metric.add_batch(predictions=np.ones((1, 2, 2, 2)), references=np.zeros((1, 2, 2, 2)))
    with pytest.raises(ValueError, match="no predictions"):
        metric.compute(mask=np.zeros((1, 2, 2)))


def test_wrong_shapes_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="size of the labels"):
        EndPointError().compute(predictions=np.zeros((1, 2, 4, 4)), references=np.zeros((1, 2, 2, 2)))
    with pytest.raises(ValueError, match="x first"):
        EndPointError().compute(predictions=np.zeros((1, 4, 4, 2)), references=np.zeros((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="rows, columns"):
        DepthError().compute(predictions=np.ones((1, 1, 4, 4)), references=np.ones((1, 1, 4, 4)))
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        DepthError().compute(predictions=np.ones((1, 4, 4)), references=np.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="not \\['occluded'\\]"):
        DepthError().compute(
            predictions=np.ones((1, 2, 2)), references=np.ones((1, 2, 2)), occluded=np.ones((1, 2, 2))
        )
    with pytest.raises(ValueError, match="mask has shape"):
        DepthError().compute(predictions=np.ones((1, 2, 2)), references=np.ones((1, 2, 2)), mask=np.ones((1, 3, 3)))
    with pytest.raises(ValueError, match="2 predictions and 2 references and 3 mask"):
        DepthError().compute(predictions=np.ones((2, 2, 2)), references=np.ones((2, 2, 2)), mask=np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="no references"):
        EndPointError().compute(predictions=np.zeros((1, 2, 2, 2)))
    with pytest.raises(ValueError, match="no predictions"):
        EndPointError().add(reference=np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="gather_for_metrics"):
        EndPointError(num_process=2, process_id=0, experiment_id="two")
    with pytest.raises(ValueError, match="crop"):
        DepthError(crop="center")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_depth"):
        DepthError(min_depth=5.0, cap=2.0)
    wrong: dict[str, tuple[Any, ...]] = {
        "cap": (0, NAN, "80"),
        "min_depth": (None, True),
        "median_scaling": ("yes", 1),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                DepthError(**{name: value})
    assert DepthError(cap=np.float32(80)).cap == 80
    with pytest.raises(TypeError, match="takes EndPointError"):
        trainer_metrics()
    with pytest.raises(TypeError, match="takes EndPointError"):
        trainer_metrics("epe")  # type: ignore[arg-type]


def test_they_are_metrics_of_evaluate() -> None:
    both = evaluate.combine([EndPointError(), EndPointError()])
    both.add_batch(predictions=np.zeros((1, 2, 2, 2)), references=np.ones((1, 2, 2, 2)))
    both.add(np.zeros((2, 2, 2)), np.ones((2, 2, 2)))
    scores = both.compute()
    assert any("epe" in name and value == pytest.approx(math.sqrt(2)) for name, value in scores.items())


def test_the_trainers_function_reads_one_task_or_two() -> None:
    true_flow, true_depth = np.ones((2, 2, 3, 3)), np.ones((2, 3, 3))
    one = trainer_metrics(EndPointError())
    assert one(EvalPrediction(np.zeros_like(true_flow), true_flow), compute_result=False) == {}
    assert one(EvalPrediction(true_flow, true_flow))["epe"] == pytest.approx(math.sqrt(2) / 2)
    two = trainer_metrics(EndPointError(), DepthError())
    scores = two(EvalPrediction((true_flow, 2 * true_depth), (true_flow, true_depth)))
    assert scores["epe"] == 0 and scores["abs_rel"] == pytest.approx(1.0)
    # labels of one task, predictions of both
    assert one(EvalPrediction((true_flow, true_depth), true_flow))["epe"] == 0
    # images of different sizes, which the Trainer keeps apart
    batches = [np.ones((1, 2, 3, 3)), np.ones((1, 2, 2, 5))]
    apart = one(EvalPrediction([np.zeros_like(each) for each in batches], batches))
    assert apart["images"] == 2 and apart["epe"] == pytest.approx(math.sqrt(2))
    assert two(EvalPrediction([(true_flow, true_depth)], [(true_flow, true_depth)]))["images"] == 2
    depth = trainer_metrics(DepthError())
    assert depth(EvalPrediction((true_flow, 2 * true_depth), (true_depth,)))["abs_rel"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="2 metrics for 1 predictions and 1 labels"):
        two(EvalPrediction((true_flow, true_depth), true_flow))
    with pytest.raises(ValueError, match="2 metrics for 1 predictions and 1 labels"):
        two(EvalPrediction(true_flow, true_flow))
